"""Direct logit attribution: what each part of the stream adds to the logits, through the final norm as it was, is all."""

import pytest
import torch
import zoo
from torch.nn import LayerNorm

from nnsight import NNsight

from .cases import BY_NAME, CASES, FAMILIES, Case, build, close

# Families whose logits are the unembedded output of a final norm.
DECODERS = [
    case
    for case in CASES
    if FAMILIES[case.family].kind == "decoder" and case.stack == "" and case.family not in ("opt_post",)
]


def frozen(norm, stream):
    """The final norm as a linear map of a part of `stream`, and the constant that it adds."""
    centred = isinstance(norm, LayerNorm)
    if centred:
        scale = norm.weight / (stream.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        return (lambda part: (part - part.mean(-1, keepdim=True)) * scale), norm.bias
    scale = norm(stream) / stream  # a root mean square norm scales each number
    return (lambda part: part * scale), None


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_parts_add_up_to_the_logits(case: Case) -> None:
    net = build(case)
    model = NNsight(net)
    names = model.names.stacks[case.stack]
    ids = torch.tensor(zoo.prompts((8,)))
    parts, values = [], names.names()
    with torch.no_grad(), model.trace(input_ids=ids):
        parts.append(names.resid_pre[0].clone())
        for index in range(len(names)):
            for name in ("mixer_out", "attn_out", "mlp_out"):
                if name in values and has(names, name, index):
                    parts.append(getattr(names, name)[index] * case.multiplier)
        stream = names.final_norm.input.clone()
        unembed = names.unembed._module
        unembedded = names.unembed.output.clone()
        logits = names.logits.clone()
    assert close(sum(parts), stream)
    linear, constant = frozen(names.final_norm._module, stream)
    with torch.no_grad():
        bias = unembed(torch.zeros(1, 1, stream.shape[-1], dtype=stream.dtype))
        total = sum(unembed(linear(part)) - bias for part in parts) + bias
        if constant is not None:
            total = total + unembed(constant) - bias
    assert close(total, unembedded)
    assert close(head(case, net.config, unembedded), logits)


def has(names, name, index) -> bool:
    try:
        names.access(name).module(index)
    except AttributeError:
        return False
    return True


def head(case, config, unembedded):
    if case.name == "gemma2":
        return torch.tanh(unembedded / 4.0) * 4.0
    return unembedded / config.logits_scaling if case.name == "granite" else unembedded


def test_results_of_all_heads_and_neurons_are_the_stream() -> None:
    """The stream of the last layer, taken apart down to single heads."""
    net = build(BY_NAME["llama"])
    model = NNsight(net)
    ids = torch.tensor(zoo.prompts((8,)))
    with model.trace(input_ids=ids):
        total = model.resid_pre[0].clone()
        for index in range(3):
            total = total + model.heads[index].result.sum(-2) + net.model.layers[index].self_attn.o_proj.bias
            down = net.model.layers[index].mlp.down_proj
            total = total + model.neurons[index] @ down.weight.T + down.bias
        assert close(total, model.resid_post[2])
