"""Document 002, snippet by snippet, as printed."""
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


def test_local_and_remote_execution(model, server, plain):
    gpt2, llama_model = model, LanguageModel("meta-llama/Llama-3.1-70B")

    # Local execution (small model)
    with model.trace("Hello world"):
        hidden = model.transformer.h[5].output[0].save()

    local, model = hidden, llama_model

    # Remote execution (massive model) - same code!
    with model.trace("Hello world", remote=True):
        hidden = model.model.layers[40].output[0].save()

    assert not model.dispatched
    assert torch.equal(local, plain(gpt2).run("Hello world")["transformer.h.5"])
    assert torch.equal(hidden, plain(model).run("Hello world")["model.layers.40"])


def test_local_execution(model, plain):
    # Local execution (small model)
    with model.trace("Hello world"):
        hidden = model.transformer.h[5].output[0].save()

    assert torch.equal(hidden, plain(model).run("Hello world")["transformer.h.5"])


def test_language_model_wrapper(llama):
    from nnsight import LanguageModel

    # Load model (uses HuggingFace under the hood)
    model = LanguageModel("openai-community/gpt2", device_map="auto")

    assert type(model._model).__name__ == "GPT2LMHeadModel"

    # For larger models
    model = LanguageModel("meta-llama/Llama-3.1-8B", device_map="auto")

    assert type(model._model).__name__ == "LlamaForCausalLM"
    # Nothing is loaded before the first trace.
    assert all(parameter.is_meta for parameter in model._model.parameters())


def test_tracing_context(hub_cache, plain, capsys, recwarn):
    from nnsight import LanguageModel

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace("The Eiffel Tower is in") as tracer:
        # Access any module's output
        hidden_states = model.transformer.h[5].output[0].save()

        # Access attention patterns
        attn = model.transformer.h[5].attn.attn_dropout.input[0][0].save()

        # Modify activations
        model.transformer.h[8].output[0][:] = 0  # Zero out layer 8

        # Get final output
        logits = model.output.save()

    # After context exits, access saved values
    print(hidden_states.shape)  # [batch, seq, hidden]

    reference = plain(model)
    expected = reference.run(EIFFEL, edits={"transformer.h.8": zeros})
    assert torch.equal(hidden_states, expected["transformer.h.5"])
    assert_close(logits.logits, expected.logits)
    # `.input` is the first argument [batch, head, query, key]: [0][0] is the first row's first head.
    assert_close(attn, reference.patterns(EIFFEL)[5][0][0])
    assert capsys.readouterr().out == f"torch.Size([1, {reference.length(EIFFEL)}, {model.config.n_embd}])\n"
    # The attention of layer 5 is read after the layer.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def test_proxy_objects(model, plain):
    with model.trace("Hello"):
        # These are all Proxy objects - operations are deferred
        h5_out = model.transformer.h[5].output[0]  # Proxy
        h5_mean = h5_out.mean(dim=-1)              # Proxy
        h5_saved = h5_mean.save()                   # Save for later access

    assert torch.equal(h5_saved, plain(model).run("Hello")["transformer.h.5"].mean(dim=-1))


def test_workflow_1_activation_analysis(hub_cache, plain, capsys, recwarn):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    prompt = "The capital of France is"

    with model.trace(prompt) as tracer:
        # 1. Collect activations from multiple layers
        layer_outputs = []
        for i in range(12):  # GPT-2 has 12 layers
            layer_out = model.transformer.h[i].output[0].save()
            layer_outputs.append(layer_out)

        # 2. Get attention patterns
        attn_patterns = []
        for i in range(12):
            # Access attention weights (after softmax)
            attn = model.transformer.h[i].attn.attn_dropout.input[0][0].save()
            attn_patterns.append(attn)

        # 3. Get final logits
        logits = model.output.save()

    # 4. Analyze outside context
    for i, layer_out in enumerate(layer_outputs):
        print(f"Layer {i} output shape: {layer_out.shape}")
        print(f"Layer {i} norm: {layer_out.norm().item():.3f}")

    # 5. Find top predictions
    probs = torch.softmax(logits[0, -1], dim=-1)
    top_tokens = probs.topk(5)
    for token, prob in zip(top_tokens.indices, top_tokens.values):
        print(f"{model.tokenizer.decode(token)}: {prob.item():.3f}")

    assert model.config.n_layer == 12
    reference = plain(model)
    expected = reference.run(prompt)
    size = reference.length(prompt)
    lines = []
    for i in range(12):
        hidden = expected[f"transformer.h.{i}"]
        assert torch.equal(layer_outputs[i], hidden)
        lines += [f"Layer {i} output shape: torch.Size([1, {size}, {model.config.n_embd}])"]
        lines += [f"Layer {i} norm: {hidden.norm().item():.3f}"]
    for attn, pattern in zip(attn_patterns, reference.patterns(prompt), strict=True):
        assert_close(attn, pattern[0][0])
        assert_close(attn.sum(-1), torch.ones(size))
    assert_close(logits.logits, expected.logits)
    top = expected.logits[0, -1].softmax(-1).topk(5)
    for token, prob in zip(top.indices, top.values, strict=True):
        lines.append(f"{model.tokenizer.decode(token)}: {prob.item():.3f}")
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    # The attentions are read after the layers.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def test_workflow_2_activation_patching(hub_cache, plain, capsys):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    clean_prompt = "The Eiffel Tower is in"
    corrupted_prompt = "The Colosseum is in"

    # 1. Get clean activations
    with model.trace(clean_prompt) as tracer:
        clean_hidden = model.transformer.h[8].output[0].save()

    # 2. Patch clean into corrupted run
    with model.trace(corrupted_prompt) as tracer:
        # Replace layer 8 output with clean activations
        model.transformer.h[8].output[0][:] = clean_hidden

        patched_logits = model.output.save()

    # 3. Compare predictions
    paris_token = model.tokenizer.encode(" Paris")[0]
    rome_token = model.tokenizer.encode(" Rome")[0]

    patched_probs = torch.softmax(patched_logits[0, -1], dim=-1)
    print(f"Paris prob: {patched_probs[paris_token].item():.3f}")
    print(f"Rome prob: {patched_probs[rome_token].item():.3f}")

    reference = plain(model)
    clean = reference.run(EIFFEL)
    patched = reference.run(COLOSSEUM, edits={"transformer.h.8": lambda _: clean["transformer.h.8"]})
    assert torch.equal(clean_hidden, clean["transformer.h.8"])
    assert_close(patched_logits.logits, patched.logits)
    assert_close(patched_logits.logits, clean.logits)  # every position was patched
    probs = patched.logits[0, -1].softmax(-1)
    assert capsys.readouterr().out == (
        f"Paris prob: {probs[paris_token].item():.3f}\nRome prob: {probs[rome_token].item():.3f}\n"
    )


def test_systematic_patching_sweep(model, plain):
    reference = plain(model)
    clean_prompt, corrupted = EIFFEL, COLOSSEUM
    with model.trace(clean_prompt):
        clean_hidden = [layer.output[0].save() for layer in model.transformer.h]
    seq_len = reference.length(corrupted)
    paris_token = model.tokenizer.encode(" Paris")[0]

    def compute_metric(logits):
        return torch.softmax(logits[0, -1], dim=-1)[paris_token]

    def patch_layer_position(layer, position, clean_cache, corrupted_prompt):
        """Patch single layer/position from clean to corrupted."""
        with model.trace(corrupted_prompt) as tracer:
            # Get current activation
            current = model.transformer.h[layer].output[0]

            # Patch only specific position
            current[:, position, :] = clean_cache[layer][:, position, :]

            logits = model.output.save()

        return logits

    # Sweep over all layers and positions
    results = torch.zeros(12, seq_len)
    for layer in range(12):
        for pos in range(seq_len):
            logits = patch_layer_position(layer, pos, clean_hidden, corrupted)
            results[layer, pos] = compute_metric(logits)

    clean = reference.run(clean_prompt)
    assert reference.length(clean_prompt) == seq_len
    for layer, pos in ((0, 1), (0, seq_len - 1), (5, 3), (5, seq_len - 1), (11, 0), (11, seq_len - 1)):

        def patch(hidden, layer=layer, pos=pos):
            hidden[:, pos] = clean[f"transformer.h.{layer}"][:, pos]
            return hidden

        expected = reference.run(corrupted, edits={f"transformer.h.{layer}": patch}).logits
        assert_close(results[layer, pos], compute_metric(expected))
    # The last layer's last position is all that the prediction is read from.
    assert_close(results[11, -1], compute_metric(clean.logits))
    unpatched = compute_metric(reference.run(corrupted).logits)
    assert_close(results[11, :-1], unpatched.expand(seq_len - 1))


def test_workflow_3_remote_execution(server, plain, capsys):
    from nnsight import LanguageModel

    # 1. Load large model (will run remotely)
    model = LanguageModel("meta-llama/Llama-3.1-70B")

    # 2. Same code, just add remote=True
    with model.trace("The meaning of life is", remote=True) as tracer:
        # Access internals of 70B model!
        layer_40_out = model.model.layers[40].output[0].save()
        logits = model.output.save()

    # 3. Results returned from NDIF
    print(f"Layer 40 shape: {layer_40_out.shape}")

    # 4. Generation with interventions
    with model.trace(remote=True) as tracer:
        with tracer.invoke("What is 2+2?"):
            # Intervene during generation
            model.model.layers[20].output[0][:, -1, :] *= 1.5

        output = model.generate(max_new_tokens=50)

    size = len(model.tokenizer("The meaning of life is")["input_ids"])
    assert not model.dispatched
    expected = plain(model).run("The meaning of life is")
    assert torch.equal(layer_40_out, expected["model.layers.40"])
    assert torch.equal(logits.logits, expected.logits)
    assert capsys.readouterr().out == f"Layer 40 shape: torch.Size([1, {size}, {model.config.hidden_size}])\n"


def test_workflow_3_generation_with_interventions_run_locally(llama, plain):
    model = LanguageModel("meta-llama/Llama-3.1-70B")
    model.dispatch()._model.generation_config.eos_token_id = None

    # 4. Generation with interventions
    with model.trace() as tracer:
        with tracer.invoke("What is 2+2?"):
            # Intervene during generation
            model.model.layers[20].output[0][:, -1, :] *= 1.5

        output = model.generate(max_new_tokens=50)

    calls = []

    def strengthen(hidden):
        if not calls:
            hidden[:, -1] *= 1.5
        calls.append(hidden)
        return hidden

    reference = plain(model)
    expected, _ = reference.generate("What is 2+2?", max_new_tokens=50, edits={"model.layers.20": strengthen})
    assert len(calls) == 50
    assert torch.equal(output, expected)


def test_ndif_setup(keys):
    import os
    os.environ["NDIF_API_KEY"] = "your_key"

    # Or configure directly
    from nnsight import CONFIG
    CONFIG.API_KEY = "your_key"

    assert CONFIG.API_KEY == "your_key"
    assert type(CONFIG)().API_KEY == "your_key"  # a new process reads the environment


def test_workflow_4_cross_prompt_activation_sharing(hub_cache, plain):
    from nnsight import LanguageModel

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace() as tracer:
        # First prompt
        with tracer.invoke("The cat sat on the"):
            cat_hidden = model.transformer.h[6].output[0].save()

        # Second prompt - inject cat's activations
        with tracer.invoke("The dog ran through the"):
            # Replace with cat's activations at layer 6
            model.transformer.h[6].output[0][:] = cat_hidden
            dog_with_cat = model.output.save()

    # The dog prompt now has cat's internal representations

    reference = plain(model)
    cat = reference.run("The cat sat on the")
    assert_close(cat_hidden, cat["transformer.h.6"])
    patch = {"transformer.h.6": lambda _: cat["transformer.h.6"]}
    assert_close(dog_with_cat.logits, reference.run("The dog ran through the", edits=patch).logits)
    assert_close(dog_with_cat.logits, cat.logits)


def test_workflow_5_gradients(hub_cache, plain, capsys):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel("gpt2", device_map="auto")

    with model.trace("The quick brown fox") as tracer:
        # Save activations and enable gradient
        hidden = model.transformer.h[5].output[0].save()
        hidden.retain_grad()

        logits = model.output

        # Compute loss on specific token
        target_token = model.tokenizer.encode(" jumps")[0]
        loss = -logits[0, -1, target_token]

        # Backward pass
        loss.backward()

    # Access gradients
    grad = hidden.grad
    print(f"Gradient shape: {grad.shape}")
    print(f"Gradient norm: {grad.norm().item():.3f}")

    reference = plain(model)
    source, expected = reference.graph("The quick brown fox", "transformer.h.5")
    (gradient,) = torch.autograd.grad(-expected[0, -1, target_token], source)
    assert_close(grad, gradient)
    assert capsys.readouterr().out == (
        f"Gradient shape: {gradient.shape}\nGradient norm: {gradient.norm().item():.3f}\n"
    )


def test_module_path_differs_between_models(model, llama, plain, prompt, capsys):
    gpt2, llama_model = model, LanguageModel("meta-llama/Llama-3.1-8B")
    with model.trace(prompt):
        # GPT-2 structure
        model.transformer.h[5].output[0]

        found = model.transformer.h[5].output[0]

    assert torch.equal(found, plain(model).run(prompt)["transformer.h.5"])

    model = llama_model
    with model.trace(prompt):
        # LLaMA structure
        model.model.layers[5].output[0]

        found = model.model.layers[5].output[0]

    assert torch.equal(found, plain(model).run(prompt)["model.layers.5"])

    # Solution: Check model structure
    print(model._model)  # See actual module names

    model = gpt2
    print(model._model)
    llama_names, gpt2_names = capsys.readouterr().out.split("GPT2LMHeadModel(")
    assert "(layers): ModuleList(" in llama_names
    assert "(h): ModuleList(" in gpt2_names


def test_forgetting_to_save(model, plain, capsys):
    # WRONG: Value not accessible outside trace
    with model.trace("Hello"):
        hidden = model.transformer.h[5].output[0]  # Not saved!

    print(hidden)  # Error or wrong value

    # The body of a local trace runs here, so the value is simply there.
    expected = plain(model).run("Hello")["transformer.h.5"]
    assert torch.equal(hidden, expected)
    wrong, hidden = hidden, None

    # RIGHT: Call .save()
    with model.trace("Hello"):
        hidden = model.transformer.h[5].output[0].save()

    print(hidden)  # Works!

    assert torch.equal(hidden, expected)
    assert capsys.readouterr().out == f"{wrong}\n{hidden}\n"


def test_remote_timeout(server):
    model = LanguageModel("meta-llama/Llama-3.1-70B")

    # For long operations, increase timeout
    with model.trace("prompt", remote=True, timeout=300) as tracer:
        # Long operation...
        pass


def test_memory_with_many_saved_activations(gpt2, plain, recwarn):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(gpt2.tokenizer), n_embd=8, n_layer=100, n_head=2, n_positions=32)
    model = LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer=gpt2.tokenizer)

    # Only save what you need
    with model.trace("prompt"):
        # Don't save everything
        for i in range(100):
            model.transformer.h[i].output[0].save()  # Memory heavy!

        # Better: save specific layers
        key_layers = [0, 5, 11]
        for i in key_layers:
            model.transformer.h[i].output[0].save()

    # Three layers are read a second time.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def test_memory_with_few_saved_activations(model, plain):
    saved = {}
    with model.trace("prompt"):
        # Better: save specific layers
        key_layers = [0, 5, 11]
        for i in key_layers:
            saved[i] = model.transformer.h[i].output[0].save()

    expected = plain(model).run("prompt")
    for i in key_layers:
        assert torch.equal(saved[i], expected[f"transformer.h.{i}"])


def test_vllm_gradient_limitation(hub_cache, plain):
    from nnsight import LanguageModel

    # vLLM doesn't support gradients
    # Use standard execution for gradient analysis
    model = LanguageModel("gpt2", device_map="auto")  # Not vLLM

    with model.trace("Hello"):
        hidden = model.transformer.h[0].output[0].save()
        hidden.retain_grad()
        model.lm_head.output.sum().backward()
    source, expected = plain(model).graph("Hello", "transformer.h.0")
    assert_close(hidden.grad, torch.autograd.grad(expected.sum(), source)[0])


def test_key_api_reference(model, plain, prompt):
    # | model.trace(prompt, remote=False) | Start tracing context |, | proxy[:] | Slice/index proxy |,
    # | model.output | Final model output logits |
    with model.trace(prompt, remote=False):
        proxy = model.transformer.h[7].output[0]
        copy = proxy[:].clone().save()
        proxy[:] = 0
        output = model.output.save()

    reference = plain(model)
    assert torch.equal(copy, reference.run(prompt)["transformer.h.7"])
    expected = reference.run(prompt, edits={"transformer.h.7": zeros}).logits
    assert_close(output.logits, expected)
    # `model.output` answers as the logits it carries, too.
    assert torch.equal(output[0, -1], output.logits[0, -1])
    assert torch.equal(output[:, -1], output["logits"][:, -1])
    assert torch.equal(output[0], output.logits)
    assert output.shape == expected.shape
