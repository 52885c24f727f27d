"""Metrics: one number for each prompt from the logits of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import log_softmax

from nnsight import LanguageModel, errors

from ._prompts import Prompts, token_id

Answer = str | int
Answers = Answer | Sequence[Answer]
Compute = Callable[["Targets", torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Metric:
    """A number for each prompt, from the logits at one position; made by `logit_diff`, `prob`, `kl`, ….

    Any function of a model's output can stand for one: it is called with the output of the batch of prompts, whose
    `.logits` are `[prompt, pos, vocab]`, and returns one number for each, or one for all.

    Args:
        name: What it is called in a result.
        compute: From targets and logits `[row, pos, vocab]` to numbers `[row]`.
        answers: The answer tokens by role, each one for all prompts or one for each.
        keep: How many positions from the end it looks at; None: all.
        compares: Whether it compares with the clean run's logits.
        larger_is_better: Whether a larger number means that the model does better.
    """

    name: str
    compute: Compute
    answers: tuple[Answers, ...] = ()
    keep: int | None = 1
    compares: bool = False
    larger_is_better: bool = True


@dataclass(frozen=True)
class Targets:
    """What a metric compares the logits of some rows with.

    Args:
        ids: The answers' token ids `[row]`, by role.
        reference: The clean run's log probabilities `[row, vocab]`.
        tokens: The prompts' own ids `[row, pos]`, and `real` where they are no padding.
    """

    ids: tuple[torch.Tensor, ...]
    reference: torch.Tensor | None
    tokens: torch.Tensor
    real: torch.Tensor

    def at(self, rows: torch.Tensor) -> Targets:
        """The targets of these rows."""
        reference = None if self.reference is None else self.reference[rows]
        return Targets(tuple(ids[rows] for ids in self.ids), reference, self.tokens[rows], self.real[rows])


class Scorer:
    """A metric of certain prompts: from logits and the number of each row's prompt to numbers."""

    def __init__(self, metric: Any, model: LanguageModel, prompts: Prompts) -> None:
        self.metric: Metric | None = metric if isinstance(metric, Metric) else None
        self.function: Any = metric
        if self.metric is None and not callable(metric):
            raise errors.InputError(f"A metric is one of nnsight.experiments or a function, not {metric!r}.")
        self.keep = self.metric.keep if self.metric is not None else None
        self.name = self.metric.name if self.metric is not None else getattr(metric, "__name__", "metric")
        self.compares = self.metric is not None and self.metric.compares
        self.count = len(prompts)
        self.per_pair = not prompts.single
        answers = self.metric.answers if self.metric is not None else ()
        ids = tuple(_answer_ids(model, one, len(prompts)) for one in answers)
        tokens = torch.zeros(len(prompts), prompts.length, dtype=torch.long)
        for i, row in enumerate(prompts.rows):
            tokens[i, prompts.length - len(row) :] = row
        self.targets = Targets(ids, None, tokens, prompts.real())

    @property
    def whole(self) -> bool:
        """Whether it is to be given all prompts at once, in order."""
        return self.metric is None

    def learn(self, logits: torch.Tensor, prompts: torch.Tensor) -> None:
        """Compare these prompts with their logits `[prompt, pos, vocab]` of the clean run from now on.

        The first run counts; what has a reference keeps it.
        """
        if not self.compares:
            return
        found = log_softmax(logits[:, -1].detach().float(), -1).cpu()
        if self.targets.reference is None:
            self.targets = replace(self.targets, reference=torch.full((self.count, found.shape[-1]), torch.nan))
        assert self.targets.reference is not None
        new = self.targets.reference[prompts].isnan().all(-1)
        self.targets.reference[prompts[new]] = found[new]

    def __call__(self, output: Any, prompts: torch.Tensor) -> torch.Tensor:
        """The numbers `[row]`, of rows that belong to these `prompts` (all of them, in order, if `whole`)."""
        logits = output.logits
        if self.metric is not None:
            targets = self.targets.at(prompts)
            device = logits.device
            moved = Targets(
                tuple(ids.to(device) for ids in targets.ids),
                None if targets.reference is None else targets.reference.to(device),
                targets.tokens.to(device),
                targets.real.to(device),
            )
            return self.metric.compute(moved, logits)
        numbers = [self._apply(output, logits[i : i + self.count]) for i in range(0, len(logits), self.count)]
        return torch.cat(numbers)

    def _apply(self, output: Any, logits: torch.Tensor) -> torch.Tensor:
        found = torch.as_tensor(self.function(type(output)(logits=logits)))
        if found.shape == (self.count,):
            self.per_pair = self.per_pair or self.count > 1
            return found
        if found.dim() == 0 or found.shape == (1,):
            self.per_pair = self.per_pair and self.count == 1
            return found.reshape(1).expand(self.count)
        raise errors.InputError(
            f"The metric {self.name} returned a tensor of shape {list(found.shape)} for {self.count} prompts: return one "
            f"number for each, [{self.count}], or one for all of them."
        )


def _answer_ids(model: LanguageModel, answers: Answers, count: int) -> torch.Tensor:
    if isinstance(answers, (str, int)):
        return torch.full((count,), token_id(model, answers))
    found = torch.tensor([token_id(model, int(one) if isinstance(one, torch.Tensor) else one) for one in answers])
    if len(found) != count:
        raise errors.InputError(f"{len(found)} answers do not pair with {count} prompts: give one, or one for each.")
    return found


def logit_diff(answer: Answers, other: Answers) -> Metric:
    """The logit of `answer` less that of `other`, at the last position (Wang et al. 2022).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import logit_diff, measure
        >>> model = LanguageModel("nnsight/landmarks")
        >>> bool(measure(model, "The Eiffel Tower is in the city of", logit_diff(" Paris", " Rome")).values > 0)
        True

    Args:
        answer: A token, as text or id, for all prompts, or a list of one for each prompt.
        other: As `answer`.
    """
    return Metric("logit_diff", _logit_diff, (answer, other))


def prob(answer: Answers) -> Metric:
    """The probability of `answer` (one token, or one for each prompt) at the last position."""
    return Metric("prob", lambda targets, logits: _log_probs(targets, logits).exp(), (answer,))


def log_prob(answer: Answers) -> Metric:
    """The logarithm of the probability of `answer` (one token, or one for each prompt) at the last position."""
    return Metric("log_prob", _log_probs, (answer,))


def rank(answer: Answers) -> Metric:
    """How many tokens have a larger logit than `answer` (one token, or one for each prompt) at the last position."""
    return Metric("rank", _rank, (answer,), larger_is_better=False)


def kl() -> Metric:
    """How far the next token's distribution is from the clean run's: KL(clean ‖ this), in nats."""
    return Metric("kl", _kl, compares=True, larger_is_better=False)


def cross_entropy(answer: Answers | None = None) -> Metric:
    """The loss in nats: of `answer` at the last position, or of the prompt's own tokens, each from those before it.

    Args:
        answer: One token, or one for each prompt; None takes the prompt itself and averages over its positions.
    """
    if answer is None:
        return Metric("cross_entropy", _own_cross_entropy, keep=None, larger_is_better=False)
    minus = lambda targets, logits: -_log_probs(targets, logits)  # noqa: E731
    return Metric("cross_entropy", minus, (answer,), larger_is_better=False)


def _pick(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, ids[:, None])[:, 0]


def _logit_diff(targets: Targets, logits: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1].float()
    return _pick(last, targets.ids[0]) - _pick(last, targets.ids[1])


def _log_probs(targets: Targets, logits: torch.Tensor) -> torch.Tensor:
    return _pick(log_softmax(logits[:, -1].float(), -1), targets.ids[0])


def _rank(targets: Targets, logits: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1].float()
    return (last > _pick(last, targets.ids[0])[:, None]).sum(-1).float()


def _kl(targets: Targets, logits: torch.Tensor) -> torch.Tensor:
    assert targets.reference is not None
    found = log_softmax(logits[:, -1].float(), -1)
    possible = targets.reference > -torch.inf  # a token that the clean run excludes adds nothing
    terms = targets.reference.exp() * (targets.reference - found)
    return torch.where(possible, terms, 0.0).sum(-1)


def _own_cross_entropy(targets: Targets, logits: torch.Tensor) -> torch.Tensor:
    found = log_softmax(logits[:, :-1].float(), -1).gather(-1, targets.tokens[:, 1:, None])[..., 0]
    real = targets.real[:, :-1]  # the first real token has nothing before it
    return -(found * real).sum(-1) / real.sum(-1)
