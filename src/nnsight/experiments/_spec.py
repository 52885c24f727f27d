"""InterventionSpec: interventions as data, which can be checked, saved, shared and applied to any model that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nnsight import errors

from ._act import prepare
from ._spec_file import load_spec, push_spec, save_spec

Operation = Literal["set", "add", "scale", "zero", "mean", "swap", "project_out", "trained"]

# What each operation needs, and what it may have beside.
_NEEDS: dict[str, tuple[str, ...]] = {
    "set": ("value",),
    "add": ("value",),
    "scale": ("factor",),
    "zero": (),
    "mean": ("value",),
    "swap": ("prompt",),
    "project_out": ("value",),
    "trained": ("value",),
}
_MAY: dict[str, tuple[str, ...]] = {"add": ("factor",), "trained": ("factor",), "project_out": ("factor",)}


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of one value, as data.

    | operation | what becomes of `x` |
    |---|---|
    | `"set"`, `"mean"` | `value`; for `"mean"` that is the mean over a data set |
    | `"add"` | `x + factor * value` |
    | `"trained"` | `x + factor * value`, and gradients reach `value` |
    | `"scale"` | `factor * x` |
    | `"zero"` | 0 |
    | `"swap"` | what `prompt` has at the same positions of the same place |
    | `"project_out"` | `x` less `factor` times its part along `value`: a direction `[d]`, or the span of several `[k, d]` |

    Example:
        >>> import torch
        >>> from nnsight.experiments import Intervention
        >>> Intervention("resid_post[6]", "add", value=torch.ones(128), factor=2.0, positions=[-1])
        Intervention('resid_post[6]', 'add', value=[128], factor=2.0, positions=(-1,))

    Args:
        site: A place: a standard name (`"resid_post[6]"`, `"head_z[3]"`) or a path (`"transformer.h.3.mlp"`).
        operation: One of those above.
        value: A tensor for what lies behind the position: `[d]`, or `[head, d_head]` or `[d_head]` for heads; or one such
            for each of `positions`, with a dimension in front.
        factor: A number; 1 unless given, except for `"scale"`.
        prompt: For `"swap"`: text or token ids.
        positions: `"all"`, `"last"` (of each step of a generation), or positions of the prompt, negative ones counted
            from its end. They are counted in each row's own tokens, not in its padding.
        rows: Only these rows of the batch; by default all.
        heads: Only these heads, where the value has heads; by default all.
        steps: Only these steps of a generation; by default all. Positions of the prompt are at hand at step 0, and later
            only in a generation without a cache.

    Raises:
        InputError: The operation is unknown, or something is missing, too much, or of a wrong kind.
    """

    site: str
    operation: Operation
    value: torch.Tensor | None = None
    factor: float | None = None
    prompt: str | tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "all"
    rows: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.site, str):
            raise errors.InputError(f'site is a name ("resid_post[6]") or a path, not {self.site!r}.')
        if self.operation not in _NEEDS:
            raise errors.InputError(f"There is no operation {self.operation!r}; there are {', '.join(_NEEDS)}.")
        needs, may = _NEEDS[self.operation], _MAY.get(self.operation, ())
        for name in ("value", "factor", "prompt"):
            given = getattr(self, name) is not None
            if name in needs and not given:
                raise errors.InputError(f"The operation {self.operation!r} of {self.site} needs {name}=.")
            if given and name not in (*needs, *may):
                raise errors.InputError(f"The operation {self.operation!r} of {self.site} has no use for {name}=.")
        self._check_values()
        for name in ("rows", "heads", "steps"):
            self._keep_numbers(name, least=0)
        if isinstance(self.positions, str):
            if self.positions not in ("all", "last"):
                raise errors.InputError(f'positions is "all", "last" or a list of numbers, not {self.positions!r}.')
        else:
            self._keep_numbers("positions", least=None)

    def _check_values(self) -> None:
        value, factor, prompt = self.value, self.factor, self.prompt
        if value is not None:
            if not isinstance(value, torch.Tensor) or not value.dim() or not value.is_floating_point():
                raise errors.InputError(
                    f"value is a tensor of floating-point numbers with a dimension, not {value!r:.60}."
                )
            if not value.isfinite().all():
                raise errors.InputError(f"The value for {self.site} has entries that are not finite.")
            if self.operation == "project_out" and (value.dim() > 2 or not value.any(-1).all()):
                raise errors.InputError("A direction to project out is [d], or several [k, d], none of length 0.")
        if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float))):
            raise errors.InputError(f"factor is a number, not {factor!r}.")
        if prompt is not None and not isinstance(prompt, str):
            ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
            if not ids or not all(isinstance(i, int) for i in ids):
                raise errors.InputError(f"prompt is text or token ids [seq], not {prompt!r:.60}.")
            object.__setattr__(self, "prompt", tuple(ids))

    def _keep_numbers(self, name: str, *, least: int | None) -> None:
        given = getattr(self, name)
        if given is None:
            return
        numbers = (given,) if isinstance(given, int) else tuple(given)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not numbers or not whole or len(set(numbers)) < len(numbers):
            raise errors.InputError(f"{name} are different whole numbers, at least one; these are {given!r}.")
        if least is not None and min(numbers) < least:
            raise errors.InputError(f"{name} are counted from {least}; these are {given!r}.")
        object.__setattr__(self, name, numbers)

    def __repr__(self) -> str:
        parts = [repr(self.site), repr(self.operation)]
        for name in ("value", "factor", "prompt", "positions", "rows", "heads", "steps"):
            given = getattr(self, name)
            if given is not None and (name, given) != ("positions", "all"):
                parts.append(f"{name}={list(given.shape) if isinstance(given, torch.Tensor) else repr(given)}")
        return f"Intervention({', '.join(parts)})"


@dataclass(frozen=True, eq=False, init=False)
class InterventionSpec:
    """Interventions as data, to save, share and apply.

    Those of one place act in the order in which they stand here.

    Example:
        >>> import torch
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import Intervention, InterventionSpec
        >>> model = LanguageModel("nnsight/landmarks")
        >>> spec = InterventionSpec(Intervention("resid_post[4]", "swap", prompt="The Colosseum is", positions=[2]))
        >>> spec.save("roman")
        >>> with model.apply(InterventionSpec.load("roman")), model.trace("The Eiffel Tower is in"):
        ...     logits = model.logits.save()
        >>> edited = model.edit(spec)

    Args:
        *interventions: What to change.
        name: What it is called.
        model: The name of the model it was made for, for the reader; it is not checked.
    """

    interventions: tuple[Intervention, ...]
    name: str = ""
    model: str = ""

    def __init__(self, *interventions: Intervention, name: str = "", model: str = "") -> None:
        wrong = [one for one in interventions if not isinstance(one, Intervention)]
        if wrong or not interventions:
            raise errors.InputError(f"An InterventionSpec is made of Interventions, at least one; not {wrong[:1]}.")
        for attribute, value in (("interventions", interventions), ("name", name), ("model", model)):
            object.__setattr__(self, attribute, value)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    def __getitem__(self, index: int) -> Intervention:
        return self.interventions[index]

    def parameters(self) -> list[torch.Tensor]:
        """The vectors of `"trained"` interventions, for an optimizer."""
        return [one.value for one in self if one.operation == "trained" and one.value is not None]

    def prepare(self, model: Any) -> Sequence[tuple[str, Callable[[], Callable[[int], None]]]]:
        """What `model.apply` and `model.edit` do in each run; checks the places, and runs the prompts of swaps."""
        return [prepare(model, one) for one in self]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `interventions.json`, and `values.safetensors` where there are tensors, to a folder."""
        save_spec(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> InterventionSpec:
        """Read a folder that `save` wrote, or a repository of the hub, `"user/name"`; no code is run.

        Args:
            folder: The folder or repository.
            **options: For a repository: `revision`, `token` and what else `huggingface_hub.snapshot_download` takes.

        Raises:
            LoadError: There is none, or it is damaged, or of a later version.
        """
        interventions, named = load_spec(folder, Intervention, options)
        return cls(*interventions, **named)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload to a repository of the hub, which is made if it is not there.

        Args:
            repository: `"user/name"`.
            **options: `token`, `private`, `commit_message`, `revision`.

        Returns:
            The address of the upload.
        """
        return push_spec(self, repository, options)
