"""fit_das: distributed alignment search, the subspace of a value through which a model's answer depends on a variable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal

from nnsight import NNsight, errors

from ._corpus import Prompt, encode_prompts
from ._places import Place, find_place
from ._progress import progress_bar


@dataclass(frozen=True)
class Alignment:
    """A subspace of the values at a place.

    Attributes:
        site: The key of the place.
        position: The position, counted from the end of each prompt.
        basis: An orthonormal basis `[d, dim]`.
        accuracy: How often, on held-out pairs, the base run gives the counterfactual answer once it has the source's
            part in the subspace.
        control_accuracy: The same with a random subspace of that dimension.
        full_accuracy: The same with the whole vector put in.
        losses: The loss at each step of the search.
    """

    site: str
    position: int
    basis: torch.Tensor
    accuracy: float
    control_accuracy: float
    full_accuracy: float
    losses: tuple[float, ...]

    def exchange(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`base` with the part of `source` in the subspace, both `[…, d]`."""
        return exchange(base, source, self.basis)

    def __repr__(self) -> str:
        return (
            f"Alignment({self.site}, position {self.position}, {self.basis.shape[1]} of {self.basis.shape[0]} dimensions: "
            f"accuracy {self.accuracy:.3f}, random subspace {self.control_accuracy:.3f}, whole vector {self.full_accuracy:.3f})"
        )


def fit_das(
    model: NNsight,
    base: Sequence[Any],
    source: Sequence[Any],
    answers: Sequence[int],
    site: Any,
    *,
    dim: int = 1,
    position: int = -1,
    steps: int = 200,
    batch: int = 32,
    lr: float = 5e-2,
    held_out: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """Find the subspace in which exchanging a value makes a model answer as a causal model says (Geiger et al. 2023).

    Each base prompt is run with the source prompt's part in the subspace put in; an orthonormal basis is trained, by
    gradient descent, to make the counterfactual answer likely. The model itself is not changed. Accuracies are those
    of pairs that were held out, beside a random subspace, which should fail, and the whole vector, which bounds it.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import fit_das
        >>> model = LanguageModel("nnsight/landmarks")
        >>> base = ["The Eiffel Tower is in the city of"] * 4
        >>> source = ["The Colosseum Palace is in the city of"] * 4
        >>> answers = [model.tokenizer(" Rome")["input_ids"][0]] * 4
        >>> found = fit_das(model, base, source, answers, "resid_post[6]", dim=2, steps=2, progress=False)
        >>> found.basis.shape[1]
        2

    Args:
        model: The model.
        base: Prompts: texts or token ids.
        source: As many prompts that differ from them in the variable's value.
        answers: The token that should come next in each base prompt once the variable has the source's value.
        site: A place whose values are `[batch, pos, d]`.
        dim: Dimensions of the subspace.
        position: The position whose value is exchanged, negative: counted from the end of each prompt.
        steps: Steps of Adam.
        batch: Pairs in one step.
        lr: Learning rate.
        held_out: The share of pairs that are held out.
        seed: Decides the start, the batches and what is held out.
        progress: Show a progress bar.

    Returns:
        The subspace with its accuracies.

    Raises:
        InputError: The pairs do not match, or the position or the dimension is none.
    """
    if position >= 0:
        raise errors.InputError("position counts from the end of each prompt: -1 is its last token.")
    if not len(base) == len(source) == len(answers) or len(base) < 2:
        raise errors.InputError(
            f"Each base prompt needs a source and an answer, and there are at least two; these are {len(base)}, "
            f"{len(source)} and {len(answers)}."
        )
    search = _Search(model, find_place(model, site), position, base, source, answers)
    if not 0 < dim <= search.width:
        raise errors.InputError(f"dim is from 1 to {search.width}, the length of the vectors at {search.place.key}.")
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(base), generator=chance).tolist()
    held = max(round(len(order) * held_out), 1)
    test, train = order[:held], order[held:]
    rotation, losses = _train(search, train, dim, steps, batch, lr, chance, progress)
    basis = rotation.detach()
    random = torch.linalg.qr(torch.randn(search.width, dim, generator=chance))[0].to(basis)
    found, control, full = (search.accuracy(test, b, batch) for b in (basis, random, torch.eye(search.width).to(basis)))
    return Alignment(search.place.key, position, basis.cpu(), found, control, full, tuple(losses))


def exchange(base: torch.Tensor, source: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`base` with the part of `source` in the span of an orthonormal basis `[d, dim]`."""
    basis = basis.to(base)
    return base + (source.to(base) - base) @ basis @ basis.T


class _Search:
    """Pairs of prompts, with the values of the source prompts."""

    def __init__(
        self,
        model: NNsight,
        place: Place,
        position: int,
        base: Sequence[Any],
        source: Sequence[Any],
        answers: Sequence[int],
    ) -> None:
        if hasattr(model, "dispatch"):
            model.dispatch()
        self.model = model
        self.place = place
        self.position = position
        tokenizer = getattr(model, "tokenizer", None)
        self.base = encode_prompts(tokenizer, list(base), 0, "last", None)
        prompts = encode_prompts(tokenizer, list(source), 0, "last", None)
        short = min(len(prompt.ids) for prompt in (*self.base, *prompts))
        if short < -position:
            raise errors.InputError(f"There is no position {position} in a prompt of {short} tokens.")
        self.answers = torch.tensor([int(answer) for answer in answers])
        self.source = self._values(prompts)
        self.width = self.source.shape[-1]

    def logits(self, numbers: Sequence[int], basis: torch.Tensor) -> torch.Tensor:
        """Logits of the next token `[pair, vocab]` with the source's part in the subspace put in."""
        rows: list[torch.Tensor] = []
        places = []
        for chosen in self._alike(numbers):
            with self.model.trace(torch.tensor([self.base[i].ids for i in chosen])):
                value = self.place.read()
                changed = value.clone()
                changed[:, self.position] = exchange(value[:, self.position], self.source[chosen], basis)
                self.place.write(changed)
                output: Any = self.model.output
                rows.append(getattr(output, "logits", output)[:, -1])
            places += chosen
        back = [places.index(i) for i in numbers]
        return torch.cat(rows)[back]

    def accuracy(self, numbers: Sequence[int], basis: torch.Tensor, batch: int) -> float:
        """How often the answer is the likeliest token."""
        right = 0
        with torch.no_grad():
            for start in range(0, len(numbers), batch):
                chosen = list(numbers[start : start + batch])
                found = self.logits(chosen, basis).argmax(-1).cpu()
                right += int((found == self.answers[chosen]).sum())
        return right / len(numbers)

    def _alike(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """The numbers of pairs, those with base prompts of one length together: no padding is needed."""
        lengths = {i: len(self.base[i].ids) for i in numbers}
        for length in sorted(set(lengths.values())):
            yield [i for i in numbers if lengths[i] == length]

    def _values(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            with torch.no_grad(), self.model.trace(torch.tensor([prompt.ids])) as tracer:
                value = self.place.read()
                rows.append(value[0, self.position].detach().clone())
                tracer.stop()
        return torch.stack(rows)


def _train(
    search: _Search,
    train: Sequence[int],
    dim: int,
    steps: int,
    batch: int,
    lr: float,
    chance: torch.Generator,
    progress: bool,
) -> tuple[torch.Tensor, list[float]]:
    rotation = torch.nn.Linear(search.width, dim, bias=False, device=search.source.device)
    with torch.no_grad():
        rotation.weight.copy_(torch.randn(dim, search.width, generator=chance))
    orthogonal(rotation)
    solver = torch.optim.Adam(rotation.parameters(), lr)
    losses = []
    with torch.enable_grad(), progress_bar(steps, "searching", progress) as bar:
        for _ in range(steps):
            picked = torch.randperm(len(train), generator=chance)[:batch].tolist()
            numbers = [train[i] for i in picked]
            logits = search.logits(numbers, rotation.weight.T)
            loss = functional.cross_entropy(logits.float(), search.answers[numbers].to(logits.device))
            parameters = list(rotation.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            solver.step()
            losses.append(loss.item())
            bar.update()
    return rotation.weight.T, losses
