"""Runner: forwards of one batch of prompts, from the start or from the layer that an edit touches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight import LanguageModel, errors

from ._memory import Budget
from ._metrics import Scorer
from ._prompts import Prompts

Act = Callable[[torch.Tensor], None]


class Runner:
    """Runs prompts of one batch, as rows that may stand there many times.

    What the layers before an edit compute is known from the plain run: with `keep_stream`, a run starts at the edited
    layer with the residual stream of that run.

    Args:
        model: The model.
        prompts: The batch.
        scorer: The metric of these prompts.
        budget: The memory to stay within.
    """

    def __init__(self, model: LanguageModel, prompts: Prompts, scorer: Scorer, budget: Budget) -> None:
        model.dispatch()
        self.model = model
        self.prompts = prompts
        self.scorer = scorer
        self.budget = budget
        self.layers = len(model.layers)
        self.stream: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        accepted = inspect.signature(type(model._model).forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if scorer.keep is not None and "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = scorer.keep

    def record(
        self, sites: Sequence[Any], *, keep_stream: bool = False
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        """The values of sites `[prompt, …]` in the plain run, and the metric `[prompt]`.

        Args:
            sites: What to read.
            keep_stream: Keep the residual stream too, so that later runs can start at any layer.
        """
        streams = [self.model.site("resid_pre", i) for i in range(self.layers)] if keep_stream else []
        wanted = sorted({*sites, *streams}, key=lambda site: site.order)
        unit = len(self.prompts) if self.scorer.whole else 1
        with torch.no_grad():
            parts = self.budget.run(range(len(self.prompts)), lambda rows: self._record(wanted, rows), unit)
        values = {site: torch.cat([part[0][site] for part in parts]) for site in wanted}
        self.logits = torch.cat([part[1].logits for part in parts])
        self.scorer_reference(parts)
        numbers = torch.cat([self.scorer(output, torch.tensor(list(rows))) for _, output, rows in parts])
        if keep_stream:
            self.stream = torch.stack([values[site] for site in streams])
            self.budget.hold([self.stream])
            self._check_resuming()
        self.budget.hold([values[site] for site in sites])
        return {site: values[site] for site in sites}, numbers

    def scorer_reference(self, parts: Sequence[Any]) -> None:
        """Compare with these logits from now on, where the metric compares and has nothing to compare with yet."""
        if self.scorer.compares and self.scorer.targets.reference is None:
            self.scorer.with_reference(torch.cat([output.logits for _, output, _ in parts]))

    def _record(self, sites: Sequence[Any], rows: Sequence[int]) -> tuple[dict[Any, torch.Tensor], Any, Sequence[int]]:
        with self.model.trace(self.prompts.inputs(rows), **self.options):
            values = {site: site.read().detach().clone() for site in sites}
            output = self.model.output.save()
        return values, output, rows

    def run(self, rows: Sequence[int], layer: int, act: Act) -> torch.Tensor:
        """The metric `[row]` of a run in which `act` changes something at `layer` or later.

        Args:
            rows: The number of each row's prompt.
            layer: The first layer that is run, where the stream was kept.
            act: Called in the trace with `rows` as a tensor.
        """
        return self.scorer(self.output(rows, layer, act), torch.tensor(rows))

    def output(self, rows: Sequence[int], layer: int, act: Act) -> Any:
        """The model's output in such a run."""
        model, numbers = self.model, torch.tensor(rows)
        with model.trace(self.prompts.inputs(rows), **self.options):
            if layer and self.stream is not None:
                stream = self.stream[layer][numbers.to(self.stream.device)]
                for earlier in range(layer):
                    model.layers[earlier].skip(stream)
            act(numbers)
            output = model.output.save()
        return output

    def _check_resuming(self) -> None:
        """Run everything from the start if this model does not give the same from the middle."""
        assert self.stream is not None
        assert self.logits is not None
        if self.layers < 2:
            return
        rows = range(len(self.prompts) if self.scorer.whole else 1)
        try:
            with torch.no_grad():
                found = self.output(list(rows), self.layers // 2, lambda rows: None).logits
        except errors.NNsightError:
            self.stream = None
            return
        expected = self.logits[: len(rows)]
        scale = float(expected.abs().max())
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 1e-2
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale):
            self.stream = None
