"""Result: the numbers that an experiment found, with the names of their axes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nnsight import errors

from ._result_file import read_file, write_file
from ._result_text import as_html, as_text, label_of

PAIR = "pair"


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What an experiment found: numbers, what each axis counts, and what they are to be compared with.

    Example:
        >>> import torch
        >>> from nnsight.experiments import Result
        >>> effects = Result(
        ...     values=torch.tensor([[0.0, 1.0], [3.0, 2.0]]),
        ...     axes={"layer": (0, 1), "pos": ("The", " Tower")},
        ...     baseline={"corrupted": torch.tensor(-1.0), "clean": torch.tensor(3.0)},
        ...     name="logit_diff",
        ... )
        >>> effects.normalized().values.tolist()
        [[0.25, 0.5], [1.0, 0.75]]
        >>> effects.best()
        {'layer': 1, 'pos': 'The'}

    Args:
        values: The numbers, a dimension for each axis, on the CPU.
        axes: Name of each axis, in order -> the label of each of its entries. An axis called `pair` counts the prompts.
        baseline: What the numbers are compared with: one number each, `[]` or `[pair]`, the zero of `normalized` first.
        name: What the numbers are: `"logit_diff"`.
        title: What was done.
        texts: What stands for each number in a table (the top token of a lens), in the order of `values.flatten()`.
        details: How it was done, as plain data.

    Raises:
        InputError: The labels do not fit the values.
    """

    values: torch.Tensor
    axes: Mapping[str, tuple[Any, ...]]
    baseline: Mapping[str, torch.Tensor] = field(default_factory=dict)
    name: str = "value"
    title: str = ""
    texts: tuple[str, ...] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes = {name: tuple(labels) for name, labels in self.axes.items()}
        lengths = [len(labels) for labels in axes.values()]
        if list(self.values.shape) != lengths:
            raise errors.InputError(f"Axes {_describe(axes)} do not fit values of shape {list(self.values.shape)}.")
        if self.texts is not None and len(self.texts) != self.values.numel():
            raise errors.InputError(f"{len(self.texts)} texts do not fit {self.values.numel()} values.")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "values", self.values.detach().cpu())
        baseline = {name: torch.as_tensor(value).detach().cpu() for name, value in self.baseline.items()}
        object.__setattr__(self, "baseline", baseline)

    # --- choosing --------------------------------------------------------------------------------------------

    def select(self, **labels: Any) -> Result:
        """The part at given labels: `result.select(layer=3, pos=" Tower")`; a list of labels keeps the axis.

        Example:
            >>> import torch
            >>> from nnsight.experiments import Result
            >>> result = Result(torch.arange(4.0).view(2, 2), {"layer": (0, 1), "head": (0, 1)})
            >>> result.select(layer=1).values.tolist(), result.select(head=[1]).values.tolist()
            ([2.0, 3.0], [[1.0], [3.0]])

        Raises:
            InputError: There is no such axis or label, or the label stands more than once.
        """
        found = self
        for axis, label in labels.items():
            found = found._select_one(axis, label)
        return found

    def _select_one(self, axis: str, label: Any) -> Result:
        dim = self._dim(axis)
        wanted = list(label) if isinstance(label, (list, tuple)) else [label]
        index = torch.tensor([self._find(axis, one) for one in wanted])
        places = torch.arange(self.values.numel()).view(self.values.shape).index_select(dim, index)
        axes = {**self.axes, axis: tuple(self.axes[axis][i] for i in index)}
        baseline = self.baseline
        if axis == PAIR:
            baseline = {name: value[index] if value.dim() else value for name, value in baseline.items()}
        if not isinstance(label, (list, tuple)):
            del axes[axis]
            places = places.squeeze(dim)
            if axis == PAIR:
                baseline = {name: value.squeeze(0) if value.dim() else value for name, value in baseline.items()}
        texts = None if self.texts is None else tuple(self.texts[i] for i in places.flatten())
        return replace(self, values=self.values.flatten()[places], axes=axes, baseline=baseline, texts=texts)

    def _dim(self, axis: str) -> int:
        if axis not in self.axes:
            raise errors.InputError(f"There is no axis {axis!r}; there are: {', '.join(self.axes)}.")
        return list(self.axes).index(axis)

    def _find(self, axis: str, label: Any) -> int:
        places = [i for i, known in enumerate(self.axes[axis]) if known == label]
        if len(places) != 1:
            count = f"{len(places)} times" if places else "not"
            raise errors.InputError(f"{label!r} stands {count} on the axis {axis!r}: {list(self.axes[axis])}.")
        return places[0]

    def best(self, smallest: bool = False) -> dict[str, Any]:
        """The labels of the largest value, the prompts averaged; of the smallest with `smallest=True`."""
        found = self.mean(PAIR) if PAIR in self.axes else self
        worst = float("inf") if smallest else -float("inf")
        values = found.values.nan_to_num(worst, float("inf"), -float("inf"))
        place = int(values.argmin() if smallest else values.argmax())
        where = torch.unravel_index(torch.tensor(place), found.values.shape)
        return {axis: labels[int(i)] for (axis, labels), i in zip(found.axes.items(), where, strict=True)}

    # --- numbers ---------------------------------------------------------------------------------------------

    def mean(self, axis: str = PAIR) -> Result:
        """The average over an axis, of the baseline too where that is the prompts' axis; NaN is left out.

        Raises:
            InputError: There is no such axis.
        """
        return self._reduce(axis, lambda values, dim: values.nanmean(dim))

    def _reduce(self, axis: str, reduce: Callable[[torch.Tensor, int], torch.Tensor]) -> Result:
        values = reduce(self.values, self._dim(axis))
        axes = {name: labels for name, labels in self.axes.items() if name != axis}
        baseline = self.baseline
        if axis == PAIR:
            baseline = {name: reduce(value, 0) if value.dim() else value for name, value in baseline.items()}
        return replace(self, values=values, axes=axes, baseline=baseline, texts=None)

    def normalized(self) -> Result:
        """The values on the scale where the first baseline is 0 and the second is 1.

        With one baseline, that is 1 (and 0 is 0). The prompts are scaled one by one; `result.mean().normalized()` scales
        their average, which a prompt that knows no difference cannot upset.

        Raises:
            InputError: There is no baseline, or the two are equal.
        """
        if not self.baseline:
            raise errors.InputError("This result has no baseline to normalize by.")
        *zeros, one = list(self.baseline)[:2]
        zero = self.baseline[zeros[0]] if zeros else torch.zeros_like(self.baseline[one])
        span = self.baseline[one] - zero
        if bool((span == 0).any()):
            raise errors.InputError(f"{' and '.join([*zeros, one])} give the same value, or zero: there is no scale.")
        values = (self.values - self._spread(zero)) / self._spread(span)
        baseline = {**dict.fromkeys(zeros, torch.zeros_like(span)), one: torch.ones_like(span)}
        return replace(self, values=values, baseline=baseline, name=f"{self.name}, normalized")

    def _spread(self, per_pair: torch.Tensor) -> torch.Tensor:
        if not per_pair.dim():
            return per_pair
        shape = [1] * self.values.dim()
        shape[self._dim(PAIR)] = -1
        return per_pair.view(shape)

    def bootstrap_ci(self, level: float = 0.95, samples: int = 1000, seed: int = 0) -> Result:
        """A confidence interval of the average over prompts, by the percentiles of resampled prompts (Efron 1979).

        Args:
            level: The share of resamples inside.
            samples: How many resamples.
            seed: Of the resamples.

        Returns:
            A result whose first axis is `bound`: `low`, `mean`, `high`.

        Raises:
            InputError: There is no `pair` axis of at least two prompts, or `level` is no share.
        """
        if len(self.axes.get(PAIR, ())) < 2 or not 0 < level < 1:
            raise errors.InputError("An interval needs at least two prompt pairs, and a level between 0 and 1.")
        values = self.values.movedim(self._dim(PAIR), 0)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
        means = torch.stack([values[rows].nanmean(0) for rows in drawn])
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
        low, high = means.nanquantile(tails, 0)
        average = self.mean(PAIR)
        axes = {"bound": ("low", "mean", "high"), **average.axes}
        return replace(average, values=torch.stack([low, average.values, high]), axes=axes)

    # --- out of here -----------------------------------------------------------------------------------------

    def to_dataframe(self) -> Any:
        """A pandas `DataFrame` with a row for each value: a column for each axis, `value`, and `text` if there are texts.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("A data frame needs pandas: pip install pandas") from error
        index = pandas.MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        columns: dict[str, Any] = {"value": self.values.flatten().float().numpy()}
        if self.texts is not None:
            columns["text"] = list(self.texts)
        return pandas.DataFrame(columns, index=index).reset_index()

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A heat map of the values, the prompts averaged; more than two axes are to be narrowed by `select` first.

        Args:
            path: A file to write too; its ending names the format.
            **options: Passed to `nnsight.plots.heatmap`.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            InputError: There are more than two axes.
            ImportError: matplotlib is not installed.
        """
        from nnsight import plots

        table = self.mean(PAIR) if PAIR in self.axes else self
        if len(table.axes) > 2:
            raise errors.InputError(
                f"A figure has two axes, not {_describe(table.axes)}: choose with result.select(...)."
            )
        rows, columns = table._table_labels()
        values = table.values.reshape(len(rows), len(columns))
        return plots.heatmap(
            values, rows=rows, columns=columns, title=self.title, value_label=self.name, path=path, **options
        )

    def _table_labels(self) -> tuple[list[str], list[str]]:
        """Labels of rows and columns, of a result with at most two axes."""
        labels = [
            [f"{axis} {label}" if isinstance(label, int) else label_of(label) for label in found]
            for axis, found in self.axes.items()
        ]
        if len(labels) == 2:
            return labels[0], labels[1]
        return [self.name], (labels[0] if labels else ["value"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, which `Result.load` reads."""
        write_file(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """The result that `save` wrote.

        Raises:
            InputError: The file is none of those.
        """
        return cls(**read_file(path))

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def _describe(axes: Mapping[str, Sequence[Any]]) -> str:
    return " × ".join(f"{name} {len(labels)}" for name, labels in axes.items()) or "(none)"
