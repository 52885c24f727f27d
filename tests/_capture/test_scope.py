"""Names of the frame: read, bound, shared and written back."""

import gc
import sys
import threading
import weakref

import pytest

from nnsight._capture import Scope, bind, capture, is_skip, skip_body

before_312 = pytest.mark.skipif(sys.version_info >= (3, 12), reason="locals cannot be deleted from outside")


def test_names_of_a_function(Later):
    a, total = 2, 10
    with Later(times=3) as step:
        total += a
        squares = [step * i for i in range(3) if i != a]
        *_, last = (lambda x: (x, a))(total)
    assert (total, squares, last, step) == (16, [0, 2], 2, 2)


def test_value_left_out_leaves_the_target_alone():
    def call():
        step = "as it was"
        with Manual() as step:  # noqa: F811
            seen = step
        block.bound()
        block.scope.write_back(block.block.names_bound)
        return step, seen

    class Manual:
        def __enter__(self):
            nonlocal block
            frame = sys._getframe(1)
            self.block, self.scope = capture(frame), Scope(frame)
            self.bound = bind(self.block, self.scope)
            block = self
            skip_body(frame)

        def __exit__(self, exc_type, *_):
            return is_skip(exc_type)

    block = None
    assert call() == ("as it was", "as it was")


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("x", "x"),
        ("(x, *y)", "x, y"),
        ("box['k']", "box"),
        ("box.attribute", "box.attribute"),
        ("[x, (y, z)]", "z"),
    ],
)
def test_targets(load, target, shown):
    class Box(dict):
        pass

    source = f"""
        def call():
            box = Box()
            with Later(values=[(1, (2, 3))]) as {target}:
                pass
            return {shown}
        """
    native = {"x": (1, (2, 3))}
    exec(f"box = Box()\n{target} = (1, (2, 3))\nshown = {shown}", {"Box": Box}, native)
    assert load(source, Box=Box).call() == native["shown"]


def test_names_of_a_module(load):
    module = load("""
        a = [1, 2]
        with Later(times=2) as step:
            import os.path as path, string
            def helper(n=len(a)):
                global made
                made = n
                return [a[i] + step for i in range(n)]
            class Thing:
                size = step
                def get(self): return self.size + len(a)
            found = helper()
            if (walrus := Thing().get()) > 2:
                del found[0]
            note: int = 5
        after = found, walrus
        """)
    assert module.after == ([3], 3)
    assert module.made == 2
    assert module.note == 5
    assert module.helper.__qualname__ == "helper"
    assert module.Thing.get.__qualname__ == "Thing.get"
    assert module.path.__name__ in ("posixpath", "ntpath")


def test_binding_statements(Later):
    class Same:
        def __enter__(self):
            return 7

        def __exit__(self, *_):
            return False

    with Later():
        for n in range(3):
            if n == 1:
                continue
        while True:
            break
        with Same() as held, Same() as (also):
            pass
        try:
            raise KeyError("k")
        except KeyError as error:
            text = str(error)
        from math import pi as π

        match [1, 2, {"k": 3, "l": 4}]:
            case [first, *others, {"k": k, **rest}] if guard := first:
                pass
        (p, [q]) = 1, [2]
    assert (n, held, also, text, round(π)) == (2, 7, 7, "'k'", 3)
    assert (first, others, k, rest, guard, p, q) == (1, [2], 3, {"l": 4}, 1, 1, 2)
    with pytest.raises(UnboundLocalError):
        error  # noqa: F821


@before_312
def test_del_of_a_local(Later):
    gone = kept = 1
    with Later():
        del gone
    with pytest.raises(UnboundLocalError):
        gone  # noqa: F821
    assert kept == 1


def test_del_of_a_global(load):
    module = load("""
        gone = 1
        with Later():
            del gone
        """)
    assert not hasattr(module, "gone")


def test_closures_are_shared(Later):
    count, missing = 0, None

    def increase():
        nonlocal count
        count += 1
        return count

    def inner():
        nonlocal missing
        with Later():
            missing = "found"
            nonlocal_seen.append(count)

    nonlocal_seen = []
    with Later(times=2):
        increase()
        count += 10
        nonlocal_seen.append(count)
    inner()
    assert nonlocal_seen == [11, 22, 22]
    assert increase() == 23
    assert missing == "found"


def test_cells_of_another_call_are_not_taken(Later):
    def call(n, outer=None):
        def show():
            return n

        if outer is None:
            return call(n, show)  # the same value, in another cell
        show_own = show
        del show
        with Later():
            n += 1
        return outer(), show_own(), n

    assert call(5) == (5, 6, 6)


def test_nested_nonlocal_and_global(load):
    module = load("""
        def call():
            global made
            n = 1
            with Later():
                made = 5
                def increase():
                    nonlocal n
                    n += 1
                increase()
                function = lambda: (n, [n for _ in range(2)], {n: (lambda: n)()})
            return n, function()
        result = call()
        """)
    assert module.result == (2, (2, [2, 2], {2: 2}))
    assert module.made == 5


def test_global_that_a_comprehension_of_the_function_shadows(load):
    module = load("""
        i = "global"
        def call():
            unused = [i for i in range(2)]
            with Later():
                seen = i
                own = [i for i in range(2)]
            return seen, own
        result = call()
        """)
    assert module.result == ("global", [0, 1])


def test_class_bodies(load):
    module = load("""
        def call(n):
            class Made:
                a = 1
                __hidden = 3
                with Later():
                    b = a + n + __hidden
                    def method(self): return self.b
                c = b
            return Made
        result = call(10)
        """)
    made = module.result
    assert (made.b, made.c, made().method(), made._Made__hidden) == (14, 14, 14, 3)


def test_private_names_and_super(load):
    module = load("""
        class Base:
            def greet(self): return "base"
        class User(Base):
            def __init__(self):
                self.__secret = 1
            def greet(self):
                __local = 4
                with Later():
                    self.__secret += __local
                    __other = super().greet()
                    helper = lambda: (__class__, __other, self.__secret)
                    every = [super().greet() for _ in range(2)]
                return helper(), every
        result = User().greet()
        """)
    assert module.result == ((module.User, "base", 5), ["base", "base"])


def test_exec_with_locals_of_its_own(load, monkeypatch):
    import linecache

    source = "b = 1\nwith Later():\n    b += a\n    c = [b for _ in range(2)]\n"
    monkeypatch.setitem(linecache.cache, "<two dicts>", (len(source), None, source.splitlines(True), "<two dicts>"))
    values = {"a": 5}
    exec(compile(source, "<two dicts>", "exec"), {"Later": load("").Later}, values)
    assert (values["b"], values["c"]) == (6, [6, 6])


def test_generators_and_coroutines(Later):
    def generator():
        for n in range(2):
            with Later():
                m = n * 10
            yield m

    async def coroutine():
        with Later():
            m = 5
        return m

    assert list(generator()) == [0, 10]
    with pytest.raises(StopIteration) as stop:
        coroutine().send(None)
    assert stop.value.value == 5


def test_threads(Later):
    results = {}

    def work(n):
        for _ in range(50):
            with Later():
                value = [n] * 2
            assert value == [n, n]
        results[n] = value

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n, n] for n in range(8)}


class Kept:
    """Keep the block and its scope, for the test to use."""

    def __init__(self, make=Scope):
        self.make = make

    def __enter__(self):
        frame = sys._getframe(1)
        self.block, self.scope = capture(frame), self.make(frame)
        skip_body(frame)

    def __exit__(self, exc_type, *_):
        return is_skip(exc_type)


def test_refresh_takes_what_native_code_bound():
    n = 1
    seen = []
    kept = Kept()
    with kept:
        seen.append(n)
    run = bind(kept.block, kept.scope)
    run()
    n = 2
    run()
    kept.scope.refresh()
    run()
    assert seen == [1, 1, 2]


def test_forks_have_the_values_of_their_place():
    blocks, seen = [], []
    total = 0
    for n in range(3):
        with (kept := Kept()):
            for i in range(2):
                seen.append((n, i))
            total = total + n
        blocks.append((kept.block, kept.scope.fork(kept.block, shared={"total"})))
        blocks[-1][1].get("n")
    runs = [bind(block, fork) for block, fork in blocks]
    for run in runs:
        run()
    assert seen == [(n, i) for n in range(3) for i in range(2)]
    assert [fork.get("n") for _, fork in blocks] == [0, 1, 2]
    blocks[-1][1].write_back({"i"})
    assert (n, i) == (2, 1)


def test_forks_of_a_module(load):
    module = load(
        """
        blocks, seen = [], []
        for n in range(3):
            kept = Kept()
            with kept:
                seen.append(n)
                mine = n * len(seen)
            blocks.append((kept.block, kept.scope.fork(kept.block)))
        for block, fork in blocks:
            bind(block, fork)()
        assert "mine" not in globals()
        blocks[1][1].write_back(["mine"])
        """,
        Kept=Kept,
        bind=bind,
    )
    assert module.seen == [0, 1, 2]
    assert module.mine == 2


def test_get_and_set():
    n = 1
    kept = Kept()
    with kept:
        m = n
    assert kept.scope.get("n") == 1
    assert kept.scope.get("m", "unbound") == "unbound"
    assert kept.scope.get("Kept") is Kept
    kept.scope.set("n", 8)
    bind(kept.block, kept.scope)()
    kept.scope.write_back(kept.block.names_bound)
    assert (n, m) == (1, 8)


class Value:
    pass


def test_everything_dies_by_reference_counts(Later):
    def call():
        held, function = Value(), None
        with Later(times=2) as step:
            more = [held for _ in range(2)]
            also = (held, step)
        gone.append(weakref.ref(held))
        del held, more, also
        assert gone[-1]() is None, "the frame keeps what was deleted"

        held = Value()
        with Later():
            with Later(times=2) as inner:
                other = held, inner
        gone.append(weakref.ref(held))

    gone = []
    gc.collect()
    gc.disable()
    try:
        call()
        assert [reference() for reference in gone] == [None, None]
        kept = scope_of_a_dead_frame()
        assert kept() is None
    finally:
        gc.enable()


def scope_of_a_dead_frame():
    value = Value()
    kept = Kept()
    with kept:
        value
    kept.scope.cell("value")
    kept.scope.close()
    return weakref.ref(value)
