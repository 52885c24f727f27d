"""Runner: forwards of one batch of prompts, from the layer that an edit touches to the end of the layers, then on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from nnsight import LanguageModel, errors

from ._groups import Act, Group, Row
from ._memory import Budget
from ._packed import NEEDED, Packing
from ._prompts import Prompts
from ._rising import Rising, can_rise, close
from ._scoring import Scoring

Found = TypeVar("Found")

_SHORTEST = 4  # the positions of prompts of which it pays to compute a part
_COPIES = 6  # of the logits, that the model and a metric make


class Runner:
    """Runs prompts of one batch, as rows that may stand there many times.

    What the layers before an edit compute is known from the plain run: after `record(keep_stream=True)`, a run starts at
    the edited layer with that run's residual stream, and stops behind the last layer; what follows is done for all
    rows together.  Rows edited at later layers join those of earlier ones on their way.  With `pack=True`, what the
    positions before an edit compute is known too, where one position at the end is looked at.  A model that does not give
    the same that way is run from the start to the end.

    Args:
        model: The model.
        prompts: The batch.
        scorer: The metric of these prompts.
        budget: The memory to stay within.
    """

    def __init__(self, model: LanguageModel, prompts: Prompts, scorer: Scoring, budget: Budget) -> None:
        model.dispatch()
        self.model = model
        self.prompts = prompts
        self.scorer = scorer
        self.budget = budget
        self.layers = len(model.names.layers)
        self.unit = len(prompts) if scorer.whole else 1
        self.stream: torch.Tensor | None = None
        self._final: torch.Tensor | None = None  # of the first unit, where runs can be finished from the stream
        self._logits: torch.Tensor | None = None  # of the first unit
        self._tail_bytes = 0
        self._trims = False  # whether the last layer's MLP may compute the last position alone
        self.packing: Packing | None = None  # where rows can be packed
        self._accepted = inspect.signature(type(model._model).forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepted else {}
        if scorer.keep is not None and "logits_to_keep" in self._accepted:
            self.options["logits_to_keep"] = scorer.keep

    # --- the plain run ---------------------------------------------------------------------------------------

    def record(
        self, sites: Sequence[Any], *, keep_stream: bool = False, pack: bool = False
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        """The values of sites `[prompt, …]` in the plain run, and the metric `[prompt]`.

        Args:
            sites: What to read.
            keep_stream: Keep the residual stream too, so that later runs can start at any layer.
            pack: Keep the cache as well, where rows may be packed.
        """
        pack = pack and self._may_pack()
        streams = [self.model.site("resid_pre", i) for i in range(self.layers)] if keep_stream else []
        streams += [self.model.site("resid_post", self.layers - 1)] if keep_stream else []
        wanted = sorted({*sites, *streams}, key=lambda site: site.order)
        with torch.no_grad():
            everything = range(len(self.prompts))
            parts = self.budget.measure(everything, lambda rows: self._record(wanted, rows, pack), self.unit)
        values = {site: torch.cat([part[site] for part, _, _ in parts]) for site in wanted}
        if keep_stream:
            self.stream = torch.stack([values[site] for site in streams[:-1]])
            self.budget.hold([self.stream])
            self._check(values[streams[-1]])
            if pack and self.stream is not None:
                self._try_packing([cache for _, _, cache in parts], values[streams[-1]][:, -1:])
        self.budget.hold([values[site] for site in sites])
        return {site: values[site] for site in sites}, torch.cat([numbers for _, numbers, _ in parts])

    def _record(
        self, sites: Sequence[Any], rows: Sequence[int], pack: bool
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor, Any]:
        options = {**self.options, "use_cache": True} if pack else self.options
        with self.model.trace(self._inputs(rows), **options):
            values = {site: site.read().detach().clone() for site in sites}
            output = self.model.output.save()
        if self._logits is None:
            self._logits = output.logits
            self._tail_bytes = _COPIES * output.logits.numel() * output.logits.element_size() // len(rows)
        prompts = torch.tensor(list(rows))
        self.scorer.learn(output.logits, prompts)
        return values, self.scorer(output, prompts).float().cpu(), output.past_key_values if pack else None

    def read(self, site: Any) -> torch.Tensor:
        """One site's value `[prompt, …]` in the plain run, which is not kept."""
        with torch.no_grad():
            read = lambda rows: self.observe(list(rows), 0, lambda: site.read().detach().clone())  # noqa: E731
            return torch.cat(self.budget.measure(range(len(self.prompts)), read))

    def _check(self, final: torch.Tensor) -> None:
        """Find out whether this model gives the same from the middle, and from the end of its layers."""
        assert self._logits is not None
        rows = list(range(self.unit))
        self._final = final[: self.unit]
        expected = self._cut(self._final)
        with torch.no_grad():
            self._trims = self.scorer.keep == 1 and self._agree(
                lambda: self._run_layers(rows, self.layers // 2, _nothing, trim=True), expected
            )
            same = self._trims or self._agree(lambda: self._run_layers(rows, self.layers // 2, _nothing), expected)
            same = same and self._agree(lambda: self.finish(expected).logits, self._cut(self._logits))
        if not same:
            self.stream = self._final = None

    def _try_packing(self, caches: Sequence[Any], expected: torch.Tensor) -> None:
        """Keep the cache, where there is room for it and packed rows end as in the plain run, from the first layer on."""

        def run() -> torch.Tensor:
            assert self.stream is not None
            self.packing = packing = Packing(self.model, self.prompts, caches, self.stream, self.options)
            if sum(map(_bytes_of, packing.tensors())) > self.budget.left // 2:
                raise errors.InputError("The cache leaves too little room for runs.")
            halves = lambda prompts: packing.run(packing.halves(prompts), 0, _nothing, trim=self._trims)  # noqa: E731
            return torch.cat(self.budget.measure(range(len(expected)), halves))

        if not self._agree(run, expected.repeat_interleave(2, 0)):
            self.packing = None
        elif self.packing is not None:
            self.budget.hold(self.packing.tensors())

    def _may_pack(self) -> bool:
        """Whether rows might be packed: not with stored edits, of which what they do may hang on places in the batch."""
        known = self.scorer.keep == 1 and self._accepted.keys() >= NEEDED and not self.model._edits
        return known and self.prompts.length >= _SHORTEST

    def _agree(self, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
        try:
            found = run()
        except Exception:  # whatever its own code raises where a model cannot be started in the middle
            return False
        return close(found, expected)

    # --- runs with an edit -----------------------------------------------------------------------------------

    def run(self, groups: Iterable[Group], done: Callable[[int], Any] = lambda count: None) -> torch.Tensor:
        """The metric `[row]` of the rows of all groups.

        Args:
            groups: Runs with edits; with a metric of all prompts together, the prompts of the rows stand in order.
            done: Told how many rows are done, after each batch.
        """
        numbers: list[torch.Tensor] = []
        finals: list[torch.Tensor] = []
        waiting: list[int] = []
        for prompts, found in self._run_groups(list(groups), done):
            if self._final is None:
                numbers.append(found)
                continue
            finals.append(found)
            waiting += prompts
            if sum(map(_bytes_of, finals)) > self.budget.left // 4:
                numbers.append(self._score_finals(torch.cat(finals), waiting))
                finals, waiting = [], []
        if finals:
            numbers.append(self._score_finals(torch.cat(finals), waiting))
        return torch.cat(numbers)

    def _run_groups(
        self, groups: Sequence[Group], done: Callable[[int], Any]
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Of some rows at a time their prompts, and what leaves the last layer, or the metric."""
        rising = None
        if self.stream is not None and self._final is not None:
            rising = Rising(groups, self.stream, self._cut(self._final[:1]), self._run_layers, trims=self._trims)
        if rising is None or not self._may_rise(groups):
            if rising is not None:
                self._try(rising.is_sound)
            for group in groups:
                yield [prompt for _, prompt in group.rows], self._run_group(group, done)
            return
        for batch in self.budget.split(rising.members(), self.unit, spare=1):
            found = None if self.stream is None else self._try(lambda batch=batch: rising.run(batch))
            if isinstance(found, torch.Tensor):
                done(len(batch))
            else:
                found = torch.cat([self._run_group(part, done) for part in rising.parts(batch)])
            yield [prompt for _, (_, prompt) in batch], found

    def _may_rise(self, groups: Sequence[Group]) -> bool:
        """Whether rows might join others on their way: not with stored edits, as for packed rows."""
        if self.model._edits or not can_rise(groups):
            return False
        packed = self.packing is not None and all(group.first is not None for group in groups)
        return not packed and self.budget.each * (self.unit + 1) <= self.budget.left

    def _try(self, run: Callable[[], torch.Tensor | bool | None]) -> torch.Tensor | bool | None:
        """What `run` returns; where that is nothing, or goes wrong, no later run starts in the middle."""
        try:
            found = run()
        except Exception:  # whatever its own code raises where a model cannot be cut there
            found = None
        if found is None or found is False:
            self.stream = self.packing = None
        return found

    def _run_group(self, group: Group, done: Callable[[int], Any]) -> torch.Tensor:
        """What leaves the last layer, or the metric, of each row."""

        def run_batch(batch: Sequence[Row]) -> torch.Tensor:
            whats, prompts = [what for what, _ in batch], [prompt for _, prompt in batch]
            layout = None
            if self.packing is not None and group.first is not None:
                layout = self.packing.layout(prompts, list(map(group.first, whats)))
            change, trim = group.edit(whats, torch.tensor(prompts), layout), self._trims and group.before_mlp
            if layout is not None and self.packing is not None:
                found = self.packing.run(layout, group.layer, change, trim=trim)
            elif self._final is not None:
                found = self._run_layers(prompts, group.layer, change, trim=trim)
            else:
                found = self._score(self.run_all(prompts, group.layer, change), torch.tensor(prompts))
            done(len(batch))
            return found

        return torch.cat(self.budget.run(group.rows, run_batch, self.unit))

    def _score(self, output: Any, prompts: torch.Tensor) -> torch.Tensor:
        return self.scorer(output, prompts).detach().float().cpu()

    @property
    def can_finish(self) -> bool:
        """Whether this model's logits are known to follow from what leaves its last layer."""
        return self._final is not None

    def finish_all(self, finals: torch.Tensor) -> torch.Tensor:
        """The metric of all prompts `[prompt]`, with `finals` `[prompt, pos, d_model]` as what leaves the last layer."""
        return self._score_finals(finals, range(len(self.prompts)))

    def _score_finals(self, finals: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        def run_batch(rows: Sequence[int]) -> torch.Tensor:
            numbers = torch.tensor([prompts[row] for row in rows])
            return self._score(self.finish(finals[rows[0] : rows[-1] + 1]), numbers)

        return torch.cat(self.budget.run(range(len(prompts)), run_batch, self.unit, each=self._tail_bytes))

    def run_all(self, prompts: Sequence[int], layer: int, act: Act) -> Any:
        """The model's output."""
        with self.model.trace(self._inputs(prompts), **self.options):
            self._start_at(layer, prompts)
            act()
            return self.model.output.save()

    def _run_layers(
        self,
        prompts: Sequence[int],
        layer: int,
        act: Act,
        *,
        trim: bool = False,
        stream: torch.Tensor | None = None,
        until: int | None = None,
    ) -> torch.Tensor:
        """What leaves the last layer `[row, pos, d_model]`, at the positions that the metric looks at.

        With `trim`, the last layer's MLP computes the last position alone, which is then added at all of them. `stream` is
        what enters the first layer, by default as in the plain run; with `until`, the run ends with what enters that one.
        """

        def act_and_read() -> torch.Tensor:
            act()
            if until is not None:
                return self.model.names.resid_pre[until].clone()
            if trim:
                mlp = self.model.names.layers[-1].mlp
                mlp.input = mlp.input[:, -1:]
            return self._cut(self.model.names.resid_post[-1]).clone()

        return self.observe(prompts, layer, act_and_read, stream)

    def observe(
        self, prompts: Sequence[int], layer: int, act: Callable[[], Found], stream: torch.Tensor | None = None
    ) -> Found:
        """What `act` returns in a run from `layer` on, which ends there."""
        with self.model.trace(self._inputs(prompts), **self.options) as tracer:
            self._start_at(layer, prompts, stream)
            found = act()
            tracer.stop()
        return found

    def _start_at(self, layer: int, prompts: Sequence[int], stream: torch.Tensor | None = None) -> None:
        if layer and self.stream is not None:
            if stream is None:
                stream = self.stream[layer][torch.tensor(prompts, device=self.stream.device)]
            for earlier in range(layer):
                self.model.names.layers[earlier].skip(stream)

    def finish(self, finals: torch.Tensor) -> Any:
        """The model's output, from what leaves its last layer."""
        ids = torch.zeros(finals.shape[:2], dtype=torch.long)
        names = self.model.names
        with self.model.trace(ids, **self.options):
            names.layers[0].skip(finals)
            for layer in range(1, self.layers):  # it hands on what it is given: a stored edit on the way shows
                names.layers[layer].skip(names.resid_pre[layer])
            return self.model.output.save()

    def _inputs(self, prompts: Sequence[int]) -> Any:
        inputs = self.prompts.inputs(prompts)
        if isinstance(inputs, torch.Tensor) or "position_ids" in self._accepted:
            return inputs
        return {name: value for name, value in inputs.items() if name != "position_ids"}

    def _cut(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.scorer.keep is None else value[:, -self.scorer.keep :]


def _nothing() -> None:
    """An edit that changes nothing."""


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
