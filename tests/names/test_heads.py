"""The heads of every family: results add up, queries, keys, values and patterns are those the eager model uses."""

import pytest
import torch

from .cases import WITH_HEADS, Case, at, build, close, first, inputs, seen, wrap
from .plain_heads import DROPOUTS, EAGER_ONLY, attention_of, eager, recorded

TRANSPOSED = ("t5-decoder", "t5_gated-decoder", "bart-decoder", "whisper-decoder")
SEEN_ELSEWHERE = {"falcon", "falcon_grouped", "falcon_alibi"}  # their attention is in their own forward
PATTERNS = [case for case in WITH_HEADS if case.name not in SEEN_ELSEWHERE]
implementations = pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, implementation, id=f"{case.name}-{implementation}")
        for case in PATTERNS
        for implementation in ("eager", "sdpa")
        if implementation == "eager" or case.family not in EAGER_ONLY
    ],
)
# Scaled by the model before the attention function is called, which it tells not to.
SCALED = {"opt", "opt_post", "whisper-encoder", "whisper-decoder"}


def attending(case, net):
    return [i for i in range(len(net.get_submodule(case.blocks))) if attention_of(case, net, i) is not None]


@pytest.mark.parametrize("case", WITH_HEADS, ids=lambda case: case.name)
def test_results_add_up_to_the_output(case: Case) -> None:
    model, names, net = wrap(case)
    given, found = inputs(case), {}
    with model.trace(**given, strict_order=True):
        for index in attending(case, net):
            head = names.heads[index]
            found[index] = head.z.clone(), head.result.clone()
    assert found
    for index, (z, result) in found.items():
        hooks = seen(case, net, index, given)
        out = at(case, net, index, (case.out, "out"))
        assert close(z.flatten(-2), hooks["z"])
        none = torch.zeros_like(hooks["z"])
        assert close(result.sum(-2) + out(none), hooks["projected"])
        for head in range(z.shape[2]):
            alone = none.clone().unflatten(-1, z.shape[2:])
            alone[:, :, head] = z[:, :, head]
            assert close(result[:, :, head], out(alone.flatten(-2)) - out(none))


@implementations
def test_patterns_are_those_of_the_eager_model(case: Case, implementation: str) -> None:
    plain = eager(case)
    given, found = inputs(case), {}
    with recorded(plain) as expected:
        plain(**given)
    net = build(case, attn_implementation=implementation)
    model, names, _ = wrap(case, net)
    with model.trace(**given, strict_order=True):
        for index in attending(case, net):
            found[index] = names.heads[index].pattern.clone()
        output = first(model.output)
    for index, pattern in found.items():
        assert close(pattern, expected.pattern[attention_of(case, plain, index)])
    assert close(output, first(net(**given)))


@pytest.mark.parametrize("case", [case for case in PATTERNS if case.family not in DROPOUTS], ids=lambda case: case.name)
def test_queries_keys_and_values_are_those_of_the_eager_model(case: Case) -> None:
    plain = eager(case)
    given = inputs(case)
    with recorded(plain) as expected:
        plain(**given)
    net = build(case)
    model, names, _ = wrap(case, net)
    found = {}
    with model.trace(**given, strict_order=True):
        for index in attending(case, net):
            head = names.heads[index]
            found[index] = {}
            for name in "q k v q_rot k_rot".split():
                try:
                    found[index][name] = getattr(head, name).clone()
                except AttributeError:
                    continue
    for order, (index, values) in enumerate(found.items()):
        module = attention_of(case, plain, index)
        scale = module.scaling if case.name in SCALED else 1.0
        if case.family == "deepseek_v3":
            assert close(values["q_rot"], expected.q[module])
            assert close(values["k_rot"], expected.k[module])
            assert close(values["k"], expected.k[module][..., :8])  # the rest is shared by all heads, and rotated
        elif "q_rot" in values:
            assert close(values["q_rot"], expected.q[module])
            assert close(values["k_rot"], expected.k[module])
            q, k = expected.unrotated[order]
            norms = [getattr(module, f"{name}_norm", None) for name in "qk"]
            for name, norm, used in zip("qk", norms, (q, k), strict=True):
                assert close(normed(norm, values[name]), used)
        else:
            assert close(values["q"] * scale, expected.q[module])
            assert close(values["k"], expected.k[module])
        assert close(values["v"], expected.v[module])


def normed(norm, value):
    """As the model norms queries and keys: each head by itself, or all heads together."""
    if norm is None:
        return value
    together = norm.weight.shape[0] != value.shape[-1]
    return norm(value.flatten(-2)).view(value.shape) if together else norm(value)
