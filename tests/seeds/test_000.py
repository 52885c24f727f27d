"""Document 000, snippet by snippet, as printed."""
# fmt: off
# ruff: noqa: C408, I001

import itertools

import pytest
import torch
from torch.testing import assert_close

import nnsight
from nnsight import LanguageModel
from nnsight.errors import OutOfOrderError

EIFFEL = "The Eiffel Tower is in the city of"


def zeros(hidden):
    return torch.zeros_like(hidden)


def test_quick_start(hub_cache, plain, capsys):
    from nnsight import LanguageModel

    model = LanguageModel('openai-community/gpt2', device_map='auto', dispatch=True)

    with model.trace('The Eiffel Tower is in the city of'):
        # Intervene on activations (must access in execution order!)
        model.transformer.h[0].output[0][:] = 0

        # Access and save hidden states from a later layer
        hidden_states = model.transformer.h[-1].output[0].save()

        # Get model output
        output = model.output.save()

    print(model.tokenizer.decode(output.logits.argmax(dim=-1)[0]))

    printed = capsys.readouterr().out.removesuffix("\n")
    expected = plain(model).run(EIFFEL, edits={"transformer.h.0": zeros})
    assert_close(hidden_states, expected["transformer.h.11"])
    assert_close(output.logits, expected.logits)
    assert printed == model.tokenizer.decode(expected.logits.argmax(-1)[0])
    assert not torch.equal(output.logits, plain(model).run(EIFFEL).logits)


def test_save_function(model, plain):
    with model.trace(EIFFEL):
        value = model.transformer.h[3].output[0]
        saved = nnsight.save(value)

    assert_close(saved, plain(model).run(EIFFEL)["transformer.h.3"])


def test_accessing_activations(model, plain):
    with model.trace("The Eiffel Tower is in the city of"):
        # Access attention output
        attn_output = model.transformer.h[0].attn.output[0].save()

        # Access MLP output
        mlp_output = model.transformer.h[0].mlp.output.save()

        # Access any layer's output (access in execution order)
        layer_output = model.transformer.h[5].output[0].save()

        # Access final logits
        logits = model.lm_head.output.save()

    expected = plain(model).run(EIFFEL)
    assert torch.equal(attn_output, expected["transformer.h.0.attn"])
    assert torch.equal(mlp_output, expected["transformer.h.0.mlp"])
    assert torch.equal(layer_output, expected["transformer.h.5"])
    assert torch.equal(logits, expected.logits)


def test_in_place_modification(model, plain):
    reference = plain(model)
    with reference.watching("transformer.h.1", "lm_head") as seen:
        with model.trace("Hello"):
            # Zero out all activations
            model.transformer.h[0].output[0][:] = 0

            # Modify specific positions
            model.transformer.h[0].output[0][:, -1, :] = 0  # Last token only

    assert seen.inputs["transformer.h.1"][0].shape == (1, reference.length("Hello"), model.config.n_embd)
    assert not seen.inputs["transformer.h.1"][0].any()
    assert_close(seen.logits, reference.run("Hello", edits={"transformer.h.0": zeros}).logits)


def test_in_place_modification_of_the_last_token(model, plain):
    reference = plain(model)
    with reference.watching("transformer.h.1", "lm_head") as seen:
        with model.trace(EIFFEL):
            model.transformer.h[0].output[0][:, -1, :] = 0  # Last token only

    def last(hidden):
        hidden[:, -1] = 0
        return hidden

    expected = reference.run(EIFFEL, edits={"transformer.h.0": last})
    assert torch.equal(seen.inputs["transformer.h.1"][0], expected["transformer.h.0"])
    assert_close(seen.logits, expected.logits)


def test_replacement(model, plain):
    reference = plain(model)
    with reference.watching("lm_head") as seen:
        with model.trace("Hello"):
            # Add noise to activations
            hs = model.transformer.h[-1].mlp.output.clone()
            noise = 0.01 * torch.randn(hs.shape)
            model.transformer.h[-1].mlp.output = hs + noise

            result = model.transformer.h[-1].mlp.output.save()

    assert torch.equal(hs, reference.run("Hello")["transformer.h.11.mlp"])
    assert torch.equal(result, hs + noise)
    edits = {"transformer.h.11.mlp": lambda hidden: hidden + noise}
    assert_close(seen.logits, reference.run("Hello", edits=edits).logits)


def test_batching_with_invokers(model, plain):
    with model.trace() as tracer:
        # First invoke: worker thread 1
        with tracer.invoke("The Eiffel Tower is in"):
            embeddings = model.transformer.wte.output  # Thread waits here
            output1 = model.lm_head.output.save()

        # Second invoke: worker thread 2 (runs after thread 1 completes)
        with tracer.invoke("_ _ _ _ _ _"):
            model.transformer.wte.output = embeddings  # Uses value from thread 1
            output2 = model.lm_head.output.save()

    def share(embedded):
        embedded[1] = embedded[0]
        return embedded

    reference = plain(model)
    expected = reference.run("The Eiffel Tower is in", "_ _ _ _ _ _", edits={"transformer.wte": share}).logits
    assert_close(output1, expected[:1])
    assert_close(output2, expected[1:])
    alone = reference.run("The Eiffel Tower is in").logits
    assert_close(output1[:, -alone.shape[1] :], alone)
    unpatched = reference.run("_ _ _ _ _ _").logits
    assert not torch.allclose(output2[:, -1], unpatched[:, -1], atol=1e-2)


def test_promptless_invokers(model, plain):
    with model.trace() as tracer:
        with tracer.invoke("Hello"):
            out1 = model.lm_head.output[:, -1].save()

        with tracer.invoke(["World", "Test"]):
            out2 = model.lm_head.output[:, -1].save()

        # No-arg invoke: operates on ALL 3 inputs
        with tracer.invoke():
            out_all = model.lm_head.output[:, -1].save()  # Shape: [3, vocab]

    assert out1.shape == (1, model.config.vocab_size)
    assert out2.shape == (2, model.config.vocab_size)
    assert out_all.shape == (3, model.config.vocab_size)
    assert torch.equal(out_all, torch.cat([out1, out2]))
    alone = [plain(model).run(prompt).logits[:, -1] for prompt in ("Hello", "World", "Test")]
    assert_close(out_all, torch.cat(alone))


def test_multi_token_generation(model, plain, capsys):
    with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
        output = model.generator.output.save()

    print(model.tokenizer.decode(output[0]))
    # "The Eiffel Tower is in the city of Paris"

    printed = capsys.readouterr().out.removesuffix("\n")
    reference = plain(model)
    expected, _ = reference.generate("The Eiffel Tower is in", max_new_tokens=3)
    assert torch.equal(output, expected)
    assert printed == "The Eiffel Tower is in the city of"

    # " the city of Paris" is four tokens, one more than the snippet asks for.
    with model.generate("The Eiffel Tower is in", max_new_tokens=4) as tracer:
        output = model.generator.output.save()
    assert model.tokenizer.decode(output[0]) == "The Eiffel Tower is in the city of Paris"


def test_iterating_over_generation_steps(endless, plain, capsys):
    model = endless
    with model.generate("Hello", max_new_tokens=5) as tracer:
        logits = list().save()

        # Iterate over all generation steps
        with tracer.iter[:]:
            logits.append(model.lm_head.output[0][-1].argmax(dim=-1))

    print(model.tokenizer.batch_decode(logits))

    printed = capsys.readouterr().out
    ids, _ = plain(model).generate("Hello", max_new_tokens=5)
    new = ids[0, -5:]
    assert [token.item() for token in logits] == new.tolist()
    assert printed == f"{model.tokenizer.batch_decode(list(new))}\n"


def test_conditional_interventions_per_step(endless, plain):
    model = endless
    with model.generate("Hello", max_new_tokens=5) as tracer:
        outputs = list().save()

        with tracer.iter[:] as step_idx:
            if step_idx == 2:
                model.transformer.h[0].output[0][:] = 0  # Only on step 2

            outputs.append(model.transformer.h[-1].output[0])

    step = itertools.count()
    edits = {"transformer.h.0": lambda hidden: zeros(hidden) if next(step) == 2 else hidden}
    _, expected = plain(model).generate("Hello", max_new_tokens=5, edits=edits)
    assert len(outputs) == len(expected.outputs["transformer.h.11"]) == 5
    for output, hidden in zip(outputs, expected.outputs["transformer.h.11"], strict=True):
        assert_close(output, hidden)
    assert torch.equal(expected.outputs["transformer.h.0"][2], torch.zeros(1, 1, model.config.n_embd))


def test_after_the_iteration(endless, plain):
    model = endless
    with model.generate("Hello", max_new_tokens=3) as tracer:
        with tracer.invoke():  # First invoker
            with tracer.iter[:]:
                hidden = model.transformer.h[-1].output.save()
        with tracer.invoke():  # Second invoker - runs after
            final = model.output.save()  # Now works!

    _, expected = plain(model).generate("Hello", max_new_tokens=3)
    assert_close(hidden[0], expected.outputs["transformer.h.11"][-1])
    assert_close(final.logits, expected.outputs[""][0])


def test_code_after_the_iteration_runs(endless, plain):
    model = endless
    with model.generate("Hello", max_new_tokens=3) as tracer:
        steps = list().save()
        with tracer.iter[:] as step:
            steps.append(step)
        ids = tracer.result.save()

    assert steps == [0, 1, 2]
    assert torch.equal(ids, plain(model).generate("Hello", max_new_tokens=3)[0])


def test_gradients(model, plain, capsys):
    with model.trace("Hello"):
        hs = model.transformer.h[-1].output[0]
        hs.requires_grad_(True)

        logits = model.lm_head.output
        loss = logits.sum()

        with loss.backward():
            grad = hs.grad.save()

    print(grad.shape)

    reference = plain(model)
    hidden, expected = reference.graph("Hello", "transformer.h.11")
    assert_close(grad, torch.autograd.grad(expected.sum(), hidden)[0])
    assert grad.abs().max() > 0
    assert capsys.readouterr().out == f"torch.Size([1, {reference.length('Hello')}, {model.config.n_embd}])\n"


def test_model_editing(model, plain):
    # Create edited model (non-destructive)
    with model.edit() as model_edited:
        model.transformer.h[0].output[0][:] = 0

    # Original model unchanged
    with model.trace("Hello"):
        out1 = model.transformer.h[0].output[0].save()

    # Edited model has modification
    with model_edited.trace("Hello"):
        out2 = model_edited.transformer.h[0].output[0].save()

    assert not torch.all(out1 == 0)
    assert torch.all(out2 == 0)

    reference = plain(model)
    assert torch.equal(out1, reference.run("Hello")["transformer.h.0"])
    assert out2.shape == out1.shape
    with model_edited.trace(EIFFEL):
        logits = model_edited.lm_head.output.save()
    assert_close(logits, reference.run(EIFFEL, edits={"transformer.h.0": zeros}).logits)
    assert model_edited._model is model._model


def test_scanning(model, plain, capsys):
    with plain(model).watching("transformer.h.0.mlp.c_fc", "lm_head") as seen:
        with model.scan("Hello"):
            dim = model.transformer.h[0].output[0].shape[-1]

    print(dim)  # 768

    assert dim == model.config.n_embd
    assert capsys.readouterr().out == f"{model.config.n_embd}\n"
    # Nothing real was computed.
    computed = [value for values in seen.outputs.values() for value in values]
    assert not any(type(value) is torch.Tensor and not value.is_meta for value in computed)


def test_caching_activations(model, plain, capsys):
    with model.trace("Hello") as tracer:
        cache = tracer.cache()

    # Access cached values
    layer0_out = cache['model.transformer.h.0'].output
    print(cache.model.transformer.h[0].output[0].shape)

    reference = plain(model)
    expected = reference.run("Hello")
    assert torch.equal(layer0_out[0], expected["transformer.h.0"])
    assert torch.equal(cache.model.transformer.h[0].output[0], expected["transformer.h.0"])
    assert torch.equal(cache["model.transformer.h.7.mlp"].output, expected["transformer.h.7.mlp"])
    assert torch.equal(cache.model.lm_head.output, expected.logits)
    assert capsys.readouterr().out == f"torch.Size([1, {reference.length('Hello')}, {model.config.n_embd}])\n"


def test_sessions(model, plain):
    reference = plain(model)
    assert reference.length("Hello") == reference.length("World")
    with reference.watching("lm_head") as seen:
        with model.session() as session:
            with model.trace("Hello"):
                hs1 = model.transformer.h[0].output[0].save()

            with model.trace("World"):
                model.transformer.h[0].output[0][:] = hs1  # Use value from first trace
                hs2 = model.transformer.h[0].output[0].save()

    expected = reference.run("Hello")
    assert torch.equal(hs1, expected["transformer.h.0"])
    assert torch.equal(hs2, hs1)
    patched = reference.run("World", edits={"transformer.h.0": lambda _: expected["transformer.h.0"]}).logits
    first, second = seen.outputs["lm_head"]
    assert_close(first, expected.logits)
    assert_close(second, patched)


def test_remote_execution(server, plain):
    from nnsight import CONFIG
    CONFIG.set_default_api_key("YOUR_API_KEY")

    model = LanguageModel("meta-llama/Meta-Llama-3.1-8B")

    with model.trace("Hello", remote=True):
        hidden_states = model.model.layers[-1].output.save()

    assert not model.dispatched
    assert hidden_states.shape == (1, len(model.tokenizer("Hello")["input_ids"]), model.config.hidden_size)
    assert torch.equal(hidden_states, plain(model).run("Hello")["model.layers.47"])


def test_key_for_remote_execution(keys):
    from nnsight import CONFIG
    CONFIG.set_default_api_key("YOUR_API_KEY")

    assert CONFIG.API_KEY == "YOUR_API_KEY"


@pytest.mark.skip(reason="run on a real engine by tests/vllm (make test-vllm)")
def test_vllm_integration(hub_cache):
    from nnsight.modeling.vllm import VLLM

    model = VLLM("gpt2", tensor_parallel_size=1, dispatch=True)

    with model.trace("Hello", temperature=0.0, max_tokens=5) as tracer:
        logits = list().save()

        with tracer.iter[:]:
            logits.append(model.logits.output)

    assert 1 <= len(logits) <= 5
    assert all(torch.isfinite(step).all() for step in logits)


def test_any_pytorch_model():
    from nnsight import NNsight
    import torch

    net = torch.nn.Sequential(
        torch.nn.Linear(5, 10),
        torch.nn.Linear(10, 2)
    )

    model = NNsight(net)

    with model.trace(torch.rand(1, 5)):
        layer1_out = model[0].output.save()
        output = model.output.save()

    assert layer1_out.shape == (1, 10)
    assert output.shape == (1, 2)
    assert torch.equal(output, net[1](layer1_out))
    given = torch.rand(1, 5)
    with model.trace(given):
        output = model.output.save()
    assert torch.equal(output, net(given))


def test_source_tracing(model, plain, capsys):
    # Discover available operations
    print(model.transformer.h[0].attn.source)
    # Shows forward method with operation names like:
    #   attention_interface_0 -> 66  attn_output, attn_weights = attention_interface(...)
    #   self_c_proj_0         -> 79  attn_output = self.c_proj(attn_output)

    # Access operation values
    with model.trace("Hello"):
        attn_out = model.transformer.h[0].attn.source.attention_interface_0.output.save()

    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert any(line[:2] == ["attention_interface_0", "->"] and line[2].isdigit() for line in lines)
    assert any(line[:2] == ["self_c_proj_0", "->"] and "self.c_proj(attn_output)" in line for line in lines)
    # What the attention function gives is what the projection behind it gets.
    projected = plain(model).run("Hello").inputs["transformer.h.0.attn.c_proj"][0]
    assert torch.equal(attn_out[0].reshape(projected.shape), projected)


def test_ad_hoc_module_application(model, plain, capsys):
    with model.trace("The Eiffel Tower is in the city of"):
        # Get intermediate hidden states
        hidden_states = model.transformer.h[-1].output[0]

        # Apply lm_head to get "logit lens" view
        logits = model.lm_head(model.transformer.ln_f(hidden_states))
        tokens = logits.argmax(dim=-1).save()

    print(model.tokenizer.decode(tokens[0]))

    expected = plain(model).run(EIFFEL).logits
    assert torch.equal(logits, expected)
    assert torch.equal(tokens, expected.argmax(-1))
    assert capsys.readouterr().out == f"{model.tokenizer.decode(expected.argmax(-1)[0])}\n"


def test_ad_hoc_application_in_the_middle_of_the_model(model, plain):
    with model.trace(EIFFEL):
        lens = model.lm_head(model.transformer.ln_f(model.transformer.h[4].output[0])).save()
        logits = model.lm_head.output.save()

    reference = plain(model)
    expected = reference.run(EIFFEL)
    with torch.no_grad():
        through = reference.module.lm_head(reference.module.transformer.ln_f(expected["transformer.h.4"]))
    assert_close(lens, through)
    assert torch.equal(logits, expected.logits)


def test_deferred_execution(model, plain, capsys):
    with model.trace("Hello"):
        # Code runs in a worker thread
        # Thread WAITS here until layer output is available
        hs = model.transformer.h[-1].output[0]

        # .save() marks the value to persist after the context exits
        hs = hs.save()
        # Alternative: hs = nnsight.save(hs)

    # After exiting, hs contains the actual tensor
    print(hs.shape)  # torch.Size([1, 2, 768])

    reference = plain(model)
    assert isinstance(hs, torch.Tensor)
    assert torch.equal(hs, reference.run("Hello")["transformer.h.11"])
    assert capsys.readouterr().out == f"torch.Size([1, {reference.length('Hello')}, {model.config.n_embd}])\n"


def test_key_properties(model, plain):
    # | .output | Module's forward pass output |, | .input | First positional argument to the module |,
    # | .inputs | All inputs as (args_tuple, kwargs_dict) |
    mlp = model.transformer.h[2].mlp
    with model.trace("Hello"):
        given = mlp.input.save()
        args, kwargs = mlp.inputs.save()
        output = mlp.output.save()

    expected = plain(model).run("Hello")
    assert torch.equal(given, expected.inputs["transformer.h.2.mlp"][0])
    assert isinstance(args, tuple)
    assert isinstance(kwargs, dict)
    assert torch.equal(args[0], given)
    assert torch.equal(output, expected["transformer.h.2.mlp"])


def test_module_hierarchy(model, capsys):
    print(model)
    # GPT2LMHeadModel(
    #   (transformer): GPT2Model(
    #     (h): ModuleList(
    #       (0-11): 12 x GPT2Block(
    #         (attn): GPT2Attention(...)
    #         (mlp): GPT2MLP(...)
    #       )
    #     )
    #   )
    #   (lm_head): Linear(...)
    # )

    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = ["GPT2LMHeadModel(", "(transformer): GPT2Model(", "(h): ModuleList(", "(0-11): 12 x GPT2Block("]
    shown += ["(attn): GPT2Attention(", "(mlp): GPT2MLP(", "(lm_head): Linear("]
    places = [next(i for i, line in enumerate(printed) if line.startswith(start)) for start in shown]
    assert places == sorted(places)


def test_error_for_a_missed_value(model):
    # | OutOfOrderError: Value was missed... | Accessed modules in wrong order |
    with pytest.raises(OutOfOrderError, match="Value was missed"):
        with model.trace("Hello"):
            hidden = model.transformer.h[5].output[0].save()
            model.transformer.h[2].output = hidden
    with pytest.raises(OutOfOrderError, match="Value was missed"):
        with model.trace("Hello", strict_order=True):
            model.transformer.h[5].output[0].save()
            model.transformer.h[2].output[0].save()


@pytest.mark.filterwarnings("ignore::nnsight.errors.OutOfOrderWarning")
def test_error_for_an_edit_of_a_missed_value(model):
    with pytest.raises(OutOfOrderError, match="Value was missed"):
        with model.trace("Hello"):
            model.transformer.h[5].output[0].save()
            model.transformer.h[2].output[0][:] = 0


def test_error_without_input(model):
    # | ValueError: Cannot return output of Envoy... | No input provided to trace |
    with pytest.raises(ValueError, match="input"):
        with model.trace():
            model.transformer.h[5].output[0].save()
    with pytest.raises(ValueError, match="Cannot return output of Envoy"):
        model.transformer.h[5].output[0].save()
