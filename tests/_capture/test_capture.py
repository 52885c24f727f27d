"""Which block is found, its text, and what is refused."""

import ast
import asyncio
import contextlib
import dataclasses
import json
import linecache
import os
import sys
import traceback
from pathlib import Path

import pytest

from nnsight._capture import Block, CaptureError, capture, is_skip, skip_body


class Grab:
    """Keep the block and run nothing."""

    def __init__(self, into=None):
        self.into = into

    def __enter__(self):
        frame = sys._getframe(1)
        self.block = capture(frame)
        if self.into is not None:
            self.into.append(self.block)
        skip_body(frame)
        return self

    def __exit__(self, exc_type, *_):
        return is_skip(exc_type)


def test_block_is_text_and_data():
    grab = Grab()
    with grab:
        x = [len(name) for name in grab.block.names_read]
        y = lambda a: a + len(x) + z  # noqa: E731
    block = grab.block
    z = 0
    assert block.source.splitlines()[0] == "x = [len(name) for name in grab.block.names_read]"
    assert block.filename == __file__
    assert block.function == "test_block_is_text_and_data"
    assert block.target is None
    assert block.names_read == {"grab", "len", "x", "z"}
    assert block.names_bound == {"x", "y"}
    assert Path(__file__).read_text("utf-8").splitlines()[block.first_line - 1].strip() == block.source.splitlines()[0]
    data = dataclasses.asdict(block)
    names = ("names_read", "names_bound", "names_global")
    sent = json.loads(json.dumps({**data, **{name: sorted(data[name]) for name in names}}))
    back = Block(**{**sent, "margins": tuple(sent["margins"]), **{name: frozenset(sent[name]) for name in names}})
    assert back == block
    assert hash(back) == hash(block)


NAMES = {
    "x": ("x", ""),
    "x = 1": ("", "x"),
    "x += 1": ("", "x"),
    "x: T = v": ("v", "x"),
    "del x": ("", "x"),
    "import a.b, c as d": ("", "a d"),
    "for i, (j, *k) in x: i": ("x i", "i j k"),
    "[i for i in x if i]": ("x", ""),
    "{i: j for i in x for j in i}": ("x", ""),
    "[(y := i) for i in x]": ("x", "y"),
    "f = lambda a, b=c: a + b + d": ("c d", "f"),
    "def f(a: A, b=c, *, k=d) -> R:\n    e = a\n    return e, g": ("A R c d g", "f"),
    "@deco\nclass C(B, metaclass=M):\n    a = 1\n    def f(self): return a, self": ("deco B M a", "C"),
    "def f():\n    global g\n    g = h": ("h", "f g"),
    "def f():\n    nonlocal n\n    n = h": ("h", "f n"),
    "def f():\n    def g(): return i, j\n    i = 1": ("j", "f"),
    "try: a\nexcept E as e: e": ("a E e", "e"),
    "with a as b, c as d.e: pass": ("a c d", "b"),
    "f'{a!r:>{w}}' f'{b}'": ("a b w", ""),
    "match s:\n    case K(a, b=c) | [K(a), c]: pass": ("s K", "a c"),
    "global g; g = 1": ("", "g"),
    "print(__name__)": ("print __name__", ""),
    "x = super().f()": ("super __class__ self", "x"),
}


@pytest.mark.parametrize("body", NAMES)
def test_names(load, body):
    read, bound = NAMES[body]
    extra = "        self.__class__\n" if "super" in body else ""
    source = "class C:\n    def call(self, grab):\n        if 0: n = h = None\n        with grab:\n"
    source += "".join(f"            {line}\n" for line in body.splitlines()) + extra
    grab = Grab()
    load("#raw\n" + source).C().call(grab)
    found = grab.block.names_read
    if sys.version_info < (3, 12) and "class" in body:
        found = found - {"__name__"}
    assert (found, grab.block.names_bound) == (set(read.split()), set(bound.split()))


def test_each_item_of_each_statement(load):
    module = load(
        """
        def call(grabs):
            with grabs[0], grabs[1] as x, grabs[2] as (y):
                a = 1
            with (
                grabs[3] as p,  # with, a comment
                (grabs[4]) as q,
                (grabs[5]),
            ):
                b = 1
            with (grabs[6]), (grabs[7]): c = 1
            with grabs[8], \\
                    grabs[9]:
                d = 1
        """
    )
    texts = []
    for skipped in range(10):
        grabs = [Grab() if n == skipped else contextlib.nullcontext() for n in range(10)]
        module.call(grabs)
        texts.append(ast.unparse(grabs[skipped].block.tree()).replace("\n    ", " "))
    assert texts == [
        "with grabs[1] as x, grabs[2] as y: a = 1",
        "with grabs[2] as y: a = 1",
        "a = 1",
        "with grabs[4] as q, grabs[5]: b = 1",
        "with grabs[5]: b = 1",
        "b = 1",
        "with grabs[7]: c = 1",
        "c = 1",
        "with grabs[9]: d = 1",
        "d = 1",
    ]


def test_items_that_run_later(Later):
    log = []

    @contextlib.contextmanager
    def note(text):
        log.append(f"enter {text}")
        yield text
        log.append(f"exit {text}")

    with note("a"), Later() as n, note("b") as b, note("c") as c:
        log.append((n, b, c))
    assert log == ["enter a", "enter b", "enter c", (0, "b", "c"), "exit c", "exit b", "exit a"]


def test_statements_in_finally_are_compiled_twice(Later):
    def call(fail):
        try:
            if fail:
                raise KeyError
        except KeyError:
            pass
        finally:
            with contextlib.nullcontext(), Later():
                x = 1
            with Later():
                y = x + 1
        return x, y

    assert call(False) == call(True) == (1, 2)


def test_body_on_the_line_of_the_with(load):
    module = load("""
        def call():
            with Later() as n: x = "ünï"; y = [x,
                  n]
            if True:
                with Later(): "a constant"
                with Later(): pass
                with Later(): z = (
        1)
            return x, y, z
        """)
    assert module.call() == ("ünï", ["ünï", 0], 1)


def test_first_statements(Later):
    with Later():
        "a docstring"
    with Later():
        try:
            x = 1
        finally:
            y = 2
    with Later():
        pass
    with Later():

        @staticmethod
        def f():
            return 3

    with Later():
        # a comment

        z = 4
    assert (x, y, f(), z) == (1, 2, 3, 4)


def test_layout_is_kept(load):
    source = (
        "#raw\n"
        "def call(grab, Later):\n"
        "\tif True:\n"
        "\t\twith grab() as step:\n"
        "\t\t\ta = '''one\n"
        "\t\t\ttwo\n"
        "three'''\n"
        "\t\t\tü = f'''{a}\n"
        "\t\t\tfour'''; b = 'in\\\n"
        "\t\t\tside'\n"
        "# a comment at the margin\n"
        "\t\t\tif b:\n"
        "\t\t\t\tc = (a,\n"
        "b)\n"
        "\x0c\n"
        "\t\t\td = a + \\\n"
        "  b\n"
        "\treturn locals()\n"
    )
    native = load(source).call(contextlib.nullcontext, None)
    module = load(source)
    names = "aübcd"
    later = module.call(module.Later, None)
    assert {name: later[name] for name in names} == {name: native[name] for name in names}
    grab = Grab()
    load(source).call(lambda: grab, None)
    assert grab.block.source.startswith("a = '''one\n\t\t\ttwo\n")


def test_windows_line_ends(load):
    module = load("#raw\r\ndef call():\r\n    with Later():\r\n        a = '''x\r\n        y'''\r\n    return a\r\n")
    assert module.call() == "x\n        y"


def test_positions_are_those_of_the_file(load):
    source = """
        def call(grab):
            with grab, (yield_ := 1) as _ if False else grab as second:
                ü = [first,
                     'ü', second]
                return_ = 1
        """
    source = source.replace(", (yield_ := 1) as _ if False else grab as second", " as second")
    grab = Grab()
    load(source).call(grab)
    whole = ast.parse(Path(grab.block.filename).read_text("utf-8"))
    with_ = whole.body[0].body[0]
    assert [ast.dump(node, include_attributes=True) for node in grab.block.tree().body] == [
        ast.dump(node, include_attributes=True) for node in with_.body
    ]


def test_traceback_names_the_line_of_the_user(load):
    module = load("""
        def call():
            with Later():
                x = 1
                with Later():
                    def helper():
                        return {}["no" "such"]
                    x = (x +
                         helper())
        """)
    with pytest.raises(KeyError) as caught:
        module.call()
    frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == module.__file__]
    assert [(frame.name, frame.lineno) for frame in frames] == [
        ("call", 3),
        ("call", 5),
        ("call", 9),
        ("helper", 7),
    ]
    assert frames[-1].line == 'return {}["no" "such"]'


LEAVING = {
    "return 1": "return",
    "yield": "yield",
    "x = yield from y": "yield from",
    "for n in []:\n    pass\nelse:\n    break": "break",
    "if x:\n    continue": "continue",
    "def f(a=(yield)): pass": "yield",
    "try: pass\nfinally:\n    return": "return",
}


@pytest.mark.parametrize("body", LEAVING)
def test_leaving_is_refused(load, body):
    word = LEAVING[body]
    lines = "".join(f"            {line}\n" for line in body.splitlines())
    source = f"#raw\ndef call(x, y):\n    for _ in [1]:\n        with Later():\n{lines}"
    with pytest.raises(CaptureError, match=rf"line \d+: `{word}` would leave"):
        list(load(source).call(1, []) or [])


def test_await_is_refused(load):
    module = load("""
        async def one():
            with Later():
                await x
        async def two():
            with Later():
                [a async for a in x]
        async def three():
            async with Async():
                pass
        class Async(Later):
            async def __aenter__(self): return self.__class__.__mro__[1].__enter__(self)
            async def __aexit__(self, *_): pass
        async def four():
            with Later():
                async def inner(): await x
                x = (await a for a in [])
            return 4
        """)
    for call, text in [(module.one, "`await`"), (module.two, "`async for`")]:
        with pytest.raises(CaptureError, match=text):
            call().send(None)
    with pytest.raises(CaptureError):
        module.three().send(None)
    with pytest.raises(StopIteration):
        module.four().send(None)


def test_async_with_is_refused(load):
    module = load(
        """
        class Async:
            def __aenter__(self): capture(sys._getframe(1))
            async def __aexit__(self, *_): pass
        async def call():
            async with Async():
                pass
        """,
        capture=capture,
        sys=sys,
    )
    with pytest.raises(CaptureError, match="`async with` cannot run later"):
        module.call().send(None)


def test_an_async_with_may_be_taken(load):
    module = load(
        """
        import asyncio
        async def call(factor):
            before = [factor]
            async with asyncio.Lock(), Awaited() as step:
                product = factor * 2
                before.append(product)
            try:
                async with \\
                    Awaited():
                    raise KeyError(product)
            except KeyError as error:
                before.append(error.args[0] + 1)
            return before, product
        async def first():
            async with Awaited(), asyncio.Lock():
                pass
        """
    )
    tracer = sys.gettrace()

    async def both():
        return await asyncio.gather(module.call(3), module.call(5))

    assert asyncio.run(both()) == [([3, 6, 7], 6), ([5, 10, 11], 10)]
    assert sys.gettrace() is tracer
    with pytest.raises(CaptureError, match="must come last"):
        asyncio.run(module.first())


def test_calls_that_are_no_with_are_refused():
    with pytest.raises(CaptureError, match="ExitStack"):
        Grab().__enter__()
    with contextlib.ExitStack() as stack, pytest.raises(CaptureError, match="ExitStack"):
        stack.enter_context(Grab())


def test_star_import_is_refused(load):
    with pytest.raises(CaptureError, match="import \\*"):
        load("with Later():\n    from os import *\n")


def test_no_source_is_refused(Later):
    with pytest.raises(CaptureError, match=r"not available(?s:.*)notebook"):
        exec("with Later():\n    x = 1\n", {"Later": Later})


def test_a_file_that_another_text_stands_for_in_linecache(Later, monkeypatch):
    """As while a job that brings a function of this file runs in another thread."""
    lines = ["\n"] * 3 + ["def other():\n", "    return 1\n"]
    monkeypatch.setitem(linecache.cache, __file__, (sum(map(len, lines)), None, lines, __file__))
    x = 0
    with Later(times=2):
        x += 1
    assert x == 2


def test_exec_with_source_in_linecache(Later, monkeypatch):
    source = "x = 1\nwith Later():\n    x += 1\n"
    monkeypatch.setitem(linecache.cache, "<made>", (len(source), None, source.splitlines(True), "<made>"))
    values = {"Later": Later}
    exec(compile(source, "<made>", "exec"), values)
    assert values["x"] == 2


def test_notebook_cell(Later, monkeypatch):
    """IPython compiles the statements of a cell one at a time, the last perhaps interactively."""
    name = "/tmp/ipykernel_1/123.py"
    source = "import os\nn = 2\nwith Later(times=n) as i:\n    out = [i]\n    out\nlast = out\n"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    values = {"Later": Later}
    for node in ast.parse(source).body:
        code = compile(ast.Module([node], []), name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        exec(code.replace(co_name="<cell line: 1>"), values)
    assert values["last"] == [1]
    code = compile(ast.Interactive([ast.parse(source).body[2]]), name, "single")
    exec(code, values)


def test_ipython(script):
    pytest.importorskip("IPython")
    _, done = script(
        """
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        shell.push({"Later": Later})
        cells = [
            "import sys; n = 2",
            "x = [1]\\nwith Later(times=n) as i:\\n    x.append(i)\\nx",
            "def f(y):\\n    with Later():\\n        y = sys.maxsize and y + 1\\n    return y\\nf(3)",
            "import asyncio\\nawait asyncio.sleep(0)\\nwith Later():\\n    z = x\\nz",
        ]
        for cell in cells:
            result = shell.run_cell(cell)
            result.raise_error()
            print("result", result.result)
        """
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("result")]
    assert found == ["result None", "result [1, 0, 1]", "result 4", "result [1, 0, 1]"]


def rewrite(path, text):
    path.write_text(text)
    os.utime(path, (1, 1))


STALE = {
    "constant": ("n = 1 + x", "n = 2 + x"),
    "name": ("n = 1 + x", "n = 1 + y"),
    "line less": ("        m = 1\n", "\n"),
    "line moved": ("def call", "\ndef call"),
    "not a with": ("with Later()", "if     Later()"),
    "no Python": ("n = 1 + x", "n = ="),
}


@pytest.mark.parametrize("edit", STALE)
def test_changed_source_is_refused(load, edit):
    source = "#raw\ndef call(x=0, y=0):\n    with Later():\n        m = 1\n        n = 1 + x\n    return n\n"
    module = load(source)
    path = Path(module.__file__)
    rewrite(path, source.replace(*STALE[edit]))
    with pytest.raises(CaptureError, match=r"has changed\nsince"):
        module.call()


def test_source_that_was_read_before_it_changed_is_used(load):
    source = "#raw\ndef call(x=0):\n    with Later():\n        n = 1 + x\n    return n\n"
    module = load(source)
    path = Path(module.__file__)
    linecache.getlines(module.__file__)
    rewrite(path, source.replace("1 + x", "2 + x"))
    assert module.call() == 1


def test_reloaded_source_is_used(load):
    source = "#raw\ndef call(x=0):\n    with Later():\n        n = 1 + x\n    return n\n"
    assert load(source).call() == 1
    assert load(source.replace("1 + x", "12 + x")).call() == 12


def test_a_loop_parses_once(monkeypatch):
    blocks = []
    parse = ast.parse
    calls = []
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: (calls.append(1), parse(*args, **kwargs))[1])
    for n in range(100):
        with Grab(blocks):
            n
        if n == 0:
            first = len(calls)
    assert len({id(block) for block in blocks}) == 1
    assert len(calls) == first
