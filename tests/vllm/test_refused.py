"""What an engine cannot do is refused by name, for every model."""

import pytest

from nnsight.errors import EditError, GradientError, InputError, NamesError, OutOfOrderError, SourceError

PROMPT = "The Eiffel Tower is in the city of"


def test_heads(pair):
    model = pair.engine
    with pytest.raises(NamesError, match="inside vLLM's kernels"), model.trace(PROMPT):
        model.heads[1].z.save()


def test_neurons(pair):
    model = pair.engine
    with pytest.raises(NamesError, match="inside vLLM's kernels"), model.trace(PROMPT):
        model.neurons[1].save()


def test_operations(pair):
    model = pair.engine
    with pytest.raises(SourceError, match="of all requests"), model.trace(PROMPT):
        model.layers[1].source


def test_gradients(pair):
    model = pair.engine
    with pytest.raises(GradientError), model.trace(PROMPT):
        model.logits.sum().backward()


def test_reads_of_what_has_passed(pair):
    model = pair.engine
    with pytest.raises(OutOfOrderError, match="Move that line up"), model.trace(PROMPT):
        model.resid_post[1]
        model.resid_post[0].save()


def test_the_batch_of_all_prompts(pair):
    model = pair.engine
    with pytest.raises(InputError, match="no batch of all invokes"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            model.logits
        with tracer.invoke():
            model.logits


def test_changes_in_place_of_what_goes_on_beside_a_norm(pair):
    model = pair.engine
    with pytest.raises(EditError, match="goes on with beside it"), model.trace(PROMPT):
        model.resid_mid[1][:] = 0
        model.logits


def test_assigning_the_stream_between_attention_and_mlp(pair):
    model = pair.engine
    with pytest.raises(EditError, match="change attn_out"), model.trace(PROMPT):
        model.resid_mid[1] = model.resid_mid[1] * 2


def test_changes_in_place_after_the_model_has_gone_on(pair):
    model = pair.engine
    with pytest.raises(OutOfOrderError, match=r"value\.clone\(\)"), model.trace(PROMPT):
        stream = model.resid_post[0]
        model.resid_post[1]
        stream[:] = 0
        model.logits
