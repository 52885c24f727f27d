"""measure: a metric of prompts in the plain run."""

from __future__ import annotations

from typing import Any

from nnsight import LanguageModel

from ._memory import Budget
from ._metrics import Metric, Scorer
from ._prompts import encode
from ._result import PAIR, Result
from ._runner import Runner


def measure(model: LanguageModel, prompts: Any, metric: Metric | Any, *, memory: int | str = "1GB") -> Result:
    """The metric of each prompt, with nothing changed.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import measure, rank
        >>> model = LanguageModel("nnsight/landmarks")
        >>> measure(model, "The Eiffel Tower is in the city of", rank(" Paris")).values
        tensor(0.)

    Args:
        model: The model.
        prompts: A prompt or a list of prompts: text or token ids.
        metric: As for `activation_patching`.
        memory: As for `activation_patching`.

    Returns:
        One number, or with a list of prompts `[pair]`.
    """
    rows = encode(model, prompts)
    scorer = Scorer(metric, model, rows)
    _, numbers = Runner(model, rows, scorer, Budget(memory)).record([])
    if not scorer.per_pair:
        return Result(numbers[0], {}, name=scorer.name)
    return Result(numbers, {PAIR: tuple(range(len(rows)))}, name=scorer.name)
