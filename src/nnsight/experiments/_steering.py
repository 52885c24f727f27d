"""Steering: a direction of the residual stream, found from examples and added while the model runs."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from nnsight import LanguageModel, errors

from ._memory import Budget
from ._prompts import encode
from ._runner import Runner
from ._scoring import NoScore

Method = Literal["diff_of_means", "pca"]


def steering_vector(
    model: LanguageModel,
    positive: Any,
    negative: Any,
    site: str = "resid_post",
    layer: int = -1,
    method: Method = "diff_of_means",
    *,
    position: int | None = -1,
    memory: int | str = "1GB",
) -> torch.Tensor:
    """The direction in which prompts of one kind differ from those of another.

    `diff_of_means` is the difference of the averages (Panickssery et al. 2023, Marks & Tegmark 2023); `pca` is the first
    principal component of the differences of pairs, pointing to the positive ones, as long as their average along it
    (Zou et al. 2023).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import steering_vector
        >>> model = LanguageModel("nnsight/landmarks")
        >>> paris = ["The Eiffel Tower is in the city of", "The Louvre is in the city of"]
        >>> rome = ["The Colosseum is in the city of", "The Pantheon is in the city of"]
        >>> steering_vector(model, paris, rome, layer=8).shape
        torch.Size([128])

    Args:
        model: The model.
        positive: Prompts of the one kind.
        negative: Prompts of the other; for `pca` as many, each a pair with its positive one.
        site: A value of the vocabulary: `[d_model]`, or `[head, d_head]` of all heads.
        layer: Its layer, from the last one where negative.
        method: `diff_of_means` or `pca`.
        position: At which token, from the end where negative; None averages over all tokens.
        memory: As for `activation_patching`.

    Returns:
        The vector, in the shape of the value at one position.

    Raises:
        InputError: The method is none of these, the prompts do not pair, or one has no such position.
    """
    if method not in get_args(Method):
        raise errors.InputError(f"method is 'diff_of_means' or 'pca', not {method!r}.")
    budget = Budget(memory)
    ups, downs = (_values_at(model, prompts, site, layer, position, budget) for prompts in (positive, negative))
    if method == "diff_of_means":
        return ups.mean(0) - downs.mean(0)
    if len(ups) != len(downs):
        raise errors.InputError(f"For 'pca', {len(ups)} positive prompts do not pair with {len(downs)} negative ones.")
    changes = (ups - downs).flatten(1)
    # The differences point the same way already: the component is taken around zero, not around their mean.
    direction = torch.linalg.svd(changes.float(), full_matrices=False).Vh[0].to(changes)
    along = (changes @ direction).mean()
    return (direction * along).view(ups.shape[1:])


def _values_at(
    model: LanguageModel, prompts: Any, site: str, layer: int, position: int | None, budget: Budget
) -> torch.Tensor:
    """The value at one position, or the average, `[prompt, …]`."""
    rows = encode(model, prompts)
    runner = Runner(model, rows, NoScore(), budget)
    found = model.site(site, layer)
    if found.axes[1] != "pos":
        raise errors.InputError(f"{site} has no positions to steer at.")
    values = runner.read(found)
    real = rows.real().to(values.device)
    if position is None:
        return torch.stack([value[kept].mean(0) for value, kept in zip(values, real, strict=True)])
    lengths = [len(row) for row in rows.rows]
    if any(not -length <= position < length for length in lengths):
        raise errors.InputError(f"A prompt has no token at {position}: the shortest has {min(lengths)}.")
    places = [position if position < 0 else values.shape[1] - length + position for length in lengths]
    return torch.stack([value[place] for value, place in zip(values, places, strict=True)])


def steer(
    model: LanguageModel,
    vector: torch.Tensor,
    layer: int,
    *,
    site: str = "resid_post",
    strength: float = 1.0,
    inplace: bool = False,
) -> Any:
    """`model.steer(vector, layer)`, as a function.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import steer, steering_vector
        >>> model = LanguageModel("nnsight/landmarks")
        >>> vector = steering_vector(
        ...     model, ["The Colosseum is in the city of"], ["The Eiffel Tower is in the city of"], layer=8
        ... )
        >>> with steer(model, vector, 8) as steered:
        ...     with steered.trace("The Eiffel Tower is in the city of"):
        ...         logits = steered.logits.save()
        >>> model.tokenizer.decode(logits[0, -1].argmax())
        ' Rome'

    Args:
        model: The model.
        vector: In the shape of the value at one position, as `steering_vector` gives it.
        layer: As for `model.steer`, and so the others.
        site: The value it is added to.
        strength: How many times it is added.
        inplace: Steer `model` until `model.clear_edits()`, without a `with` statement.

    Returns:
        A context whose `as` value is `model`, steered until its end. Its attribute `model` is a second model that shares the
        weights and stays steered.

    Raises:
        InputError: The vector is none that can be added there.
    """
    return model.steer(vector, layer, site=site, strength=strength, inplace=inplace)
