"""What is written through the vocabulary is what plain hooks do at the same place, in place and by assignment."""

import pytest
import torch
from zoo import plain

from .cases import CASES, WITH_HEADS, Case, at, build, close, first, hook, inputs, wrap
from .plain_heads import DROPOUTS, attention_of, eager, recorded
from .test_heads import PATTERNS, implementations

LAYER = 1


def changed(value):
    """A change of all positions but the first that nothing evens out, in a copy."""
    value = value.clone()
    change_in_place(value)
    return value


def change_in_place(value):
    value[:, 1:] = value[:, 1:] * 1.5 + torch.linspace(-1, 1, value.shape[-1])


def by_hooks(case, net, given, place, shape):
    """The output of the model where a plain hook makes the change, and whether that has any effect."""

    def edit(value):
        change_in_place(value.view(*shape[:2], -1))

    module = at(case, net, LAYER, place)
    with torch.no_grad():
        before = first(net(**given))
        with plain.hooks(hook(module, place[1], edit)):
            after = first(net(**given))
    assert not close(before, after, 1e-3)
    return after


def by_names(model, given, write):
    with torch.no_grad(), model.trace(**given):
        write()
        return first(model.output)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stream(case: Case) -> None:
    model, names, net = wrap(case)
    given = inputs(case)
    places = {
        "resid_pre": ("", "in"),
        "attn_out": case.attn,
        "mixer_out": case.mixer,
        "resid_mid": case.mid,
        "cross_out": case.cross,
        "neurons": case.neurons,
        "mlp_out": case.mlp,
        "resid_post": ("", "out"),
    }
    done = 0
    for name, place in places.items():
        if at(case, net, LAYER, place) is None:
            continue
        values = getattr(names, name)
        with model.trace(**given):
            shape = values[LAYER].shape
        expected = by_hooks(case, net, given, place, shape)

        def in_place(values=values):
            change_in_place(values[LAYER])

        def assign(values=values):
            values[LAYER] = changed(values[LAYER])

        assert close(by_names(model, given, in_place), expected), name
        assert close(by_names(model, given, assign), expected), name
        done += 1
    assert done >= 3


@pytest.mark.parametrize("case", WITH_HEADS, ids=lambda case: case.name)
def test_results_and_mixed_values(case: Case) -> None:
    model, names, net = wrap(case)
    given = inputs(case)
    module = at(case, net, LAYER, (case.out, "in"))
    heads = names.count(names.row.heads.heads)

    def edit(value):
        by_head = value.view(*value.shape[:-1], heads, -1)
        by_head[..., 2, :] *= 3

    with torch.no_grad(), plain.hooks(hook(module, "in", edit)):
        expected = first(net(**given))
    head = names.heads[LAYER]

    def z_in_place():
        head.z[:, :, 2] *= 3

    def z_assigned():
        z = head.z.clone()
        z[:, :, 2] *= 3
        head.z = z

    def result_in_place():
        head.result[:, :, 2] *= 3

    def result_assigned():
        result = head.result.clone()
        result[:, :, 2] *= 3
        head.result = result

    for write in (z_in_place, z_assigned, result_in_place, result_assigned):
        assert close(by_names(model, given, write), expected), write.__name__


def ablate(value):
    """A change of head 1, as a block makes it."""
    value = value.clone()
    value[:, :, 1] = value[:, :, 1].flip(-1)
    return value


@pytest.mark.parametrize("case", [c for c in PATTERNS if c.family not in DROPOUTS], ids=lambda case: case.name)
def test_queries_keys_and_values(case: Case) -> None:
    plain_net, given = eager(case), inputs(case)
    module = attention_of(case, plain_net, LAYER)
    model, names, _ = wrap(case)
    rotates = names.row.heads.q_rot is not None
    for name in "qkv":
        ours = f"{name}_rot" if rotates and name != "v" else name
        with torch.no_grad(), recorded(plain_net, {(module, name): ablate}):
            expected = first(plain_net(**given))

        def in_place(ours=ours):
            value = getattr(names.heads[LAYER], ours)
            value[:, :, 1] = value[:, :, 1].flip(-1)

        def assign(ours=ours):
            setattr(names.heads[LAYER], ours, ablate(getattr(names.heads[LAYER], ours)))

        for write in (in_place, assign):
            assert close(by_names(model, given, write), expected), (name, write.__name__)


def uniform(weights):
    """Head 2 attends to every key alike."""
    weights = weights.clone()
    weights[:, 2] = 1 / weights.shape[-1]
    return weights


@implementations
def test_patterns(case: Case, implementation: str) -> None:
    plain_net, given = eager(case), inputs(case)
    with torch.no_grad(), recorded(plain_net, {(attention_of(case, plain_net, LAYER), "pattern"): uniform}):
        expected = first(plain_net(**given))
    model, names, _ = wrap(case, build(case, attn_implementation=implementation))

    def in_place():
        names.heads[LAYER].pattern[:, 2] = 1 / names.heads[LAYER].pattern.shape[-1]

    def assign():
        names.heads[LAYER].pattern = uniform(names.heads[LAYER].pattern)

    for write in (in_place, assign):
        assert close(by_names(model, given, write), expected), write.__name__


@pytest.mark.parametrize("name", ["falcon", "falcon_grouped", "falcon_alibi"])
def test_pattern_of_a_forward_that_calls_the_kernel_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    model, names, net = wrap(case)
    given, patterns = inputs(case), []

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert attn_mask is not None
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        masked = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        patterns.append(masked.softmax(-1))
        weights = uniform(patterns[-1]) if len(patterns) == LAYER + 1 else patterns[-1]
        return weights @ v

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        expected = first(net(**given))
    with model.trace(**given):
        found = [names.heads[i].pattern.clone() for i in range(3)]
    assert close(found[0], patterns[0])
    assert close(found[1], patterns[1])
    assert close(
        by_names(model, given, lambda: setattr(names.heads[1], "pattern", uniform(names.heads[1].pattern))), expected
    )


def test_falcon_computed_eagerly() -> None:
    case = next(case for case in CASES if case.name == "falcon")
    given = inputs(case)
    found = {}
    for implementation in ("sdpa", "eager"):
        model, names, _ = wrap(case, build(case, attn_implementation=implementation))
        with model.trace(**given):
            found[implementation] = names.heads[1].pattern.clone()
    assert close(found["sdpa"], found["eager"])
