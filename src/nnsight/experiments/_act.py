"""Acting out an intervention in a run: which part of a value is meant, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from nnsight import errors

from ._corpus import encode_prompts
from ._places import Place, find_place
from ._window import Cells, Window


def prepare(model: Any, one: Any) -> tuple[str, Callable[[], Callable[[int], None]]]:
    """A name, and what begins each run of `model` under an intervention."""
    if hasattr(model, "dispatch"):
        model.dispatch()
    place = find_place(model, one.site)
    if one.heads is not None and "head" not in place.axes:
        raise errors.InputError(f"{place.key} has no heads, but {', '.join(place.axes)}; leave heads= out.")
    if place.axes[:2] != ("batch", "pos") and not {"batch", "query"} <= set(place.axes):
        raise errors.InputError(f"{place.key} has the axes {place.axes}, not batch and position.")
    value, positions = one.value, one.positions
    if one.operation == "swap":
        value, positions = _other_run(model, place, one.prompt, positions)
    elif one.operation == "project_out":
        value = _basis(value)
    return f"the intervention {one.operation!r} at {place.key}", _Actor(model, place, one, value, positions)


class _Actor:
    """Changes one value at each step of a run."""

    def __init__(
        self, model: Any, place: Place, one: Any, value: torch.Tensor | None, positions: str | tuple[int, ...]
    ) -> None:
        self._model = model
        self._place = place
        self._one = one
        self._value = value
        self._positions = positions
        self._batch = place.axes.index("batch")
        self._pos = place.axes.index("pos" if "pos" in place.axes else "query")
        self._entrance = _entrance(model)

    @property
    def change(self) -> dict[str, Any]:
        """The same as data, for engines that need no code for it."""
        place, one = self._place, self._one
        said = {"key": place.key, "target": place.target, "kind": place.kind, "operation": one.operation}
        parts = {"factor": one.factor, "rows": one.rows, "heads": one.heads, "steps": one.steps}
        return {**said, **parts, "value": self._value, "positions": self._positions}

    def __call__(self) -> Callable[[int], None]:
        """Begin a run: what to do at each step."""
        window = Window(self._positions, self._one.rows, self._place.key)

        def act(step: int) -> None:
            args, kwargs = self._entrance.inputs
            window.move(step, args, kwargs)
            if self._one.steps is not None and step not in self._one.steps:
                return
            cells = window.cells()
            if cells is not None and not len(cells.rows):
                return
            found = self._place.read()
            value = found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found
            self._check(value, window)
            self._place.write(self._change(value, cells))

        return act

    def _check(self, value: Any, window: Window) -> None:
        expected = (window.batch, window.width)
        if (isinstance(value, torch.Tensor) and value.dim() == len(self._place.axes)) or self._place.kind:
            if isinstance(value, torch.Tensor) and value.dim() >= 3:
                if (value.shape[self._batch], value.shape[self._pos]) == expected:
                    return
        shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise errors.RowsError(
            f"{self._place.key} is {shape}, not [batch, pos, …] of {expected[0]} rows and {expected[1]} positions, so the "
            "intervention's rows and positions cannot be told apart there."
        )

    def _change(self, value: torch.Tensor, cells: Cells | None) -> torch.Tensor:
        """The value with its chosen cells changed; None are all of them."""
        front = value.movedim((self._batch, self._pos), (0, 1))  # [batch, pos, …]
        if cells is None:
            changed = self._keep_heads(front, self._operate(front, self._fit(front.shape[2:], None)))
        else:
            rows, places = cells.rows.to(value.device), cells.places.to(value.device)
            chosen = front[rows, places]  # [cell, …]
            new = self._keep_heads(chosen, self._operate(chosen, self._fit(front.shape[2:], cells.numbers)))
            changed = front.clone()
            changed[rows, places] = new
        return changed.movedim((0, 1), (self._batch, self._pos))

    def _fit(self, shape: torch.Size, numbers: torch.Tensor | None) -> torch.Tensor | None:
        """The intervention's value for cells of a shape; of several, each cell's own."""
        value, name = self._value, self._one.operation
        if value is None:
            return None
        if name == "project_out":
            if value.shape[0] != shape[-1]:
                raise errors.InputError(f"A direction at {self._place.key} is [{shape[-1]}], not [{value.shape[0]}].")
            return value
        if value.dim() == len(shape) + 1 and numbers is not None and len(value) == len(self._positions):
            if value.shape[1:] == shape:
                return value[numbers.to(value.device)]
        if value.dim() > len(shape) or value.shape != shape[len(shape) - value.dim() :]:
            raise errors.InputError(
                f"The value of {name!r} at {self._place.key} is {list(value.shape)}; there it is {list(shape)}, or one such "
                "for each position of a list."
            )
        return value

    def _operate(self, old: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        name, factor = self._one.operation, self._one.factor
        if value is None:
            return old * factor if name == "scale" else torch.zeros_like(old)
        value = value.to(old.device, old.dtype)
        factor = 1.0 if factor is None else factor
        if name in ("add", "trained"):
            return old + factor * value
        if name == "project_out":
            return old - factor * (old @ value @ value.T)
        return value.expand_as(old)

    def _keep_heads(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._one.heads is None:
            return new
        axes = [axis for i, axis in enumerate(self._place.axes) if i not in (self._batch, self._pos)]
        behind = len(axes) - axes.index("head")  # the dimension of the heads, counted from the end
        count = old.shape[-behind]
        if max(self._one.heads) >= count:
            raise errors.InputError(f"{self._place.key} has {count} heads; there is no head {max(self._one.heads)}.")
        chosen = torch.zeros(count, dtype=torch.bool, device=old.device)
        chosen[list(self._one.heads)] = True
        return torch.where(chosen.reshape(-1, *[1] * (behind - 1)), new, old)


def _entrance(model: Any) -> Any:
    """The module whose inputs are the tokens of a step: below a head, the model that the head is for."""
    module = model._model
    name = getattr(module, "base_model_prefix", "")
    return model[name] if name and name in module._modules else model


def _other_run(
    model: Any, place: Place, prompt: Any, positions: str | tuple[int, ...]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What another prompt has at some positions `[position, …]`, and these positions."""
    if "pos" not in place.axes:
        raise errors.InputError(f"{place.key} has no value of one position; a swap is of places [batch, pos, …].")
    tokenizer = getattr(model, "tokenizer", None)
    ids = encode_prompts(tokenizer, [prompt if isinstance(prompt, str) else list(prompt)], 0, "all", None)[0].ids
    with torch.inference_mode(False), torch.no_grad(), model.trace(torch.tensor([ids])) as tracer:
        found = place.read()[0].detach().clone()
        tracer.stop()
    if isinstance(positions, str):
        positions = tuple(range(len(ids))) if positions == "all" else (-1,)
    outside = [p for p in positions if not -len(ids) <= p < len(ids)]
    if outside:
        raise errors.InputError(f"The prompt of the swap has {len(ids)} tokens, and none at position {outside[0]}.")
    return found[list(positions)], positions


def _basis(directions: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis `[d, k]` of the span of directions `[k, d]` or `[d]`."""
    rows = directions.detach().reshape(-1, directions.shape[-1]).double()
    vectors, sizes, _ = torch.linalg.svd(rows.T, full_matrices=False)
    kept = sizes > sizes.max() * max(rows.shape) * math.ulp(1.0)
    return vectors[:, kept].to(directions.dtype)
