"""Direct logit attribution: what each part of a model adds to a logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from nnsight import Envoy, LanguageModel, errors

from ._memory import Budget
from ._metrics import Answers, Scorer, logit_diff
from ._prompts import encode
from ._result import PAIR, Result
from ._runner import Runner
from ._sweep import sites_of

Unit = Literal["component", "head", "neuron"]
_WRITERS = ("attn_out", "mixer_out", "cross_out", "mlp_out")


def direct_logit_attribution(
    model: LanguageModel,
    prompts: Any,
    answer: Answers,
    other: Answers,
    unit: Unit = "component",
    *,
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
) -> Result:
    """What each part adds to the logit of `answer` less that of `other` at the last position (Elhage et al. 2021).

    The final norm is taken as the linear map that it is at the stream it is given: its scale is frozen.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import direct_logit_attribution
        >>> model = LanguageModel("nnsight/landmarks")
        >>> parts = direct_logit_attribution(model, "The Eiffel Tower is in the city of", " Paris", " Rome")
        >>> bool((parts.values.sum() - parts.baseline["logit_diff"]).abs() < 1e-3)
        True

    Args:
        model: The model.
        prompts: A prompt or a list of prompts: text or token ids.
        answer: A token, as text or id, for all prompts, or a list of one for each.
        other: As `answer`.
        unit: `component`: the embedding, each attention and MLP, and the biases behind the last layer, which add up to the
            logit difference; `head`: each head's part of its attention; `neuron`: each neuron's part of its MLP (what
            these leave of an attention or MLP is its bias).
        layers: Some layers only, of heads or neurons.
        memory: As for `activation_patching`.

    Returns:
        Parts of the logit difference, `[pair, component]`, `[pair, layer, head]` or `[pair, layer, neuron]`, with the
        baseline `logit_diff`; `pair` is there with a list of prompts.

    Raises:
        InputError: The logits are no linear map of the stream behind a norm (they are capped, say), or the stream is not the
            sum of its parts.
    """
    rows = encode(model, prompts)
    scorer = Scorer(logit_diff(answer, other), model, rows)
    runner = Runner(model, rows, scorer, Budget(memory))
    with torch.no_grad():
        parts, total = _components(model, runner)
        direction, constant = _direction(model, runner, scorer, parts)
        table = {name: (value * direction).sum(-1) for name, value in parts.items()}
        table["bias"] = constant
        _check_sum(torch.stack(list(table.values()), -1).sum(-1), total)
    labels: dict[str, Any] = {PAIR: tuple(range(len(rows)))}
    if unit == "component":
        values = torch.stack(list(table.values()), -1)
        labels["component"] = tuple(table)
    elif unit in ("head", "neuron"):
        read = _heads if unit == "head" else _neurons
        found = sites_of(model, "head_result" if unit == "head" else "neurons", layers)
        values = torch.stack([read(runner, site, direction) for site in found], 1)
        labels |= {"layer": tuple(site.layer for site in found), unit: tuple(range(values.shape[-1]))}
    else:
        raise errors.InputError(f"unit is 'component', 'head' or 'neuron', not {unit!r}.")
    baseline = {"logit_diff": total}
    result = Result(values.float(), labels, baseline, "logit_diff", f"direct logit attribution by {unit}")
    return result.select(pair=0) if rows.single else result


def _components(model: LanguageModel, runner: Runner) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is added to the stream at the last position, `[prompt, d_model]` by name, and the logit difference."""
    sites = {"embed": model.site("resid_pre", 0)}
    for layer in range(len(model.names.layers)):
        for name in _WRITERS:
            try:
                sites[f"{name.removesuffix('_out')} {layer}"] = model.site(name, layer)
            except errors.NamesError:
                continue
    last = model.site("resid_post", len(model.names.layers) - 1)
    values, total = runner.record([*sites.values(), last])
    parts = {name: values[site][:, -1].float() for name, site in sites.items()}
    stream = values[last][:, -1].float()
    if not torch.allclose(sum(parts.values()), stream, rtol=1e-3, atol=1e-3 * float(stream.abs().max())):  # pyright: ignore[reportArgumentType]
        raise errors.InputError("The stream of this model is not the sum of its embedding, attentions and MLPs.")
    return parts, total


def _direction(
    model: LanguageModel, runner: Runner, scorer: Scorer, parts: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The direction `[prompt, d_model]` of the stream that the logit difference measures, and its constant `[prompt]`."""
    first, second = scorer.targets.ids
    unembed = model.names.unembed
    weight = unembed.weight.float()
    towards = weight[first.to(weight.device)] - weight[second.to(weight.device)]
    stream: Any = sum(parts.values())
    scale, centred, bias = _frozen_norm(model.names.final_norm, stream)
    constant = (towards * bias).sum(-1)
    shift = getattr(unembed, "bias", None)
    if shift is not None:
        constant = constant + shift[first.to(weight.device)] - shift[second.to(weight.device)]
    direction = towards * scale
    return (direction - direction.mean(-1, keepdim=True) if centred else direction), constant.float()


def _frozen_norm(norm: Envoy, stream: torch.Tensor) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """A norm at `stream` `[prompt, d]` as a linear map: `scale * (x - mean(x)) + bias`, the mean only where it is centred.

    Norms differ in whether they take the mean off, and in whether their weight counts from one: what fits is taken.
    """
    weight = getattr(norm, "weight", None)
    bias = getattr(norm, "bias", None)
    ones = torch.ones_like(stream[:1])
    offset = torch.zeros_like(ones) if bias is None else bias.detach().float()
    expected = norm(stream if weight is None else stream.to(weight)).float() - offset
    weights = [ones] if weight is None else [weight.detach().float(), 1 + weight.detach().float()]
    for one in weights:
        for centred in (True, False):
            plain = one * (stream - stream.mean(-1, keepdim=True) if centred else stream)
            factor = (expected * plain).sum(-1, keepdim=True) / (plain * plain).sum(-1, keepdim=True)
            if torch.allclose(factor * plain, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                return factor * one, centred, offset
    raise errors.InputError(f"{norm!r} is no norm that is linear once its scale is frozen.")


def _check_sum(found: torch.Tensor, total: torch.Tensor) -> None:
    if not torch.allclose(found.cpu(), total, rtol=1e-2, atol=1e-2 * max(1.0, float(total.abs().max()))):
        raise errors.InputError(
            "The logits of this model are no linear map of its stream behind the final norm: they are capped or scaled."
        )


def _heads(runner: Runner, site: Any, direction: torch.Tensor) -> torch.Tensor:
    """Each head's part `[prompt, head]`."""
    results = runner.read(site)[:, -1].float()
    return (results * direction[:, None]).sum(-1).cpu()


def _neurons(runner: Runner, site: Any, direction: torch.Tensor) -> torch.Tensor:
    """Each neuron's part `[prompt, neuron]`: its value times what one of it adds, which the gradient tells."""
    output = runner.model.site("mlp_out", site.layer)

    def read(at: float, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        def act() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            neurons = site.read().detach().clone()
            leaf = (neurons * at).requires_grad_()
            site.write(leaf)
            return neurons, leaf, output.read()

        with torch.enable_grad():
            neurons, leaf, added = runner.observe(rows, 0, act)
            numbers = (added[:, -1].float() * direction[rows[0] : rows[-1] + 1]).sum(-1)
            slope = torch.autograd.grad(numbers.sum(), leaf)[0]
        return (neurons * slope)[:, -1].detach().float().cpu(), numbers.detach().cpu()

    def read_all(at: float) -> tuple[torch.Tensor, torch.Tensor]:
        parts = runner.budget.measure(range(len(runner.prompts)), lambda rows: read(at, rows))
        return torch.cat([found for found, _ in parts]), torch.cat([numbers for _, numbers in parts])

    found, with_neurons = read_all(1.0)
    _, without = read_all(0.0)
    if not torch.allclose(
        found.sum(-1), with_neurons - without, rtol=1e-3, atol=1e-3 * float(with_neurons.abs().max() + 1)
    ):
        raise errors.InputError(
            f"{output.name} of this model is no linear map of its neurons (a norm stands behind them)."
        )
    return found
