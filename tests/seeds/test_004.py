"""Document 004, snippet by snippet; the line breaks, which the document lost, are restored."""
# fmt: off
# ruff: noqa: B905, I001

import pytest
import torch
from torch.testing import assert_close

from nnsight import LanguageModel
from nnsight.errors import OutOfOrderWarning

EIFFEL = "The Eiffel Tower is in"
COLOSSEUM = "The Colosseum is in"


@pytest.fixture
def prompt():
    return "The Eiffel Tower is in the city of"


def zeros(hidden):
    return torch.zeros_like(hidden)


def test_first_trace(hub_cache, plain, capsys):
    from nnsight import LanguageModel

    model = LanguageModel("openai-community/gpt2", device_map="auto")

    with model.trace("The capital of France is") as tracer:
        # Extract hidden states from layer 5
        hidden = model.transformer.h[5].output[0].save()

        # Get final logits
        logits = model.output.save()

    # Access saved values outside the trace
    print(f"Hidden shape: {hidden.shape}")
    print(f"Logits shape: {logits.shape}")

    reference = plain(model)
    expected = reference.run("The capital of France is")
    assert torch.equal(hidden, expected["transformer.h.5"])
    assert torch.equal(logits.logits, expected.logits)
    size = reference.length("The capital of France is")
    assert capsys.readouterr().out == (
        f"Hidden shape: torch.Size([1, {size}, {model.config.n_embd}])\n"
        f"Logits shape: torch.Size([1, {size}, {model.config.vocab_size}])\n"
    )


def test_tracing_and_proxy_objects(hub_cache, plain, capsys):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace("The Eiffel Tower is in") as tracer:
        # All operations are deferred (Proxy objects)
        h5_out = model.transformer.h[5].output[0]  # Proxy
        h5_mean = h5_out.mean(dim=-1)  # Proxy
        h5_saved = h5_mean.save()  # Mark for retrieval

        # Modify activations in-place
        model.transformer.h[8].output[0][:] = 0  # Zero out layer 8

        # Get final output
        logits = model.output.save()

    # After trace exits, access concrete values
    print(h5_saved)  # Actual tensor
    print(logits.shape)  # Actual shape

    reference = plain(model)
    expected = reference.run(EIFFEL, edits={"transformer.h.8": zeros})
    assert isinstance(h5_saved, torch.Tensor)
    assert torch.equal(h5_saved, expected["transformer.h.5"].mean(dim=-1))
    assert_close(logits.logits, expected.logits)
    shape = [1, reference.length(EIFFEL), model.config.vocab_size]
    assert capsys.readouterr().out == f"{h5_saved}\ntorch.Size({shape})\n"


def test_multi_layer_activation_analysis(hub_cache, plain, capsys, recwarn):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    prompt = "The capital of France is"

    with model.trace(prompt) as tracer:
        # Collect activations from all 12 layers
        layer_outputs = []
        for i in range(12):
            layer_out = model.transformer.h[i].output[0].save()
            layer_outputs.append(layer_out)

        # Collect attention patterns
        attn_patterns = []
        for i in range(12):
            attn = model.transformer.h[i].attn.attn_dropout.input[0][0].save()
            attn_patterns.append(attn)

        logits = model.output.save()

    # Analyze layer norms and top predictions
    for i, layer_out in enumerate(layer_outputs):
        print(f"Layer {i}: norm={layer_out.norm().item():.3f}")

    probs = torch.softmax(logits[0, -1], dim=-1)
    top_tokens = probs.topk(5)
    for token, prob in zip(top_tokens.indices, top_tokens.values):
        print(f" {model.tokenizer.decode(token)}: {prob.item():.3f}")

    assert model.config.n_layer == 12
    reference = plain(model)
    expected = reference.run(prompt)
    lines = []
    for i in range(12):
        hidden = expected[f"transformer.h.{i}"]
        assert torch.equal(layer_outputs[i], hidden)
        lines.append(f"Layer {i}: norm={hidden.norm().item():.3f}")
    for attn, pattern in zip(attn_patterns, reference.patterns(prompt), strict=True):
        assert_close(attn, pattern[0][0])
    assert_close(logits.logits, expected.logits)
    top = expected.logits[0, -1].softmax(-1).topk(5)
    for token, prob in zip(top.indices, top.values, strict=True):
        lines.append(f" {model.tokenizer.decode(token)}: {prob.item():.3f}")
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    # The attentions are read after the layers.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def test_activation_patching(hub_cache, plain, capsys):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    clean_prompt = "The Eiffel Tower is in"
    corrupted_prompt = "The Colosseum is in"

    # Step 1: Get clean activations
    with model.trace(clean_prompt) as tracer:
        clean_hidden = model.transformer.h[8].output[0].save()

    # Step 2: Patch clean activations into corrupted run
    with model.trace(corrupted_prompt) as tracer:
        model.transformer.h[8].output[0][:] = clean_hidden
        patched_logits = model.output.save()

    # Step 3: Compare predictions
    paris_token = model.tokenizer.encode(" Paris")[0]
    rome_token = model.tokenizer.encode(" Rome")[0]
    patched_probs = torch.softmax(patched_logits[0, -1], dim=-1)
    print(f"Paris: {patched_probs[paris_token].item():.3f}")
    print(f"Rome: {patched_probs[rome_token].item():.3f}")

    reference = plain(model)
    clean = reference.run(EIFFEL)
    patched = reference.run(COLOSSEUM, edits={"transformer.h.8": lambda _: clean["transformer.h.8"]})
    assert torch.equal(clean_hidden, clean["transformer.h.8"])
    assert_close(patched_logits.logits, patched.logits)
    assert_close(patched_logits.logits, clean.logits)  # every position was patched
    probs = patched.logits[0, -1].softmax(-1)
    assert capsys.readouterr().out == (
        f"Paris: {probs[paris_token].item():.3f}\nRome: {probs[rome_token].item():.3f}\n"
    )


def test_systematic_patching_sweep(model, plain):
    def patch_sweep(model, clean_prompt, corrupted_prompt, target_token, n_layers=12):
        """Sweep activation patching across all layers and positions."""
        # Get clean activations
        with model.trace(clean_prompt) as tracer:
            clean_cache = {}
            for i in range(n_layers):
                clean_cache[i] = model.transformer.h[i].output[0].save()
            clean_logits = model.output.save()

        seq_len = clean_cache[0].shape[1]
        results = torch.zeros(n_layers, seq_len)

        for layer in range(n_layers):
            for pos in range(seq_len):
                with model.trace(corrupted_prompt) as tracer:
                    current = model.transformer.h[layer].output[0]
                    current[:, pos, :] = clean_cache[layer][:, pos, :]
                    logits = model.output.save()

                probs = torch.softmax(logits[0, -1], dim=-1)
                results[layer, pos] = probs[target_token].item()

        return results

    clean_prompt, corrupted_prompt = EIFFEL, COLOSSEUM
    paris_token = model.tokenizer.encode(" Paris")[0]
    results = patch_sweep(model, clean_prompt, corrupted_prompt, paris_token)

    reference = plain(model)
    clean = reference.run(clean_prompt)
    seq_len = reference.length(clean_prompt)
    assert results.shape == (12, seq_len)
    for layer, pos in ((0, 2), (3, 3), (6, seq_len - 1), (11, 1), (11, seq_len - 1)):

        def patch(hidden, layer=layer, pos=pos):
            hidden[:, pos] = clean[f"transformer.h.{layer}"][:, pos]
            return hidden

        expected = reference.run(corrupted_prompt, edits={f"transformer.h.{layer}": patch}).logits
        assert_close(results[layer, pos], expected[0, -1].softmax(-1)[paris_token])
    assert_close(results[11, -1], clean.logits[0, -1].softmax(-1)[paris_token])


def test_remote_execution(server, plain, capsys):
    from nnsight import LanguageModel

    # Load a 70B model (runs on NDIF servers)
    model = LanguageModel("meta-llama/Llama-3.1-70B")

    # Same code, just add remote=True
    with model.trace("The meaning of life is", remote=True) as tracer:
        layer_40 = model.model.layers[40].output[0].save()
        logits = model.output.save()

    print(f"Layer 40 shape: {layer_40.shape}")

    size = len(model.tokenizer("The meaning of life is")["input_ids"])
    assert not model.dispatched
    expected = plain(model).run("The meaning of life is")
    assert torch.equal(layer_40, expected["model.layers.40"])
    assert torch.equal(logits.logits, expected.logits)
    assert capsys.readouterr().out == f"Layer 40 shape: torch.Size([1, {size}, {model.config.hidden_size}])\n"


def test_cross_prompt_activation_sharing(hub_cache, plain):
    from nnsight import LanguageModel

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace() as tracer:
        # First prompt
        with tracer.invoke("The cat sat on the"):
            cat_hidden = model.transformer.h[6].output[0].save()

        # Second prompt with injected activations from first
        with tracer.invoke("The dog ran through the"):
            model.transformer.h[6].output[0][:] = cat_hidden
            dog_with_cat = model.output.save()

    reference = plain(model)
    cat = reference.run("The cat sat on the")
    assert_close(cat_hidden, cat["transformer.h.6"])
    patch = {"transformer.h.6": lambda _: cat["transformer.h.6"]}
    assert_close(dog_with_cat.logits, reference.run("The dog ran through the", edits=patch).logits)


def test_gradient_based_analysis(hub_cache, plain, capsys):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace("The quick brown fox") as tracer:
        hidden = model.transformer.h[5].output[0].save()
        hidden.retain_grad()
        logits = model.output
        target_token = model.tokenizer.encode(" jumps")[0]
        loss = -logits[0, -1, target_token]
        loss.backward()

    grad = hidden.grad
    print(f"Gradient norm: {grad.norm().item():.3f}")

    source, expected = plain(model).graph("The quick brown fox", "transformer.h.5")
    (gradient,) = torch.autograd.grad(-expected[0, -1, target_token], source)
    assert_close(grad, gradient)
    assert capsys.readouterr().out == f"Gradient norm: {gradient.norm().item():.3f}\n"


# | Model | Layer Access | Attention Access |
PATHS = {
    "GPT2LMHeadModel": (
        lambda model, i: model.transformer.h[i].output[0],
        lambda model, i: model.transformer.h[i].attn,
    ),
    "LlamaForCausalLM": (
        lambda model, i: model.model.layers[i].output[0],
        lambda model, i: model.model.layers[i].self_attn,
    ),
    "MistralForCausalLM": (
        lambda model, i: model.model.layers[i].output[0],
        lambda model, i: model.model.layers[i].self_attn,
    ),
    "GPTNeoXForCausalLM": (
        lambda model, i: model.gpt_neox.layers[i].output[0],
        lambda model, i: model.gpt_neox.layers[i].attention,
    ),
}


@pytest.mark.parametrize("family", PATHS)
def test_model_architecture_paths(gpt2, plain, prompt, family):
    import transformers

    cls = getattr(transformers, family)
    config = cls.config_class(
        vocab_size=len(gpt2.tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=gpt2.tokenizer.bos_token_id,
        eos_token_id=gpt2.tokenizer.eos_token_id,
    )
    if not family.startswith("GPT"):
        config.num_key_value_heads = 1
    model = LanguageModel(cls(config).eval(), tokenizer=gpt2.tokenizer)
    layer, attention = PATHS[family]

    with model.trace(prompt):
        attended = attention(model, 1).output[0].save()
        hidden = layer(model, 1).save()

    expected = plain(model).run(prompt)
    path = attention(model, 1).path.removeprefix("model.")
    assert hidden.shape == (1, plain(model).length(prompt), 16)
    assert torch.equal(attended, expected[path])
    assert torch.equal(hidden, expected[path.rpartition(".")[0]])


def test_key_api_methods(model, plain, prompt):
    # | model.trace(prompt, remote=False) | Start tracing context |, | proxy[:] | Slice/index proxy |
    with model.trace(prompt, remote=False):
        proxy = model.transformer.h[7].output[0]
        proxy[:] = 0
        output = model.output.save()

    expected = plain(model).run(prompt, edits={"transformer.h.7": zeros}).logits
    assert_close(output.logits, expected)
    assert_close(output[0, -1], expected[0, -1])
    assert type(model._model).__name__ == "GPT2LMHeadModel"


def test_check_model_structure(model, capsys):
    print(model._model)

    printed = capsys.readouterr().out
    assert "(transformer): GPT2Model(" in printed
    assert "(h): ModuleList(" in printed


def test_remote_execution_timeout(server, plain, prompt):
    model = LanguageModel("meta-llama/Llama-3.1-70B")

    with model.trace(prompt, remote=True, timeout=300):
        logits = model.output.save()

    assert not model.dispatched
    assert torch.equal(logits.logits, plain(model).run(prompt).logits)


def test_save_only_the_last_position(model, plain, prompt):
    with model.trace(prompt):
        hidden = model.transformer.h[5].output[0]
        last = hidden[:, -1, :].save()

    assert torch.equal(last, plain(model).run(prompt)["transformer.h.5"][:, -1, :])


def test_gradient_is_none_without_retaining_it(model, prompt):
    # "Ensure you called hidden.retain_grad() inside the trace before the backward pass."
    with model.trace(prompt):
        forgotten = model.transformer.h[4].output[0].save()
        hidden = model.transformer.h[5].output[0].save()
        hidden.retain_grad()
        model.lm_head.output.sum().backward()
    model._model.zero_grad(set_to_none=True)

    assert hidden.grad.shape == hidden.shape
    with pytest.warns(UserWarning, match="not a leaf Tensor"):
        assert forgotten.grad is None
