"""Places that have passed, that never come, or that are assigned what cannot stand there."""

import pytest
import torch

from nnsight.errors import EditError, NeverRanError, OutOfOrderError, SourceError, StoppedError, UnknownPathError

pytestmark = pytest.mark.timeout(10, func_only=True)

MOVE_UP = "Move that line up"
STOPPED = r"tracer\.stop\(\) has ended this block's part.*read what you need before it"


def test_an_assignment_after_its_place(model, x, refused):
    with refused(OutOfOrderError, rf"model\.first\.output was asked for at line \d+ of test_order.py.*{MOVE_UP}"):
        with model.trace(x):
            model.last.output
            model.first.output = x


def test_an_input_assigned_after_its_place(model, x, refused):
    with refused(OutOfOrderError, MOVE_UP):
        with model.trace(x):
            model.middle.output
            model.middle.input = x


def test_an_edit_in_place_after_its_place(model, x, refused):
    with refused(OutOfOrderError, rf"the value read at model\.first was changed in place since.*{MOVE_UP}"):
        with model.trace(x):
            hidden = model.first.output
            model.last.output
            hidden[:] = 0
            model.middle.output


def test_strict_order(model, x, refused):
    with refused(OutOfOrderError, f"Strict order is on.*{MOVE_UP}"):
        with model.trace(x, strict_order=True):
            model.last.output
            model.first.output


def test_a_generation_read_out_of_order(lm, refused):
    with refused(OutOfOrderError, f"a generation is not run a second time.*{MOVE_UP}"):
        with lm.generate([[1, 2]], max_new_tokens=2) as tracer:
            for _ in tracer.iter[:]:
                lm.lm_head.output
                lm.transformer.wte.output


@pytest.mark.parametrize(
    "ask",
    [
        lambda envoy, x: envoy.output,
        lambda envoy, x: envoy.input,
        lambda envoy, x: setattr(envoy, "output", x),
        lambda envoy, x: setattr(envoy, "input", x),
        lambda envoy, x: envoy.skip(x),
    ],
    ids=["output", "input", "set output", "set input", "skip"],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_module_that_never_runs(model, x, refused, ask, warm):
    if warm:
        with model.trace(x):
            pass
    with refused(
        NeverRanError, r"model\.unused\.\w+ was asked for at line \d+.*the model never calls it.*Print the model"
    ):
        with model.trace(x):
            ask(model.unused, x)


def test_a_call_that_never_comes(model, x, refused):
    with refused(NeverRanError, "does not run 2 times in this forward pass"):
        with model.trace(x):
            model.first.next().output


@pytest.mark.parametrize("place", ["streamer", "generator"])
def test_what_only_a_generation_has(lm, refused, place):
    with refused(NeverRanError, "does not run in this forward pass"):
        with lm.trace([[1, 2]]):
            lm.generator.streamer.output if place == "streamer" else lm.generator.output


# --- skips -------------------------------------------------------------------------------------------------


def test_a_skip_after_the_call(model, x, refused):
    with refused(OutOfOrderError, rf"model\.middle\.input was asked for.*{MOVE_UP}"):
        with model.trace(x):
            model.middle.output
            model.middle.skip(x)


def test_a_value_inside_a_skipped_module(model, x, refused):
    with refused(
        NeverRanError, r"inside a module that is skipped.*assign to the outer module's \.output in place of \.skip"
    ):
        with model.trace(x):
            model.middle.skip(x)
            model.middle[0].output


def test_a_skip_with_what_the_next_module_cannot_take_is_its_own_error(model, x):
    with pytest.raises(TypeError, match="must be Tensor, not str"):
        with model.trace(x):
            model.middle.skip("no")


def test_a_skip_of_other_rows_in_a_batch(model, x, refused):
    with refused(EditError, r"model\.middle \(skipped\) was assigned a tensor of shape \[7, 7\].*have \[2, 4\]"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.middle.skip(torch.ones(7, 7))
            with tracer.invoke(x):
                pass


# --- what is assigned --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [torch.ones(3), 3, ((),), (torch.ones(3), torch.ones(3)), ((torch.ones(2),), 3)], ids=repr
)
def test_inputs_that_are_not_a_pair(model, x, refused, given):
    with refused(
        EditError, r"model\.first\.inputs is \(args, kwargs\).*The first argument alone is model\.first\.input"
    ):
        with model.trace(x):
            model.first.inputs = given


@pytest.mark.parametrize("value", [None, torch.ones(1), torch.ones(2, 4).long()], ids=["None", "shape", "dtype"])
def test_what_the_next_module_cannot_take_is_its_own_error(model, x, value):
    with pytest.raises((TypeError, RuntimeError)) as caught:
        with model.trace(x):
            model.first.output = value
    if hasattr(caught.value, "__notes__"):
        assert "line" in caught.value.__notes__[0]
        assert "assigned model.first.output" in caught.value.__notes__[0]


def test_rows_of_another_shape(model, x, refused):
    with refused(
        EditError,
        r"assigned a tensor of shape \[3, 9\]; the rows of this invoke have \[2, 4\]",
    ):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.first.output = torch.ones(3, 9)
            with tracer.invoke(x):
                pass


def test_a_result_is_not_assigned(model, x):
    with pytest.raises(AttributeError, match="result"):
        with model.trace(x) as tracer:
            tracer.result = x


def test_a_tuple_of_another_length(model, x, refused):
    with refused(EditError, "assign a whole tuple"):
        with model.trace(x):
            inputs = model.first.source.F_linear_0.inputs
            model.first.source.F_linear_0.inputs = inputs
            inputs[0]
            from nnsight._core import as_assignable

            as_assignable((1, 2), lambda value: None)[0:1] = (1, 2, 3)


# --- stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["read", "write", "result", "wait", "skip"])
def test_after_a_stop(model, x, refused, ask):
    with refused(StoppedError, STOPPED):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                model.first.output
                tracer.stop()
                if ask == "read":
                    model.last.output
                elif ask == "write":
                    model.last.output = x
                elif ask == "result":
                    tracer.result
                elif ask == "skip":
                    model.last.skip(x)
                else:
                    barrier()
            with tracer.invoke(x):
                model.last.output


def test_a_stop_is_final(model, x, refused):
    with model.trace(x) as tracer:
        hidden = model.first.output
        tracer.stop()
        tracer.stop()
        with refused(StoppedError, STOPPED):
            model.last.output
    assert torch.equal(hidden, model.first(x))


# --- sources -----------------------------------------------------------------------------------------------


def test_an_operation_that_does_not_exist(model, x, refused):
    with refused(UnknownPathError, "has no operation 'nope'. Its operations are: self_first_0"):
        model.source.nope
    with refused(UnknownPathError, "has no operation 'nope'. Its operations are: self_first_0"):
        with model.trace(x):
            model.source.nope.output


def test_the_source_of_what_is_a_module(model, refused):
    with refused(SourceError, r"self_first_0 calls a module: its operations are at model\.first\.source"):
        model.source.self_first_0.source


def test_an_operation_assigned_too_late(model, x, refused):
    with refused(OutOfOrderError, "Naming model.source before model starts"):
        with model.trace(x):
            model.last.output
            model.source.self_first_0.output = x


def test_a_forward_without_source(refused, x):
    from nnsight import NNsight

    space = {}
    exec("import torch\nclass E(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n", space)
    with refused(SourceError, "has no Python source that can be read.*its inputs and output are still available"):
        NNsight(space["E"]()).source
