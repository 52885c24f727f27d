"""Tuned lens: a logit lens that first learns to translate each layer's stream."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div

from nnsight import LanguageModel, errors

from ._lens import TopTokens, logit_lens
from ._memory import Budget
from ._progress import progress_bar
from ._prompts import Prompts, encode
from ._result import Result
from ._runner import Runner
from ._sweep import sites_of


class TunedLens:
    """An affine map for each layer, from the stream behind it to the stream behind the last (Belrose et al. 2023).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import TunedLens
        >>> model = LanguageModel("nnsight/landmarks")
        >>> lens = TunedLens.fit(model, ["The Eiffel Tower is in", "The Colosseum is in"], steps=3, progress=False)
        >>> lens.loss.shape == (3, 12)
        True

    Args:
        weights: `[layer, d_model, d_model]`, added to the identity; zero for the last layer, which needs no translation.
        biases: `[layer, d_model]`.
        loss: The KL divergence in nats from the model's own prediction, in each step of the fit `[step, layer]`.
    """

    def __init__(self, weights: torch.Tensor, biases: torch.Tensor, loss: torch.Tensor) -> None:
        self.weights = weights
        self.biases = biases
        self.loss = loss

    def __call__(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """The stream behind `layer` `[…, d_model]`, translated."""
        weight, bias = self.weights[layer].to(stream), self.biases[layer].to(stream)
        return stream + stream @ weight + bias

    @classmethod
    def fit(
        cls,
        model: LanguageModel,
        prompts: Any,
        *,
        steps: int = 100,
        rate: float = 1e-3,
        batch: int = 16,
        seed: int = 0,
        memory: int | str = "1GB",
        progress: bool = True,
    ) -> TunedLens:
        """Fit a lens to a model, so that each layer predicts what the model predicts.

        Args:
            model: The model, whose weights stay as they are.
            prompts: Texts or token ids to learn from.
            steps: Steps of Adam, each for all layers.
            rate: Its learning rate.
            batch: Prompts a step.
            seed: Of the order of prompts.
            memory: For the streams of all prompts.
            progress: Show a progress bar.

        Raises:
            InputError: The model's logits do not follow from its last layer alone.
        """
        rows = encode(model, prompts)
        runner = Runner(model, rows, TopTokens(model, None, None), Budget(memory))
        sites = sites_of(model, "resid_post")
        values, _ = runner.record(sites, keep_stream=True)
        if not runner.can_finish:
            raise errors.InputError("This model's logits do not follow from its last layer alone: it has no lens.")
        streams = torch.stack([values[site] for site in sites])
        return cls(*_descend(runner, streams, rows, steps, rate, batch, seed, progress))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lens to a safetensors file."""
        save_file({"weights": self.weights, "biases": self.biases, "loss": self.loss}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TunedLens:
        """The lens that `save` wrote."""
        found = load_file(path)
        return cls(found["weights"], found["biases"], found["loss"])


def tuned_lens(
    model: LanguageModel,
    prompts: Any,
    lens: TunedLens,
    answer: str | int | None = None,
    *,
    layers: Sequence[int] | None = None,
    memory: int | str = "1GB",
    progress: bool = True,
) -> Result:
    """The next token that each layer's stream gives when a tuned lens reads it (Belrose et al. 2023).

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import TunedLens, tuned_lens
        >>> model = LanguageModel("nnsight/landmarks")
        >>> lens = TunedLens.fit(model, ["The Eiffel Tower is in", "The Colosseum is in"], steps=3, progress=False)
        >>> tuned_lens(model, "The Eiffel Tower is in the city of", lens, progress=False).texts[-1]
        ' Paris'

    Args:
        model: The model.
        prompts: As for `logit_lens`.
        lens: A lens that was fitted to this model.
        answer: As for `logit_lens`.
        layers: As for `logit_lens`.
        memory: As for `activation_patching`.
        progress: Show a progress bar.

    Returns:
        As `logit_lens`.
    """
    return logit_lens(model, prompts, answer, layers=layers, translate=lens, memory=memory, progress=progress)


def _descend(
    runner: Runner,
    streams: torch.Tensor,
    rows: Prompts,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, biases and losses after so many steps; `streams` are `[layer, prompt, pos, d_model]`."""
    layers, count, _, width = streams.shape
    real = rows.real().to(streams.device)
    weights = torch.zeros(layers, width, width, device=streams.device, requires_grad=True)
    biases = torch.zeros(layers, width, device=streams.device, requires_grad=True)
    optimizer = torch.optim.Adam([weights, biases], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(steps, layers)
    with progress_bar(steps, "tuned lens", progress) as bar:
        for step in range(steps):
            chosen = torch.randperm(count, generator=generator)[:batch]
            with torch.no_grad():
                target = runner.finish(streams[-1, chosen]).logits.float().log_softmax(-1)
            optimizer.zero_grad()
            for layer in range(layers - 1):  # one at a time: the logits of all would not fit
                stream = streams[layer, chosen].float()
                with torch.enable_grad():
                    moved = stream + stream @ weights[layer] + biases[layer]
                    found = runner.finish(moved.to(streams.dtype)).logits.float().log_softmax(-1)
                    each = kl_div(found, target, reduction="none", log_target=True).sum(-1)
                    loss = each[real[chosen]].mean()
                    gradients = torch.autograd.grad(loss, [weights, biases])
                losses[step, layer] = loss.detach()
                _add_gradients([weights, biases], gradients)
            optimizer.step()
            bar.update(1)
    return weights.detach().cpu(), biases.detach().cpu(), losses


def _add_gradients(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
