"""Document 003, snippet by snippet, as printed."""
# fmt: off
# ruff: noqa: C408

import itertools

import pytest
import torch
from torch.testing import assert_close

from nnsight import LanguageModel
from nnsight.errors import OutOfOrderWarning


@pytest.fixture
def prompt():
    return "The Eiffel Tower is in the city of"


def zeros(hidden):
    return torch.zeros_like(hidden)


def test_loading_language_models(hub_cache, plain):
    from nnsight import LanguageModel

    model = LanguageModel("openai-community/gpt2", device_map="auto", dispatch=True)

    assert type(model._model).__name__ == "GPT2LMHeadModel"
    assert not any(parameter.is_meta for parameter in model._model.parameters())
    with model.trace("Hello"):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, plain(model).run("Hello").logits)


def test_loading_any_pytorch_model():
    your_pytorch_model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))

    from nnsight import NNsight

    model = NNsight(your_pytorch_model)

    given = torch.randn(2, 3)
    with model.trace(given):
        hidden = model[1].output.save()
        output = model.output.save()
    assert model._model is your_pytorch_model
    assert torch.equal(hidden, your_pytorch_model[:2](given))
    assert torch.equal(output, your_pytorch_model(given))


def test_tracing_context(model, plain, capsys):
    with model.trace("The Eiffel Tower is in"):
        # Access any layer's output
        hidden_states = model.transformer.h[5].output[0].save()

        # Access final logits
        logits = model.lm_head.output.save()

    # Values available after tracing
    print(hidden_states.value.shape)

    reference = plain(model)
    expected = reference.run("The Eiffel Tower is in")
    assert torch.equal(hidden_states, expected["transformer.h.5"])
    assert torch.equal(logits, expected.logits)
    shape = [1, reference.length("The Eiffel Tower is in"), model.config.n_embd]
    assert capsys.readouterr().out == f"torch.Size({shape})\n"


def test_accessing_module_values(model, plain, prompt, recwarn):
    with model.trace(prompt):
        layer_output = model.transformer.h[0].output[0].save()
        layer_input = model.transformer.h[0].input[0].save()
        attn_output = model.transformer.h[0].attn.output[0].save()

    expected = plain(model).run(prompt)
    assert torch.equal(layer_output, expected["transformer.h.0"])
    # `.input` is the first positional argument, the hidden states: [0] is the first row.
    assert torch.equal(layer_input, expected.inputs["transformer.h.0"][0][0])
    assert_close(attn_output, expected["transformer.h.0.attn"])
    # The attention is read after its layer.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def test_saving_values(model, plain, prompt):
    with model.trace(prompt):
        # Call .save() on the proxy to persist it outside the trace
        output = model.transformer.h[0].output[0].save()

    assert torch.equal(output, plain(model).run(prompt)["transformer.h.0"])


def test_value_of_a_saved_value(model, plain, prompt, capsys):
    with model.trace(prompt):
        output = model.transformer.h[0].output[0].save()

    print(output.value.shape)  # Access the saved tensor

    assert output.value is output
    shape = [1, plain(model).length(prompt), model.config.n_embd]
    assert capsys.readouterr().out == f"torch.Size({shape})\n"


def test_zero_out_activations(model, plain, prompt):
    reference = plain(model)
    with reference.watching("transformer.h.6") as seen:
        with model.trace(prompt):
            model.transformer.h[5].output[0][:, :, :] = 0
            output = model.lm_head.output.save()

    assert not seen.inputs["transformer.h.6"][0].any()
    assert_close(output, reference.run(prompt, edits={"transformer.h.5": zeros}).logits)


def test_add_noise(model, plain, prompt):
    reference = plain(model)
    with reference.watching("transformer.h.6", "lm_head") as seen:
        with model.trace(prompt):
            noise = 0.1 * torch.randn_like(model.transformer.h[5].output[0])
            model.transformer.h[5].output[0] = model.transformer.h[5].output[0] + noise

    clean = reference.run(prompt)["transformer.h.5"]
    assert noise.shape == clean.shape
    assert noise.any()
    assert torch.equal(seen.inputs["transformer.h.6"][0], clean + noise)
    edits = {"transformer.h.5": lambda hidden: hidden + noise}
    assert_close(seen.logits, reference.run(prompt, edits=edits).logits)


def test_replace_with_custom_values(model, plain, prompt):
    my_custom_vector = torch.randn(model.config.n_embd)
    reference = plain(model)
    with reference.watching("lm_head") as seen:
        with model.trace(prompt):
            model.transformer.h[5].output[0][:, -1, :] = my_custom_vector

    def replace(hidden):
        hidden[:, -1] = my_custom_vector
        return hidden

    expected = reference.run(prompt, edits={"transformer.h.5": replace}).logits
    assert_close(seen.logits, expected)
    assert not torch.allclose(expected, reference.run(prompt).logits)


def test_batched_processing_with_invokers(model, plain, capsys):
    with model.trace() as tracer:
        with tracer.invoke("First prompt"):
            first_output = model.lm_head.output.save()

        with tracer.invoke("Second prompt"):
            second_output = model.lm_head.output.save()

    # Access results
    print(first_output.value.shape, second_output.value.shape)

    reference = plain(model)
    for output, prompt in ((first_output, "First prompt"), (second_output, "Second prompt")):
        alone = reference.run(prompt).logits
        assert_close(output[:, -alone.shape[1] :], alone)
    size = max(map(reference.length, ("First prompt", "Second prompt")))
    shape = f"torch.Size([1, {size}, {model.config.vocab_size}])"
    assert capsys.readouterr().out == f"{shape} {shape}\n"


def test_cross_prompt_interventions(model, plain):
    with model.trace() as tracer:
        # Create barrier for 2 participating invokes
        barrier = tracer.barrier(2)

        with tracer.invoke("The Eiffel Tower is in"):
            embeddings = model.transformer.wte.output
            barrier()  # Signal: value captured

        with tracer.invoke("_ _ _ _ _ _ _"):
            barrier()  # Wait for value from previous invoke
            model.transformer.wte.output = embeddings  # Use captured value
            output = model.lm_head.output.save()

    def share(embedded):
        embedded[1] = embedded[0]
        return embedded

    reference = plain(model)
    prompts = ("The Eiffel Tower is in", "_ _ _ _ _ _ _")
    assert_close(output, reference.run(*prompts, edits={"transformer.wte": share}).logits[1:])
    assert not torch.allclose(output[:, -1], reference.run(prompts[1]).logits[:, -1], atol=1e-2)


def test_multi_token_generation(model, plain, capsys):
    with model.generate("Hello", max_new_tokens=5) as tracer:
        # Get the full generated output
        output = model.generator.output.save()

    # Decode the generated tokens
    print(model.tokenizer.decode(output[0]))

    expected, _ = plain(model).generate("Hello", max_new_tokens=5)
    assert torch.equal(output, expected)
    assert capsys.readouterr().out == f"{model.tokenizer.decode(expected[0])}\n"


def test_interventions_in_all_generation_steps(endless, plain):
    model = endless
    reference = plain(model)
    with reference.watching("lm_head") as seen:
        with model.generate("Hello", max_new_tokens=5) as tracer:
            hidden_states = list().save()

            with tracer.all():  # Apply to ALL generation iterations
                # Intervention applied at each step
                model.transformer.h[5].output[0][:, -1, :] *= 0.9
                hidden_states.append(model.transformer.h[-1].output)

    def weaken(hidden):
        hidden[:, -1] *= 0.9
        return hidden

    _, expected = reference.generate("Hello", max_new_tokens=5, edits={"transformer.h.5": weaken})
    assert len(hidden_states) == 5
    for hidden, step in zip(hidden_states, expected.outputs["transformer.h.11"], strict=True):
        assert_close(hidden[0], step)
    for logits, step in zip(seen.outputs["lm_head"], expected.outputs["lm_head"], strict=True):
        assert_close(logits, step)


def test_interventions_in_specific_iterations(endless, plain):
    model = endless
    reference = plain(model)
    with reference.watching("transformer.h.6", "lm_head") as seen:
        with model.generate("Hello", max_new_tokens=10) as tracer:
            with tracer.iter[2:5]:  # Only iterations 2, 3, 4
                model.transformer.h[5].output[0][:] = 0

    step = itertools.count()
    edits = {"transformer.h.5": lambda hidden: zeros(hidden) if next(step) in (2, 3, 4) else hidden}
    _, expected = reference.generate("Hello", max_new_tokens=10, edits=edits)
    empty = [not hidden.any() for hidden in seen.inputs["transformer.h.6"]]
    assert empty == [False] * 2 + [True] * 3 + [False] * 5
    for logits, other in zip(seen.outputs["lm_head"], expected.outputs["lm_head"], strict=True):
        assert_close(logits, other)


def test_gradient_access(model, plain, prompt):
    with model.trace(prompt):
        # Register intermediate values in forward order
        hidden = model.transformer.h[-1].output[0]
        hidden.requires_grad = True  # Enable gradient flow

        logits = model.lm_head.output

        # Enter backward context
        with logits.sum().backward():
            # Access gradients in REVERSE order
            logits_grad = logits.grad.save()
            hidden_grad = hidden.grad.save()

    source, expected = plain(model).graph(prompt, "transformer.h.11")
    assert torch.equal(logits_grad, torch.ones_like(expected))
    assert_close(hidden_grad, torch.autograd.grad(expected.sum(), source)[0])


def test_retained_gradients(model, plain, prompt, capsys):
    with model.trace(prompt):
        hidden = model.transformer.h[-1].output[0].save()
        hidden.retain_grad()

        logits = model.lm_head.output.save()
        logits.sum().backward()

    # Access gradient after trace
    print(hidden.grad)
    model._model.zero_grad(set_to_none=True)

    source, expected = plain(model).graph(prompt, "transformer.h.11")
    assert_close(hidden.grad, torch.autograd.grad(expected.sum(), source)[0])
    assert capsys.readouterr().out == f"{hidden.grad}\n"


def test_early_stopping(model, plain, prompt):
    reference = plain(model)
    with reference.watching() as seen:
        with model.trace(prompt) as tracer:
            early_hidden = model.transformer.h[3].output[0].save()
            tracer.stop()  # Skip layers 4+

    assert torch.equal(early_hidden, reference.run(prompt)["transformer.h.3"])
    assert seen.outputs["transformer.h.2"]
    assert not seen.outputs.keys() & {"transformer.h.4", "transformer.h.11", "transformer.ln_f", "lm_head"}


def test_shape_inference(model, plain, prompt):
    reference = plain(model)
    with reference.watching() as seen:
        with model.scan(prompt):
            shape = model.transformer.h[0].output[0].shape.save()

    assert shape == (1, reference.length(prompt), model.config.n_embd)
    computed = [value for values in seen.outputs.values() for value in values]
    assert not any(type(value) is torch.Tensor and not value.is_meta for value in computed)


def test_cache_of_all_module_outputs(model, plain, prompt):
    with model.trace(prompt) as tracer:
        cache = tracer.cache()  # Stores all outputs

    expected = plain(model).run(prompt)
    assert torch.equal(cache.model.lm_head.output, expected.logits)
    for i in range(model.config.n_layer):
        path = f"transformer.h.{i}"
        assert torch.equal(cache.model.transformer.h[i].output[0], expected[path])
        assert torch.equal(cache[f"model.{path}.attn"].output[0], expected[f"{path}.attn"])
        assert torch.equal(cache[f"model.{path}.mlp"].output, expected[f"{path}.mlp"])


def test_remote_execution(server, plain):
    from nnsight import CONFIG
    CONFIG.set_default_api_key("YOUR_NDIF_API_KEY")

    model = LanguageModel("meta-llama/Llama-3.1-70B")

    with model.trace("Hello", remote=True):
        hidden = model.model.layers[-1].output[0].save()

    assert not model.dispatched
    assert hidden.shape == (1, len(model.tokenizer("Hello")["input_ids"]), model.config.hidden_size)
    assert torch.equal(hidden, plain(model).run("Hello")["model.layers.47"])


def test_key_for_remote_execution(keys):
    from nnsight import CONFIG
    CONFIG.set_default_api_key("YOUR_NDIF_API_KEY")

    assert CONFIG.API_KEY == "YOUR_NDIF_API_KEY"
