"""The residual stream of every family: what plain hooks see, and the sum it is documented to be."""

import pytest
import torch

from .cases import CASES, Case, close, inputs, seen, shaped, wrap

VALUES = ("resid_pre", "attn_out", "mixer_out", "resid_mid", "cross_out", "neurons", "mlp_out", "resid_post")


def layer(names, index):
    """The values of a layer that it has, in order, as copies."""
    found = {}
    for name in VALUES:
        try:
            found[name] = getattr(names, name)[index].clone()
        except AttributeError:
            continue
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_what_hooks_see(case: Case) -> None:
    model, names, net = wrap(case)
    given = inputs(case)
    found = {}
    with model.trace(**given, strict_order=True):
        for index in range(len(names)):
            found[index] = layer(names, index)
    for index, values in found.items():
        expected = seen(case, net, index, given)
        assert values.keys() == expected.keys() & set(VALUES)
        for name, value in values.items():
            assert torch.equal(value, shaped(expected[name], value)), (index, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_stream_adds_up(case: Case) -> None:
    model, names, net = wrap(case)
    given = inputs(case)
    norms, last = post_norms(case, net), None
    with model.trace(**given):
        for index in range(len(names)):
            values = layer(names, index)
            pre, post = values["resid_pre"], values["resid_post"]
            added = [values[name] for name in ("attn_out", "mixer_out", "cross_out", "mlp_out") if name in values]
            assert len(added) in (1, 2, 3)
            if norms:
                total = pre
                for value, norm in zip(added, norms[index], strict=True):
                    total = norm(total + value)
                assert close(total, post)
            else:
                assert close(pre + case.multiplier * sum(added), post)
            if "resid_mid" in values and not norms:
                assert close(pre + case.multiplier * added[0], values["resid_mid"])
            assert last is None or torch.equal(pre, last)
            last = post


def post_norms(case, net):
    """The norms over the sums, where the family has them there."""
    paths = {
        "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
        "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
        "bart-encoder": ("self_attn_layer_norm", "final_layer_norm"),
        "bart-decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "opt_post": ("self_attn_layer_norm", "final_layer_norm"),
    }.get(case.name)
    return paths and [[block.get_submodule(path) for path in paths] for block in net.get_submodule(case.blocks)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modules(case: Case) -> None:
    _, names, net = wrap(case)
    assert [block._module for block in names.layers] == list(net.get_submodule(case.blocks))
    assert names.layers[-1].path == f"model.{case.blocks}.{len(names) - 1}"
    for name, owner in (("embed", "get_input_embeddings"), ("unembed", "get_output_embeddings")):
        try:
            envoy = getattr(names, name)
        except AttributeError:
            continue
        if case.family == "clip":  # two towers, which have no common embedding
            continue
        expected = getattr(net, owner)()
        assert envoy._module is expected or envoy._module.weight is expected.weight
