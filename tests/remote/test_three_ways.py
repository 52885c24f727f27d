"""The same block here, on a server in this process, and confined on a server: the same values.

Each test compares with the plain model, so that all three are right, and not only alike.
"""

from __future__ import annotations

import traceback

import pytest
import torch

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"


class Plain:
    """The model without nnsight."""

    def __init__(self, model):
        self.module = model.dispatch()._model
        self.tokenizer = model.tokenizer

    def run(self, prompt, edits=None):
        """Outputs by path, with `edits` made by hooks."""
        seen, handles = {}, []
        for path, module in self.module.named_modules():
            handles.append(module.register_forward_hook(lambda m, i, o, path=path: seen.update({path: o})))
        for path, edit in (edits or {}).items():
            module = self.module.get_submodule(path)
            handles.append(module.register_forward_hook(lambda m, i, o, edit=edit: edit(o), prepend=True))
        try:
            with torch.no_grad():
                self.module(**self.tokenizer(prompt, return_tensors="pt"))
        finally:
            for handle in handles:
                handle.remove()
        return seen


@pytest.fixture(scope="module")
def plain(gpt2):
    return Plain(gpt2)


@pytest.fixture(autouse=True)
def nothing_is_loaded(model, where):
    yield
    if where:
        assert not model.dispatched


def test_reads(model, where, plain):
    with model.trace(PROMPT, **where):
        attention = model.transformer.h[3].attn.output[0].save()
        hidden = model.transformer.h[3].output[0].save()
        logits = model.output.save()

    seen = plain.run(PROMPT)
    assert torch.equal(hidden, seen["transformer.h.3"])
    assert torch.equal(attention, seen["transformer.h.3.attn"][0])
    assert torch.equal(logits.logits, seen["lm_head"])
    assert torch.equal(logits[0, -1], seen["lm_head"][0, -1])


def test_edits_in_place_and_by_assignment(model, where, plain):
    with model.trace(PROMPT, **where):
        model.transformer.h[1].output[0][:, -1] = 0
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 2
        logits = model.lm_head.output.save()

    def zero(hidden):
        hidden[:, -1] = 0

    edits = {"transformer.h.1": zero, "transformer.h.2.mlp": lambda out: out * 2}
    assert torch.equal(logits, plain.run(PROMPT, edits)["lm_head"])


def test_the_forward_ends_after_the_last_request(model, where, plain):
    with model.trace(PROMPT, stop_after_last=True, **where):
        model.transformer.h[1].output[0][:, -1] = 0
        hidden = model.transformer.h[3].output[0].save()

    def zero(hidden):
        hidden[:, -1] = 0

    assert torch.equal(hidden, plain.run(PROMPT, {"transformer.h.1": zero})["transformer.h.3"])


def test_invokes_share_values(model, where, plain):
    with model.trace(**where) as tracer:
        with tracer.invoke(PROMPT):
            hidden = model.transformer.h[2].output[0][:, -1].clone()
            clean = model.lm_head.output[:, -1].save()
        with tracer.invoke(OTHER):
            model.transformer.h[2].output[0][:, -1] = hidden
            patched = model.lm_head.output[:, -1].save()

    source = plain.run(PROMPT)

    def patch(out):
        out[:, -1] = source["transformer.h.2"][:, -1]

    torch.testing.assert_close(clean, source["lm_head"][:, -1], rtol=1e-4, atol=1e-4)
    expected = plain.run(OTHER, {"transformer.h.2": patch})["lm_head"][:, -1]
    torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-4)


def test_generation_step_by_step(model, where, plain):
    with model.generate(PROMPT, max_new_tokens=4, **where) as tracer:
        tokens = []
        for _step in tracer.iter[:]:
            tokens.append(model.lm_head.output[0, -1].argmax().item())
        tokens.save()
        ids = model.generator.output.save()

    given = plain.tokenizer(PROMPT, return_tensors="pt")
    expected = plain.module.generate(**given, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(ids, expected)
    assert tokens == expected[0, given["input_ids"].shape[1] :].tolist()


def test_deferred_iteration(model, where, plain):
    with model.generate(PROMPT, max_new_tokens=3, **where) as tracer:
        norms = [].save()
        with tracer.iter[1:3]:
            norms.append(model.transformer.h[0].output[0].norm())
        ids = tracer.result.save()

    assert len(norms) == 2
    ids = ids[:, :-1]
    with torch.no_grad():
        full = {}
        handle = plain.module.transformer.h[0].register_forward_hook(lambda m, i, o: full.update(h=o))
        plain.module(input_ids=ids)
        handle.remove()
    for norm, position in zip(norms, (-2, -1), strict=True):
        torch.testing.assert_close(norm, full["h"][:, position].norm(), rtol=1e-4, atol=1e-4)


def gradients(plain, path):
    module = plain.module.get_submodule(path)
    kept = []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o))
    try:
        logits = plain.module(**plain.tokenizer(PROMPT, return_tensors="pt")).logits
    finally:
        handle.remove()
    return torch.autograd.grad(logits[0, -1].sum(), kept[0])[0]


def test_gradients_of_a_backward_block(model, where, plain):
    with model.trace(PROMPT, **where):
        hidden = model.transformer.h[4].output[0]
        with model.lm_head.output[0, -1].sum().backward():
            gradient = hidden.grad.save()

    torch.testing.assert_close(gradient, gradients(plain, "transformer.h.4"))


def test_gradients_of_saved_tensors(model, where, plain):
    with model.trace(PROMPT, **where):
        hidden = model.transformer.h[4].output[0].save()
        hidden.retain_grad()
        model.lm_head.output[0, -1].sum().backward()

    torch.testing.assert_close(hidden.grad, gradients(plain, "transformer.h.4"))
    plain.module.zero_grad(set_to_none=True)


def test_a_steered_model(model, where, plain):
    vector = torch.ones(128)

    def add(hidden):
        return hidden + 2 * vector

    expected = plain.run(PROMPT, {"transformer.h.1": add})["lm_head"]
    with model.steer(vector, 1, strength=2):
        with model.trace(PROMPT, **where):
            inside = model.lm_head.output.save()
    steered = model.steer(vector, 1, strength=2).model
    with steered.trace(PROMPT, **where):
        copied = steered.lm_head.output.save()
    with model.trace(PROMPT, **where):
        untouched = model.lm_head.output.save()
    assert torch.equal(inside, expected)
    assert torch.equal(copied, expected)
    assert torch.equal(untouched, plain.run(PROMPT)["lm_head"])


def test_an_edited_model(model, where, plain):
    factor = 3.0
    with model.edit() as edited:
        model.transformer.h[1].mlp.output[:] *= factor
    with edited.trace(PROMPT, **where):
        logits = edited.lm_head.output.save()
    with model.trace(PROMPT, **where):
        untouched = model.lm_head.output.save()

    def scale(out):
        out *= factor

    assert torch.equal(logits, plain.run(PROMPT, {"transformer.h.1.mlp": scale})["lm_head"])
    assert torch.equal(untouched, plain.run(PROMPT)["lm_head"])


def test_a_session_is_one_unit(model, where, plain):
    with model.session(**where):
        with model.trace(PROMPT):
            hidden = model.transformer.h[0].output[0].save()
        with model.trace(PROMPT):
            model.transformer.h[5].output[0][:] = hidden
            logits = model.lm_head.output.save()

    seen = plain.run(PROMPT)
    assert torch.equal(hidden, seen["transformer.h.0"])
    expected = plain.run(PROMPT, {"transformer.h.5": lambda _: seen["transformer.h.0"]})["lm_head"]
    assert torch.equal(logits, expected)


def test_operations_of_a_forward(model, where, plain):
    with model.trace(PROMPT, **where):
        product = model.transformer.h[0].mlp.source.self_act_0.output.save()

    assert torch.equal(product, plain.run(PROMPT)["transformer.h.0.mlp.act"])


def test_skipping_a_module(model, where, plain):
    with model.trace(PROMPT, **where):
        hidden = model.transformer.h[1].output[0]
        model.transformer.h[2].skip(hidden)
        logits = model.lm_head.output.save()

    seen = plain.run(PROMPT)
    expected = plain.run(PROMPT, {"transformer.h.2": lambda _: seen["transformer.h.1"]})["lm_head"]
    assert torch.equal(logits, expected)


def test_attention_patterns_on_demand(model, where, plain):
    with model.trace(PROMPT, **where):
        pattern = model.transformer.h[2].attn.attn_dropout.input.save()

    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    assert pattern.shape[1] == plain.module.config.n_head


def test_an_ad_hoc_call(model, where, plain):
    with model.trace(PROMPT, **where):
        early = model.lm_head(model.transformer.ln_f(model.transformer.h[2].output[0])).save()

    transformer = plain.module.transformer
    with torch.no_grad():
        expected = plain.module.lm_head(transformer.ln_f(plain.run(PROMPT)["transformer.h.2"]))
    assert torch.equal(early, expected)


def scaled(values, factor):
    """A helper of the user's, which calls another."""
    return doubled(values) * factor


def doubled(values):
    return values * FACTOR


FACTOR = 2.0


class Collector:
    """A class of the user's, which a block fills."""

    def __init__(self):
        self.found = {}

    def add(self, name, value):
        self.found[name] = value.save()


def test_helpers_classes_and_containers_of_the_user(model, where, plain):
    collector, results, buffer = Collector(), [1], torch.zeros(2)
    offset = 0.5

    def shifted(values):
        return values + offset

    with model.trace(PROMPT, **where):
        hidden = model.transformer.h[0].output[0]
        big = shifted(scaled(hidden, 3)).save()
        collector.add("first", hidden)
        results.append(hidden.norm().save())
        buffer[1] = 7

    expected = plain.run(PROMPT)["transformer.h.0"]
    assert torch.equal(big, expected * 2 * 3 + 0.5)
    assert torch.equal(collector.found["first"], expected)
    assert results[0] == 1
    assert torch.equal(results[1], expected.norm())
    assert buffer.tolist() == [0, 7]


def test_a_module_of_the_user_is_spliced_in(model, where, plain):
    torch.manual_seed(0)
    width = model.config.n_embd
    probe = torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.ReLU(), torch.nn.Linear(4, width))
    with model.trace(PROMPT, **where):
        model.transformer.h[3].output[0][:] = probe(model.transformer.h[3].output[0])
        logits = model.lm_head.output.save()

    expected = plain.run(PROMPT, {"transformer.h.3": probe})["lm_head"]
    assert torch.equal(logits, expected)


def test_a_module_of_the_user_is_trained(model, where, plain):
    torch.manual_seed(0)
    probe = torch.nn.Linear(model.config.n_embd, 2)
    before = probe.weight.detach().clone()
    with model.trace(PROMPT, **where):
        hidden = model.transformer.h[3].output[0].detach()
        probe(hidden).square().sum().backward()
        with torch.no_grad():
            probe.weight -= 0.1 * probe.weight.grad

    hidden = plain.run(PROMPT)["transformer.h.3"]
    twin = torch.nn.Linear(model.config.n_embd, 2)
    twin.load_state_dict({"weight": before, "bias": probe.bias.detach()})
    twin(hidden).square().sum().backward()
    assert torch.equal(probe.weight.grad, twin.weight.grad)
    assert torch.equal(probe.bias.grad, twin.bias.grad)
    assert torch.equal(probe.weight.detach(), before - 0.1 * twin.weight.grad)


def test_sampling_follows_the_seed(model, where):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with model.generate(PROMPT, max_new_tokens=8, do_sample=True, temperature=5.0, **where) as tracer:
            ids = tracer.result.save()
        drawn.append(ids.tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_prints_appear(model, where, capsys):
    with model.trace(PROMPT, **where):
        print("width", model.transformer.h[0].output[0].shape[-1])

    assert capsys.readouterr().out == f"width {model.config.n_embd}\n"


def test_warnings_appear_with_the_users_line(model, where):
    from nnsight.errors import SavedValueChangedWarning

    with pytest.warns(SavedValueChangedWarning) as found:
        with model.trace(PROMPT, **where):
            hidden = model.transformer.h[0].output[0].save()
            hidden[:] = 0
    assert found[0].filename == __file__


class OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", [ValueError, KeyError, OwnError])
def test_errors_are_of_their_class_at_the_users_line(model, where, kind):
    with pytest.raises(kind, match="no such thing") as caught:
        with model.trace(PROMPT, **where):
            hidden = model.transformer.h[0].output[0]
            raise kind("no such thing")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.filename == __file__
    assert last.line == 'raise kind("no such thing")'


def test_errors_of_nnsight_are_its_own(model, where):
    from nnsight.errors import OutOfOrderError

    with pytest.raises(OutOfOrderError, match=r"model\.transformer\.h\.1") as caught:
        with model.trace(PROMPT, **where):
            hidden = model.transformer.h[4].output[0]
            model.transformer.h[1].output = hidden
    assert traceback.extract_tb(caught.value.__traceback__)[-1].line == "model.transformer.h[1].output = hidden"


def test_a_block_under_no_grad(model, where):
    with torch.no_grad(), model.trace(PROMPT, **where):
        requires = model.transformer.h[0].output[0].requires_grad
        nnsight_save(requires)
        flags = [requires].save()
    assert flags == [False]


def nnsight_save(value):
    import nnsight

    return nnsight.save(value)
