"""Lenses: what a residual stream says when it is read as the model reads its last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight import LanguageModel, errors

from ._groups import Group, Part
from ._memory import Budget
from ._progress import progress_bar
from ._prompts import encode, token_id
from ._result import PAIR, Result
from ._runner import Runner
from ._sweep import Patch, put, sites_of

Translate = Callable[[int, torch.Tensor], torch.Tensor]


class TopTokens:
    """Stands for a scorer: the probability of an answer, or of the likeliest token, and which token that is.

    It gives `[row, 2]`, or `[row, pos, 2]` where it looks at all positions.
    """

    whole = compares = False

    def __init__(self, model: LanguageModel, answer: str | int | None, keep: int | None) -> None:
        self.answer = None if answer is None else token_id(model, answer)
        self.keep = keep

    def learn(self, logits: torch.Tensor, prompts: torch.Tensor) -> None:
        """Nothing to compare with."""

    def __call__(self, output: Any, prompts: torch.Tensor) -> torch.Tensor:
        logits = output.logits if self.keep is None else output.logits[:, -1]
        probabilities = logits.detach().float().softmax(-1)
        best, token = probabilities.max(-1)
        chosen = best if self.answer is None else probabilities[..., self.answer]
        return torch.stack([chosen, token.float()], -1).cpu()


def logit_lens(
    model: LanguageModel,
    prompts: Any,
    answer: str | int | None = None,
    sites: str = "resid_post",
    *,
    layers: Sequence[int] | None = None,
    translate: Translate | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """The next token that each layer's stream would give if it were the last (nostalgebraist 2020).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import logit_lens
        >>> model = LanguageModel("nnsight/landmarks")
        >>> lens = logit_lens(model, "The Eiffel Tower is in the city of", progress=False)
        >>> lens.texts[-1]
        ' Paris'

    Args:
        model: The model.
        prompts: A prompt or a list of prompts: text or token ids.
        answer: The token whose probability is wanted; by default the likeliest.
        sites: `resid_pre`, `resid_mid` or `resid_post`.
        layers: Some layers only.
        translate: Changes a layer's stream `[row, pos, d_model]` before it is read, as a tuned lens does.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        Probabilities `[pair, layer, pos]`, with the likeliest token of each place as text; `pair` is there with a list of
        prompts. Positions that a shorter prompt does not have are NaN.

    Raises:
        InputError: The model's logits do not follow from its last layer alone.
    """
    rows = encode(model, prompts)
    runner = Runner(model, rows, TopTokens(model, answer, None), Budget(memory))
    found = sites_of(model, sites, layers)
    with torch.no_grad():
        values, _ = runner.record(found, keep_stream=True)
        if not runner.can_finish:
            raise errors.InputError(_NO_LENS)
        with progress_bar(len(found) * len(rows), "lens", progress) as bar:
            parts = []
            for site in found:
                stream = values[site] if translate is None else translate(site.layer, values[site])
                parts.append(runner.finish_all(stream))
                bar.update(len(rows))
    read = torch.stack(parts, 1)
    read[..., 0].masked_fill_(~rows.real()[:, None], torch.nan)
    axes = {PAIR: tuple(range(len(rows))), "layer": tuple(site.layer for site in found), "pos": rows.labels()}
    name = "probability" if answer is None else f"probability of {answer!r}"
    return table_of_tokens(model, read, axes, rows.single, name, f"logit lens of {sites}")


def patchscope(
    model: LanguageModel,
    prompt: Any,
    target: Any,
    *,
    target_pos: int = -1,
    target_layer: int | None = None,
    answer: str | int | None = None,
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """What the model itself says about its hidden states, when they are put into another prompt (Ghandeharioun et al. 2024).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import patchscope
        >>> model = LanguageModel("nnsight/landmarks")
        >>> scope = patchscope(
        ...     model, "The Eiffel Tower is in the city of", "The Colosseum is in the city of", progress=False
        ... )
        >>> scope.texts[-1]                                     # the last token's last hidden state
        ' Paris'

    Args:
        model: The model.
        prompt: The prompt whose hidden states are looked at.
        target: The prompt they are put into, as `"cat->cat; 135->135; hello->hello; ?"`.
        target_pos: The position there, which counts from the end where it is negative.
        target_layer: The layer there; by default that of each hidden state.
        answer: The token whose probability is wanted; by default the likeliest.
        layers: Some layers of the first prompt only.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        Probabilities `[layer, pos]` of the next token, for the stream behind each layer at each position of `prompt`, with the
        likeliest token as text.

    Raises:
        InputError: There is more than one prompt, or no such position.
    """
    rows, others = encode(model, prompt), encode(model, target)
    if len(rows) != 1 or len(others) != 1 or not -others.length <= target_pos < others.length:
        raise errors.InputError(f"A patchscope has one prompt and one target, with a token at {target_pos}.")
    scorer, budget = TopTokens(model, answer, 1), Budget(memory)
    found = sites_of(model, "resid_post", layers)
    runner = Runner(model, others, scorer, budget)
    values, _ = Runner(model, rows, scorer, budget).record(found)
    runner.record([], keep_stream=True)
    place = target_pos % others.length

    def group_of(source: Any) -> Group:
        site = model.site("resid_post", source.layer if target_layer is None else target_layer)
        patch = Patch(site, ((1, place),))

        def edit(positions: Sequence[int], prompts: torch.Tensor, _: Part | None) -> Callable[[], None]:
            new = values[source][0, list(positions), None]
            return lambda: put(site, [patch] * len(positions), prompts, lambda live, _, __: new.expand(live.shape))

        return Group([(pos, 0) for pos in range(rows.length)], site.layer or 0, edit)

    with progress_bar(len(found) * rows.length, "patchscope", progress) as bar, torch.no_grad():
        read = runner.run(map(group_of, found), bar.update).view(1, len(found), rows.length, 2)
    axes = {PAIR: (0,), "layer": tuple(site.layer for site in found), "pos": rows.labels()}
    name = "probability" if answer is None else f"probability of {answer!r}"
    return table_of_tokens(model, read, axes, True, name, "patchscope")


def table_of_tokens(
    model: LanguageModel, read: torch.Tensor, axes: dict[str, Any], single: bool, name: str, title: str
) -> Result:
    """Probabilities and tokens `[pair, …, 2]` as a result."""
    decode = _decoder(model)
    texts = tuple(decode(int(token)) for token in read[..., 1].flatten())
    result = Result(read[..., 0].clone(), axes, name=name, title=title, texts=texts)
    return result.select(pair=0) if single else result


def _decoder(model: LanguageModel) -> Callable[[int], str]:
    tokenizer = model.tokenizer
    return str if tokenizer is None else lambda token: tokenizer.decode([token])


_NO_LENS = """\
The logits of this model do not follow from what leaves its last layer alone, so no lens can read earlier ones the same \
way."""
