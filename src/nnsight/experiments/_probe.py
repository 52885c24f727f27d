"""fit_probe: what can be read off activations by a linear map, beside what the same probe reads off chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from nnsight import errors

from ._store import ActivationStore

Control = Literal["shuffled", "types"]
Kind = Literal["logistic", "linear"]


@dataclass(frozen=True)
class Probe:
    """A linear map from activations to labels, and how well it does on rows it was not fitted to.

    Attributes:
        kind: `"logistic"` or `"linear"`.
        weight: On activations as they are stored, `[class, d]`; `[1, d]` for numbers.
        bias: `[class]`.
        classes: The labels, in the order of `weight`; empty for numbers.
        score: Held-out accuracy; for numbers, the share of their variance that is explained (R²).
        train_score: The same on the rows it was fitted to.
        baseline: The held-out accuracy of always saying the most frequent label; 0 for numbers.
        control_score: The held-out score of a probe fitted to control labels, None without a control.
        train_rows: How many rows it was fitted to.
        test_rows: How many rows were held out.
    """

    kind: Kind
    weight: torch.Tensor
    bias: torch.Tensor
    classes: tuple[Any, ...]
    score: float
    train_score: float
    baseline: float
    control_score: float | None
    train_rows: int
    test_rows: int

    @property
    def selectivity(self) -> float | None:
        """How much better it does than on control labels (Hewitt & Liang 2019)."""
        return None if self.control_score is None else self.score - self.control_score

    def predict(self, activations: torch.Tensor) -> Any:
        """The label of each row of `[row, d]`: a list of labels, or numbers `[row]`."""
        found = activations.to(self.weight) @ self.weight.T + self.bias
        return [self.classes[i] for i in found.argmax(-1).tolist()] if self.classes else found[:, 0]

    def __repr__(self) -> str:
        control = "" if self.control_score is None else f", control {self.control_score:.3f}"
        name = "accuracy" if self.classes else "R²"
        return f"Probe({self.kind}: {name} {self.score:.3f} on {self.test_rows} held-out rows{control})"


def fit_probe(
    store: ActivationStore | torch.Tensor,
    labels: Any,
    *,
    site: str | None = None,
    kind: Kind = "logistic",
    control: Control | None = "shuffled",
    held_out: float = 0.2,
    l2: float = 1e-3,
    seed: int = 0,
) -> Probe:
    """Fit a linear probe to activations, and the same probe to labels without meaning (Hewitt & Liang 2019).

    Whole prompts are held out, so that no prompt is on both sides. What a probe scores on control labels it has by its own
    capacity; `selectivity` is what remains. The activations of the site are read into memory.

    Example:
        >>> import torch
        >>> from nnsight.experiments import fit_probe
        >>> activations = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
        >>> probe = fit_probe(activations, (activations[:, 3] > 0).long())
        >>> probe.score > 0.9, probe.control_score < 0.7
        (True, True)

    Args:
        store: A store, or activations `[row, d]`.
        labels: A label for each row, or for each prompt of the store: whole numbers, strings or truth values; for
            `kind="linear"`, numbers.
        site: Which site of the store, where it has several. What lies behind the position is one vector.
        kind: `"logistic"` for labels (least penalized cross entropy), `"linear"` for numbers (ridge regression).
        control: `"shuffled"` gives every row the label of another; `"types"` gives each token of the vocabulary a random
            label wherever it stands (the control task of Hewitt & Liang), which a probe can learn by heart.
        held_out: The share of prompts (or rows) that are held out.
        l2: The penalty on the squared weights, of activations scaled to variance 1.
        seed: Decides what is held out and what the control labels are.

    Returns:
        The probe with its scores.

    Raises:
        InputError: Labels and rows do not match, or there are not enough of them.
    """
    rows, groups, tokens = _rows_of(store, site)
    given, classes = _encode(_spread(labels, store, groups, len(rows)), kind)
    train, test = _split(groups, held_out, seed)
    if classes and len(given[train].unique()) < 2:
        raise errors.InputError("A probe needs at least two different labels among the rows it is fitted to.")
    fitted = _fit(rows[train], given[train], len(classes), l2)
    scores = [_score(rows[part], given[part], *fitted, bool(classes)) for part in (train, test)]
    baseline = (given[test] == given[train].mode().values).double().mean().item() if classes else 0.0
    told = None
    if control is not None:
        other = _control(given, tokens, control, seed)
        told = _score(rows[test], other[test], *_fit(rows[train], other[train], len(classes), l2), bool(classes))
    return Probe(kind, *fitted, classes, scores[1], scores[0], baseline, told, len(train), len(test))


def _rows_of(store: Any, site: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Activations `[row, d]`, the prompt and the token of each row."""
    if isinstance(store, torch.Tensor):
        return store.detach().flatten(1).float(), torch.arange(len(store)), None
    if site is None:
        if len(store.sites) != 1:
            raise errors.InputError(f"The store has several sites; choose one: site= one of {', '.join(store.sites)}.")
        site = store.sites[0]
    return store.read(site).flatten(1).float(), store["prompt"], store["token"]


def _spread(labels: Any, store: Any, groups: torch.Tensor, rows: int) -> Sequence[Any]:
    values = labels.tolist() if isinstance(labels, torch.Tensor) else list(labels)
    if len(values) == rows:
        return values
    if isinstance(store, ActivationStore) and len(values) == store.prompts:
        return [values[i] for i in groups.tolist()]
    prompts = f" of {store.prompts} prompts" if isinstance(store, ActivationStore) else ""
    raise errors.InputError(f"{len(values)} labels do not belong to {rows} rows{prompts}: give one for each.")


def _encode(values: Sequence[Any], kind: Kind) -> tuple[torch.Tensor, tuple[Any, ...]]:
    if kind == "linear":
        return torch.tensor(values, dtype=torch.float64), ()
    if kind != "logistic":
        raise errors.InputError(f'kind is "logistic" or "linear", not {kind!r}.')
    if any(isinstance(value, float) for value in values):
        raise errors.InputError(
            'Labels of a logistic probe are whole numbers or strings; for numbers use kind="linear".'
        )
    classes = tuple(sorted(set(values)))
    numbers = {value: i for i, value in enumerate(classes)}
    return torch.tensor([numbers[value] for value in values]), classes


def _split(groups: torch.Tensor, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    names = groups.unique()
    count = round(len(names) * held_out)
    if not 0 < count < len(names):
        raise errors.InputError(
            f"held_out={held_out} of {len(names)} prompts leaves nothing to fit or nothing to test."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    test = torch.isin(groups, names[order[:count]])
    return (~test).nonzero().squeeze(1), test.nonzero().squeeze(1)


def _control(labels: torch.Tensor, tokens: torch.Tensor | None, control: str, seed: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed + 1)
    if control == "shuffled":
        return labels[torch.randperm(len(labels), generator=chance)]
    if control != "types":
        raise errors.InputError(f'control is "shuffled", "types" or None, not {control!r}.')
    if tokens is None:
        raise errors.InputError('control="types" needs the tokens of a store; for plain activations use "shuffled".')
    kinds, numbers = tokens.unique(return_inverse=True)
    return labels[torch.randint(len(labels), (len(kinds),), generator=chance)][numbers]


def _fit(rows: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias on the rows as they are; they are scaled to mean 0 and variance 1 for the fit."""
    rows = rows.double()
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    deviation = torch.where(deviation > 1e-8, deviation, 1.0)
    scaled = (rows - mean) / deviation
    weight, bias = _fit_logistic(scaled, labels, classes, l2) if classes else _fit_ridge(scaled, labels, l2)
    weight = weight / deviation
    return weight.float(), (bias - weight @ mean).float()


def _fit_ridge(rows: torch.Tensor, labels: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean = labels.mean()
    gram = rows.T @ rows / len(rows) + l2 * torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.linalg.solve(gram, rows.T @ (labels - mean) / len(rows))[None], mean[None]


def _fit_logistic(
    rows: torch.Tensor, labels: torch.Tensor, classes: int, l2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=rows.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        found = functional.cross_entropy(rows @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        step: Callable[..., Any] = solver.step
        step(loss)
    return weight.detach(), bias.detach()


def _score(rows: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, classes: bool) -> float:
    found = rows @ weight.T + bias
    if classes:
        return (found.argmax(-1) == labels).double().mean().item()
    residual = (found[:, 0] - labels).square().sum()
    return (1 - residual / (labels - labels.mean()).square().sum().clamp_min(1e-12)).item()
