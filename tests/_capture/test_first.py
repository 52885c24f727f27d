"""Names that a block may read before it binds them: found on every way, against what a run really reads."""

import contextlib
import textwrap

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nnsight._capture import Block, names_of, names_read_first


def block_of(source):
    source = textwrap.dedent(source).strip("\n") + "\n"
    lines = source.count("\n")
    block = Block(source, "<test>", 1, "<module>", None, 1, (0,) * lines)
    return block.with_names(names_of(block.statements()))


def first(source):
    return set(names_read_first(block_of(source)))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("h = 1\nh += 1\ny = h", set()),
        ("h += 1", {"h"}),
        ("h = h + 1", {"h"}),
        ("del h", {"h"}),
        ("h = 1\ndel h\ny = h", {"h"}),
        ("h[0] = 1", {"h"}),
        ("h = []\nh[0] = 1", set()),
        ("(h, *rest), [k] = x\nprint(h, rest, k)", {"x", "print"}),
        ("if x:\n    h = 1\nelse:\n    h = 2\ny = h", {"x"}),
        ("if x:\n    h = 1\ny = h", {"x", "h"}),
        ("for i in x:\n    h = i\ny = h", {"x", "h"}),
        ("for i in x:\n    h = i\n    y = h", {"x"}),
        ("with x as h:\n    k = h\ny = h", {"x"}),
        ("with x:\n    h = 1\ny = h", {"x", "h"}),
        ("while x:\n    h = 1\ny = h", {"x", "h"}),
        ("try:\n    h = 1\nexcept E:\n    pass\ny = h", {"E", "h"}),
        ("f = lambda: h\nh = 1", {"h"}),
        ("h = 1\nf = lambda: h", set()),
        ("import a.b as c, d.e\ny = c, d", set()),
        ("h: int = 1\ny = h", set()),
        ("h: int\ny = h", {"h", "int"}),
        ("global h\nh = 1\ny = h", {"h"}),
        ("y = [h for h in x]\nh = 1", {"x", "h"}),  # with care: the list's own h is another
    ],
)
def test_names(source, names):
    assert first(source) - {"int"} == names - {"int"}


SIMPLE = st.sampled_from(["a = 1", "b = a", "a += b", "a, b = b, c", "c = [a]", "del b", "print(c)", "a = lambda: c"])


def indent(lines):
    return [f"    {line}" for line in lines]


def compound(bodies):
    heads = st.sampled_from(
        ["if chance():", "for a in some():", "for _ in some():", "with quiet() as c:", "with quiet():"]
    )
    plain = st.builds(lambda head, body: [head, *indent(body)], heads, bodies)
    both = st.builds(lambda one, two: ["if chance():", *indent(one), "else:", *indent(two)], bodies, bodies)
    tried = st.builds(lambda one, two: ["try:", *indent(one), "except NameError:", *indent(two)], bodies, bodies)
    return st.lists(st.one_of(plain, both, tried, SIMPLE.map(lambda line: [line])), min_size=1, max_size=3).map(
        lambda parts: [line for part in parts for line in part]
    )


PROGRAMS = st.recursive(st.lists(SIMPLE, min_size=1, max_size=4), compound, max_leaves=8)


@given(PROGRAMS, st.randoms(use_true_random=False))
def test_nothing_is_read_that_was_not_said(lines, random):
    class Quiet:
        def __enter__(self):
            return 1

        def __exit__(self, *error):
            return random.random() < 0.5

    class Names(dict):
        def __getitem__(self, name):
            if name in "abc" and name not in self:
                read.add(name)
            return super().__getitem__(name)

        def __delitem__(self, name):
            if name not in self:
                read.add(name)
            super().__delitem__(name)

    read: set[str] = set()
    source = "\n".join(lines)
    tools = {"chance": lambda: random.random() < 0.5, "some": lambda: range(random.randrange(3)), "quiet": Quiet}
    with contextlib.suppress(NameError, TypeError, KeyError):  # what was read until then counts
        exec(source, {**tools, "print": lambda *_: None}, Names())
    assert read <= first(source)
