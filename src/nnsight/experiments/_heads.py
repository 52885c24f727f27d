"""detect_heads: heads that attend as known kinds of heads do."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from nnsight import LanguageModel, errors

from ._memory import Budget
from ._prompts import encode
from ._result import Result
from ._runner import Runner
from ._scoring import NoScore
from ._sweep import sites_of

Kind = Literal["induction", "previous_token", "duplicate_token"]


def detect_heads(
    model: LanguageModel,
    kind: Kind = "induction",
    *,
    length: int = 24,
    prompts: int = 8,
    seed: int = 0,
    memory: int | str = "1GB",
) -> Result:
    """How much each head attends as a kind of head does, on random tokens that are said twice (Olsson et al. 2022).

    An `induction` head attends to the token behind the same token's earlier place, a `duplicate_token` head to that place
    itself, a `previous_token` head to the token just before.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import detect_heads
        >>> model = LanguageModel("nnsight/landmarks")
        >>> scores = detect_heads(model, "previous_token")
        >>> list(scores.axes), bool((scores.values <= 1).all())
        (['layer', 'head'], True)

    Args:
        model: The model.
        kind: `induction`, `previous_token` or `duplicate_token`.
        length: How many random tokens, which then are repeated.
        prompts: How many such sequences.
        seed: Of the tokens.
        memory: As for `activation_patching`.

    Returns:
        The average attention `[layer, head]` to the one place that this kind attends to; the baseline `uniform` is that of a
        head that attends to all places it sees alike.

    Raises:
        InputError: There is no such kind.
        NamesError: The model shows no attention patterns.
    """
    if kind not in get_args(Kind) or length < 2 or prompts < 1:
        raise errors.InputError(f"kind is one of {', '.join(get_args(Kind))}, with at least two tokens; not {kind!r}.")
    model.dispatch()
    ids, start = _repeated(model, length, prompts, seed)
    back = {"induction": length - 1, "previous_token": 1, "duplicate_token": length}[kind]
    first = start + length if kind != "previous_token" else 1
    queries = torch.arange(first, ids.shape[1])
    sites = sites_of(model, "head_pattern")
    runner = Runner(model, encode(model, list(ids)), NoScore(), Budget(memory))
    scores = []
    for site in sites:  # one layer at a time: patterns are large
        pattern = runner.read(site)
        scores.append(pattern[:, :, queries, queries - back].float().mean((0, 2)))
    uniform = (1 / (queries + 1)).mean()
    axes: dict[str, Any] = {"layer": tuple(site.layer for site in sites), "head": tuple(range(len(scores[0])))}
    return Result(torch.stack(scores), axes, {"uniform": uniform}, "attention", f"{kind.replace('_', ' ')} heads")


def _repeated(model: LanguageModel, length: int, count: int, seed: int) -> tuple[torch.Tensor, int]:
    """Token ids `[prompt, pos]` said twice, behind the token that begins a text where there is one, and where they start."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.names.embed.weight.shape[0])
    drawn = torch.stack([torch.randperm(vocabulary, generator=generator)[:length] for _ in range(count)])
    if drawn.shape[1] < length:
        raise errors.InputError(f"The model has {vocabulary} tokens; length={length} is more.")
    begin = getattr(model.tokenizer, "bos_token_id", None)
    prefix = torch.full((count, 0 if begin is None else 1), 0 if begin is None else begin)
    return torch.cat([prefix, drawn, drawn], 1), prefix.shape[1]
