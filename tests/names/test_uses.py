"""The names in generations, edits, scans, gradients, sessions and caches."""

import pytest
import torch
import zoo

from nnsight import LanguageModel, NNsight
from nnsight.errors import NamesError

from .cases import BY_NAME, CASES, FAMILIES, Case, build, close, inputs, wrap

PROMPTS = zoo.prompts((7, 4))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
UNSCANNED = {"llava", "qwen2_vl"}  # how many patches an image has is a number
GENERATING = ["gpt2", "gptj", "opt", "bloom", "llama", "gemma3", "falcon", "mixtral", "deepseek_v3", "mamba", "jamba"]


def some(model, *, heads=True):
    """A few values of layer 1, by name."""
    found = {"resid_pre": model.resid_pre[1]}
    if heads:
        head = model.heads[1]
        found |= {"q": head.q, "v": head.v, "pattern": head.pattern, "z": head.z}
    found["resid_post"] = model.resid_post[1]
    found["logits"] = model.logits
    return {name: value.clone() for name, value in found.items()}


class TestGeneration:
    @pytest.mark.parametrize("name", GENERATING)
    def test_reads_are_those_of_the_longer_prompt(self, name: str) -> None:
        model = LanguageModel(build(BY_NAME[name]))
        heads = name != "mamba"
        steps = []
        with model.generate(PROMPTS[0], **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                steps.append(some(model, heads=heads))
            ids = model.generator.output
        assert len(steps) == 4
        with model.trace(ids[:, :-1], use_cache=False):
            whole = some(model, heads=heads)
        seen = 0
        for step, values in enumerate(steps):
            length = 7 if step == 0 else 1
            for value_name, value in values.items():
                if value_name == "pattern":
                    expected = whole[value_name][:, :, seen : seen + length, : seen + length]
                    expected = expected[..., -value.shape[-1] :]  # a sliding window's cache holds no more
                elif value_name == "logits":
                    expected = whole[value_name][:, seen + length - value.shape[1] : seen + length]
                elif value_name == "v" and name == "deepseek_v3":  # its cache holds latents: all values are made anew
                    expected = whole[value_name][:, : seen + length]
                else:
                    expected = whole[value_name][:, seen : seen + length]
                assert close(value, expected, 1e-3), (step, value_name)
            seen += length

    @pytest.mark.parametrize("name", [name for name in GENERATING if name != "mamba"])
    def test_edits_at_each_step_are_those_of_an_edited_prompt(self, name: str) -> None:
        model = LanguageModel(build(BY_NAME[name]))

        def edit():
            model.resid_pre[0][:] *= 1.2
            model.heads[1].k[:, :, 0] = 0
            model.heads[1].z[:, :, 1] = 0
            model.resid_post[1] = model.resid_post[1] + 1

        with model.generate(PROMPTS[0], **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                edit()
            ids = model.generator.output
        for end in range(7, 11):
            with model.trace(ids[:, :end], use_cache=False):
                edit()
                token = model.logits[0, -1].argmax()
            assert token == ids[0, end]

    def test_edits_of_rotated_keys_stay_in_the_cache(self) -> None:
        model = LanguageModel(build(BY_NAME["llama"]))
        results = []
        for assign in (False, True):
            with model.generate(PROMPTS[0], **GREEDY) as tracer:
                if assign:
                    model.heads[1].k_rot = torch.zeros_like(model.heads[1].k_rot)
                else:
                    model.heads[1].k_rot[:] = 0
                logits = []
                for _ in tracer.iter[:]:
                    logits.append(model.logits.clone())
            results.append(logits[-1])
        assert torch.equal(*results)
        with model.generate(PROMPTS[0], **GREEDY):
            last = model.generator.output
        assert last.shape[1] == 11

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_invokes(self, name: str) -> None:
        model = LanguageModel(build(BY_NAME[name]))
        found = [[] for _ in PROMPTS]
        with model.generate(**GREEDY) as tracer:
            for i, prompt in enumerate(PROMPTS):
                with tracer.invoke(prompt):
                    with tracer.iter[:]:
                        model.heads[1].z[:, :, 1] *= 0.5
                        found[i].append(model.resid_mid[2][:, -1].clone())
        for i, prompt in enumerate(PROMPTS):
            with model.generate(prompt, **GREEDY) as tracer:
                for step in tracer.iter[:]:
                    model.heads[1].z[:, :, 1] *= 0.5
                    assert close(found[i][step], model.resid_mid[2][:, -1])

    def test_encoder_and_decoder(self) -> None:
        model = LanguageModel(build(BY_NAME["t5-decoder"]))
        names = model.names
        patterns = []
        with model.generate(PROMPTS[0], **GREEDY) as tracer:
            encoded = names.encoder.resid_post[-1].clone()
            for _ in tracer.iter[:]:
                patterns.append(names.decoder.heads[1].pattern.shape)
                patterns.append(names.decoder.cross_heads[1].pattern.shape)
        assert encoded.shape == (1, 7, 32)
        assert patterns == [s for step in range(4) for s in ((1, 4, 1, step + 1), (1, 4, 1, 7))]


class TestEdits:
    def test_stored(self) -> None:
        model = LanguageModel(build(BY_NAME["llama"]))
        with model.edit() as edited:
            model.resid_mid[0][:] *= 2
            model.heads[1].pattern[:, 2] = 0
            model.neurons[2][:, :, 3] = 5
        with edited.trace(PROMPTS[0]):
            logits = edited.logits
        with model.trace(PROMPTS[0]):
            model.resid_mid[0][:] *= 2
            model.heads[1].pattern[:, 2] = 0
            model.neurons[2][:, :, 3] = 5
            assert torch.equal(logits, model.logits)
        with model.trace(PROMPTS[0]):
            assert not torch.equal(logits, model.logits)
        with edited.generate(PROMPTS[0], **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                assert bool((edited.heads[1].pattern[:, 2] == 0).all())


class TestScan:
    @pytest.mark.parametrize("case", [c for c in CASES if c.family not in UNSCANNED], ids=lambda case: case.name)
    def test_shapes_are_those_of_a_trace(self, case: Case) -> None:
        net = build(case)
        model = LanguageModel(net) if FAMILIES[case.family].takes_text else NNsight(net)
        names = model.names.stacks[case.stack]
        sites = []
        for name in names.names():
            try:
                sites.append(model.site(name, 1, stack=case.stack))
            except NamesError:
                continue
        given = inputs(case)
        with model.trace(**given):
            expected = [site.read().shape for site in sites]
        other = type(model)(build(case))
        with other.scan(**given):
            shapes = [other.site(site.name, 1, stack=case.stack).read().shape for site in sites]
        assert shapes == expected

    def test_without_weights(self) -> None:
        with torch.device("meta"):
            net = FAMILIES["llama"].make().eval()
        model = LanguageModel(net)
        blocks = model.layers
        with model.scan(torch.tensor([PROMPTS[0]])):
            shape = model.heads[1].result.shape
            model.resid_mid[1] = torch.zeros(1, 7, 32)
            assert blocks[2].attn.output[0].shape == (1, 7, 32)
        assert shape == (1, 7, 4, 32)
        with pytest.raises(NamesError, match="has no neurons"):
            LanguageModel(FAMILIES["mixtral"].make()).neurons

    def test_a_row_with_wrong_shapes_is_refused(self, monkeypatch) -> None:
        from dataclasses import replace

        from nnsight.names import _registry, family

        row = family("llama")
        monkeypatch.setattr(_registry, "_own", {"llama": replace(row, attn_out="self_attn.q_proj.output.output")})
        model = LanguageModel(build(BY_NAME["llama"]))
        with pytest.raises(NamesError, match=r"no self_attn\.q_proj\.output"):
            with model.scan(torch.tensor([PROMPTS[0]])):
                model.attn_out[1]


class TestGradients:
    def test_in_a_backward_block(self) -> None:
        model = LanguageModel(build(BY_NAME["llama"]))
        with model.trace(PROMPTS[0]):
            z, pattern, mid = model.heads[1].z, model.heads[2].pattern, model.resid_mid[2]
            loss = model.logits[:, -1].sum()
            with loss.backward():
                of_mid = mid.grad.clone()
                of_pattern = pattern.grad.clone()
                z.grad[:, :, 1] = 0
                of_z = z.grad.clone()
        with model.trace(PROMPTS[0]):
            values = [model.heads[1].z, model.heads[2].pattern, model.resid_mid[2]]
            total = model.logits[:, -1].sum()
        expected = torch.autograd.grad(total, values)
        assert close(of_mid, expected[2])
        assert close(of_pattern, expected[1])
        assert close(of_z[:, :, 2:], expected[0][:, :, 2:])
        assert not of_z[:, :, 1].any()

    @pytest.mark.parametrize("name", ["opt", "t5-encoder", "gptj", "bloom", "falcon", "gpt2"])
    def test_edits_in_place_leave_gradients_right(self, name: str) -> None:
        case = BY_NAME[name]
        model, names, _ = wrap(case)
        given = inputs(case)
        with model.trace(**given):
            before = names.resid_pre[0]
            names.heads[1].pattern[:, 1] = 0
            names.neurons[1][:, :, 3] *= 2
            names.heads[2].q[:, :, 0] = 0
            loss = names.resid_post[2].pow(2).sum()
        (ours,) = torch.autograd.grad(loss, before)
        with model.trace(**given):
            before = names.resid_pre[0]
            heads = names.heads[1]
            pattern = heads.pattern.clone()
            pattern[:, 1] = 0
            heads.pattern = pattern
            factor = torch.ones(names.neurons[1].shape[-1])
            factor[3] = 2
            names.neurons[1] = names.neurons[1] * factor
            q = names.heads[2].q.clone()
            q[:, :, 0] = 0
            names.heads[2].q = q
            loss = names.resid_post[2].pow(2).sum()
        (expected,) = torch.autograd.grad(loss, before)
        assert close(ours, expected)

    def test_parameters_get_the_gradients_of_the_plain_model(self) -> None:
        net = build(BY_NAME["llama"])
        model = LanguageModel(net)
        ids = torch.tensor([PROMPTS[0]])
        net(ids, use_cache=False).logits.pow(2).sum().backward()
        expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
        net.zero_grad()
        with model.trace(ids, use_cache=False):
            head = model.heads[1]
            head.q, head.v, head.q_rot, head.pattern, head.z, head.result, model.resid_mid[1], model.neurons[1]
            loss = model.logits.pow(2).sum()
            loss.backward()
        for name, parameter in net.named_parameters():
            assert close(parameter.grad, expected[name], 1e-3), name


def test_reading_changes_nothing() -> None:
    """Values that are only read leave every number of the plain model, but for the layer whose pattern is computed."""
    net = build(BY_NAME["gpt2"])
    model = LanguageModel(net)
    ids = torch.tensor([PROMPTS[0]])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            plain = net(ids).logits
            with model.trace(ids):
                for i in range(3):
                    head = model.heads[i]
                    model.resid_pre[i], head.q, head.k, head.v, head.z, head.result
                    model.attn_out[i], model.resid_mid[i], model.neurons[i], model.mlp_out[i], model.resid_post[i]
                assert torch.equal(model.logits, plain)


def test_caches_by_name() -> None:
    model = LanguageModel(build(BY_NAME["llama"]))
    with model.trace(PROMPTS[0]) as tracer:
        cache = tracer.cache(modules=[model.layers[1].attn, model.layers[2], model.layers[0].mlp])
        attended = model.attn_out[1]
    assert torch.equal(cache["model.model.layers.1.self_attn"].output[0], attended)
    assert cache.keys() == ["model.model.layers.0.mlp", "model.model.layers.1.self_attn", "model.model.layers.2"]


def test_saved_values_and_sessions() -> None:
    model = LanguageModel(build(BY_NAME["llama"]))
    with model.session():
        with model.trace(PROMPTS[0]):
            first = model.resid_post[1].save()
        with model.trace(PROMPTS[0]):
            model.resid_post[0] = first
            second = model.resid_pre[1].save()
    assert torch.equal(first, second)
