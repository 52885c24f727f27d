"""Blocks in blocks, and dataflow between blocks."""

import sys

import pytest

from nnsight._capture import CaptureError, Scope, bind, capture, is_skip, skip_body


def test_two_deep(Later):
    log, total = [], 0
    with Later(times=2) as outer:
        with Later(times=2) as inner:
            total += 1
            with Later():
                deep = (outer, inner)
            log.append((deep, total))
        after = inner
    assert [entry for entry, _ in log] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (total, after, deep) == (4, 1, (1, 1))


def test_two_deep_in_a_module(load):
    module = load("""
        class C:
            __k = 2
            def go(self):
                with Later(), Later(times=2) as n: self.__n = n + self.__k
                return self.__n
        with Later(times=2) as outer:
            def helper(m):
                with Later(times=m) as k:
                    out = [k, outer]
                return out
            with Later():
                result = helper(3)
        result.append(C().go())
        """)
    assert module.result == [2, 1, 3]


def test_nested_needs_no_file(load):
    """Elsewhere there is no such file: an inner block, and one in a function, come from the outer's text."""
    module = load("""
        def call(Outer, n):
            with Outer:
                text = '''a
                b'''
                with Later(), Later(times=n) as k:
                    ü = [k, '''c
                    d''']
                def helper():
                    with Later() as z: y = z, n; x = y
                    return x
                result = ü, text, helper()
        """)
    elsewhere = Elsewhere()
    module.call(elsewhere, 2)
    assert elsewhere.result == ([1, "c\n            d"], "a\n        b", (0, 2))


class Elsewhere:
    """Run the block under a file name that does not exist, in a frame of its own."""

    def __enter__(self):
        import dataclasses

        frame = sys._getframe(1)
        self.block = dataclasses.replace(capture(frame), filename="/nowhere/at/all.py")
        self.globals = {"Later": frame.f_globals["Later"], "n": frame.f_locals["n"]}
        skip_body(frame)

    def __exit__(self, exc_type, *_):
        scope = eval("Scope(sys._getframe())", self.globals | {"Scope": Scope, "sys": sys})
        bind(self.block, scope)()
        self.result = scope.get("result")
        return is_skip(exc_type)


def test_break_inside_is_fine(Later):
    with Later():
        for n in range(5):
            if n == 2:
                break
        else:
            n = -1
    assert n == 2


def test_future_annotations(load):
    module = load("""
        from __future__ import annotations
        def call():
            with Later():
                def f(a: not_there) -> nor_this: ...
            return f.__annotations__
        """)
    assert module.call() == {"a": "not_there", "return": "nor_this"}


class Flow:
    """Record what is waited for and announced, and what was bound at that moment."""

    def __init__(self, waits="", announces=""):
        self.waits, self.announces = frozenset(waits.split()), frozenset(announces.split())
        self.log = []

    def __enter__(self):
        frame = sys._getframe(1)
        block, self.scope = capture(frame), Scope(frame)
        self.run = bind(
            block,
            self.scope,
            waits=self.waits,
            announces=self.announces,
            wait=lambda name: self.log.append(f"wait {name}"),
            announce=lambda name: self.log.append(f"{name}={self.scope.get(name)!r}"),
        )
        skip_body(frame)

    def __exit__(self, exc_type, *_):
        if is_skip(exc_type):
            self.run("target")
        return is_skip(exc_type)


def test_waits(load):
    source = """
        def call(flow, log):
            x, y, z = [1], 2, 3
            with flow:
                log.append(x)
                x[0] = log.append("store")
                y += log.append("augmented") or 1
                log.append([y for y in range(2)])
                log.append([y for _ in range(2)])
                f = log.append("made") or (lambda: z)
                @(log.append("decorated") or (lambda f: f))
                def g(a=z): return y
                log.append(f"text {z}")
                for x in [log.append("loop")]: pass
                while log.append("test") or not z: pass
                with open(__file__) as f: pass
                del y
        """
    flow = Flow("x y z")
    load(source).call(flow, flow.log)
    assert flow.log == [
        *("wait x", [None], "store", "wait x", "wait y", "augmented", [0, 1], "wait y", [3, 3]),
        *("made", "wait z", "wait y", "wait z", "decorated", "wait z", "text 3"),
        *("loop", "test", "wait z", "wait y"),
    ]


def test_announces(load):
    source = """
        def call(flow, log):
            with flow as t:
                log.append("start")
                a = b = 1
                a += 1
                for c in [3, 4]:
                    log.append("loop")
                for c in []: pass
                with manager as d:
                    log.append("with")
                if (e := 5) > 9: pass
                else: log.append("else")
                import os.path as f
                def g(): return 1
                [(h := i) for i in [6, 7]]
                try:
                    raise KeyError
                except KeyError as j:
                    log.append("except")
                match [8]:
                    case [k]: log.append("case")
                while (l := len(log)) < 0: pass
                class M: pass
                n: int = 10
                x[0] = o, (p, *q) = 1, (2, 3)
                def never():
                    nonlocal r
                    r = 1
            r = None
        """
    import contextlib

    flow = Flow(announces="t a b c d e f g h j k l M n o p q r")
    load(source, manager=contextlib.nullcontext("held"), x={}).call(flow, flow.log)
    names = [str(entry).split("=")[0] for entry in flow.log]
    assert names == [
        *(
            "t",
            "start",
            "a",
            "b",
            "a",
            "c",
            "loop",
            "c",
            "loop",
            "d",
            "with",
            "e",
            "else",
            "e",
            "f",
            "g",
            "h",
        ),
        *("j", "except", "k", "case", "l", "M", "n", "o", "p", "q"),
    ]
    assert {"t='target'", "a=2", "c=4", "d='held'", "e=5", "h=7", "k=8", "n=10", "q=[3]"} <= set(flow.log)


def test_private_names_flow(load):
    module = load("""
        class C:
            def call(self, flow):
                __x = 1
                with flow:
                    __y = __x
                    self.__x = 2
        """)
    flow = Flow("_C__x", "_C__y")
    module.C().call(flow)
    assert flow.log == ["wait _C__x", "_C__y=1"]


def test_code_that_does_not_compile_alone(load):
    with pytest.raises(CaptureError, match="line"):
        load("""
            with Later():
                from os import *
            """)


def test_programs_are_forgotten(load):
    import gc

    from nnsight._capture import _program

    _program._compile.cache_clear()
    load("with Later():\n    def f(): pass\n")
    assert len(_program._blocks) > 0
    _program._compile.cache_clear()
    from nnsight._capture import _capture

    _capture._blocks._entries.clear()
    gc.collect()
    assert not [block for _, block in _program._blocks.values() if block.filename.endswith("user.py")]
