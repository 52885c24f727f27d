"""The names of operations and their order."""

import pytest

from nnsight.errors import SourceError
from nnsight.source import FunctionSource, analyse, instrument


def names(function) -> list[str]:
    return list(analyse(function).operations)


def test_names_come_from_the_callee_and_count_its_calls(gpt2_small):
    operations = analyse(gpt2_small.transformer.h[0].attn).operations
    assert "attention_interface_0" in operations
    assert "self_c_proj_0" in operations
    assert "ALL_ATTENTION_FUNCTIONS_get_interface_0" in operations
    assert {"self_c_attn_0", "self_c_attn_1", "self_c_attn_split_0"} <= operations.keys()
    assert operations["self_c_proj_0"].text == "self.c_proj(attn_output)"


def test_every_kind_of_callee_has_a_name(recorder):
    def function(f, x, layers, self):
        self.norm(x)
        layers[0](x)
        layers[0].norm(x)
        f(x)(x)
        f(x)[0](x)
        x.view(1).add(2)
        (x + x).sum()
        ", ".join(x)
        f"{x}".upper()
        (y := f)(x)
        (lambda: 0)()
        return y

    assert names(function) == [
        *("self_norm_0", "layers_0", "layers_norm_0"),
        *("f_0", "f_call_0", "f_1", "f_call_1"),
        *("x_view_0", "x_view_add_0", "value_sum_0", "str_join_0", "str_upper_0", "y_0", "value_0"),
    ]


def test_a_path_that_is_written_in_two_ways_is_counted_once():
    def function(a, a_b):
        a.b()
        a_b()
        return a_b_0()  # noqa: F821

    assert names(function) == ["a_b_0", "a_b_1", "a_b_0_0"]


def test_names_are_identifiers_and_no_attributes_of_the_source(gpt2_small, llama, mixtral):
    for model in (gpt2_small, llama, mixtral):
        for module in model.modules():
            if type(module).forward is not type(module).__base__.forward and list(module.children()):
                for name in names(module):
                    assert name.isidentifier()
                    assert not hasattr(FunctionSource, name)


def test_own_calls_only():
    def function(f, xs):
        def nested(a=f(1)):  # noqa: B008
            return f.hidden(a)

        class Local(f.base()):
            value = f.hidden()

        annotated: f.hidden() = f.value()
        collected = [f.element(x) for x in f.source() if f.test(x)]
        return (lambda a=f(2): f.hidden(a)), nested, Local, annotated, collected  # noqa: B008

    assert names(function) == ["f_0", "f_base_0", "f_value_0", "f_source_0", "f_test_0", "f_element_0", "f_1"]


def test_calls_that_need_their_own_frame_are_left_out():
    def function():
        import sys

        return locals(), globals(), vars(), dir(), eval("1"), sys._getframe(), len(())

    assert names(function) == ["len_0"]


def test_order_is_that_of_evaluation(recorder):
    class Thing(dict):
        def step(self, *args, **kwargs):
            return self

        first = second = third = fourth = fifth = sixth = __call__ = step

    def function(a):
        a.first()[a.second()] = a.third()
        {a.first(): a.second(), a.third(): a.fourth()}
        a.fifth(a.first(), a.second(), key=a.third(), *[a.fourth()], other=a.sixth())  # noqa: B026
        a.first() if a.second() is None else a.third()
        {a.first(): a.second() for _ in [a.third()] if a.fourth() is not None}
        for a.fifth().name in [a.sixth()]:  # noqa: B020
            pass
        return a.first()(a.second())(a.third())

    class Key(Thing):
        __hash__ = object.__hash__
        __setattr__ = lambda self, name, value: None  # noqa: E731

    record = recorder()
    instrument(function, record)(Key())
    expected = names(function)
    skipped = [name for name in expected if name not in record.names]
    assert [analyse(function).operations[name].text for name in skipped] == ["a.first()"]
    assert record.names == [name for name in expected if name not in skipped]


def test_lines_are_relative_and_where_the_arguments_open():
    def function(x):
        value = (
            x.abs()
            .sum(
                0,
            )
        )  # fmt: skip
        return value.item()

    lines = {name: (op.line, op.end) for name, op in analyse(function).operations.items()}
    assert lines == {"x_abs_0": (3, 3), "x_abs_sum_0": (4, 6), "value_item_0": (8, 8)}


def test_super_calls_are_operations_of_what_they_call():
    class Base:
        def run(self, x):
            return x

    class Derived(Base):
        def run(self, x):
            return super().run(x) + super().run(x)

    assert names(Derived.run) == ["super_run_0", "super_run_1"]


def test_f_strings_have_the_text_of_their_calls():
    def function(x):
        return f"{x.strip()!r:>{len(x)}} {x.upper()}"

    texts = {name: op.text for name, op in analyse(function).operations.items()}
    assert texts == {"x_strip_0": "x.strip()", "len_0": "len(x)", "x_upper_0": "x.upper()"}


@pytest.mark.parametrize("name", ["self_c_prj_0", "nothing_like_it_3"])
def test_an_unknown_operation_names_those_there_are(gpt2_small, name):
    with pytest.raises(SourceError, match=f"GPT2Attention.forward has no operation {name}; it has .*self_c_proj_0"):
        analyse(gpt2_small.transformer.h[0].attn).find(name)
