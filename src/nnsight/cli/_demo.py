"""`nnsight demo`: what a model predicts, layer by layer, and which hidden states carry the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight import Envoy, LanguageModel, save
from nnsight.errors import InputError, UnknownPathError

from ._report import Report
from ._terminal import Terminal

SMALL = 20_000_000  # parameters

# --- the experiments -----------------------------------------------------------------------------


def blocks(model: LanguageModel) -> Envoy:
    """The layers of the model, by the name that its family gives them."""
    return model.transformer.h


def unembed(model: LanguageModel, hidden: Tensor) -> Tensor:
    """The probabilities of the next token `[vocabulary]` if `hidden` `[d_model]` came from the last layer."""
    return model.lm_head(model.transformer.ln_f(hidden)).softmax(-1)


def predict(model: LanguageModel, prompt: str) -> Tensor:
    """The probabilities of the next token, `[vocabulary]`."""
    with model.trace(prompt):
        logits = model.output.logits.save()
    return logits[0, -1].softmax(-1)


def logit_lens(model: LanguageModel, prompt: str) -> list[Tensor]:
    """What each layer would predict if it was the last one, `[vocabulary]` each."""
    predictions = []
    with model.trace(prompt):
        for block in blocks(model):
            hidden = block.output[0]
            predictions.append(save(unembed(model, hidden[0, -1])))
    return predictions


def read_hidden(model: LanguageModel, prompt: str) -> list[Tensor]:
    """The hidden states after each layer, `[1, seq, d_model]` each."""
    states = []
    with model.trace(prompt):
        for block in blocks(model):
            states.append(block.output[0].save())
    return states


def predict_patched(model: LanguageModel, prompt: str, hidden: Tensor, layer: int, position: int) -> Tensor:
    """What follows `prompt`, `[vocabulary]`, if one layer has `hidden` at one position."""
    with model.trace(prompt):
        blocks(model)[layer].output[0][:, position] = hidden[:, position]
        logits = model.output.logits.save()
    return logits[0, -1].softmax(-1)


def patching_sweep(model: LanguageModel, clean: str, corrupted: str, answer: int) -> list[list[float]]:
    """The probability of `answer` after each patch of a clean hidden state, `[layer][position]`."""
    return [
        [
            predict_patched(model, corrupted, hidden, layer, position)[answer].item()
            for position in range(hidden.shape[1])
        ]
        for layer, hidden in enumerate(read_hidden(model, clean))
    ]


# --- the command ---------------------------------------------------------------------------------


@torch.no_grad()
def run_demo(prompt: str, corrupted: str, name: str, out: Path) -> None:
    """Run the experiments, print what they show, and write the numbers and a figure into the folder `out`.

    Raises:
        LoadError: There is no such model.
        InputError: The model has other parts than the experiments name, or a prompt is empty.
        OSError: `out` cannot be written.
    """
    model = LanguageModel(name)
    check_parts(model)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(EACCES, os.strerror(EACCES), str(out))
    model.dispatch()
    with threads_for(model):
        run_experiments(model, prompt, corrupted, name, out)


def run_experiments(model: LanguageModel, prompt: str, corrupted: str, name: str, out: Path) -> None:
    """Each experiment in turn, with what it shows."""
    report = Report(Terminal(sys.stdout), model.tokenizer)

    clean = predict(model, prompt)
    answer = int(clean.argmax())
    numbers: dict[str, Any] = {
        "model": name,
        "prompt": prompt,
        "corrupted": corrupted,
        "predictions": report.predictions(prompt, clean),
        "logit_lens": report.logit_lens(logit_lens(model, prompt)),
    }
    if report.comparable(prompt, corrupted):
        baseline = predict(model, corrupted)[answer].item()
        values = patching_sweep(model, prompt, corrupted, answer)
        numbers["patching"] = report.patching(prompt, corrupted, answer, clean[answer].item(), baseline, values)
    report.files(numbers, out)


@contextmanager
def threads_for(model: LanguageModel) -> Iterator[None]:
    """One thread for a small model: to hand its little work to others takes longer than to do it."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_parts(model: LanguageModel) -> None:
    """Refuse a model without the modules that `blocks` and `unembed` name."""
    try:
        for part in ("transformer.h", "transformer.ln_f", "lm_head"):
            model.get(part)
    except UnknownPathError as error:
        raise InputError(
            f"The demo knows models built as GPT-2 is: transformer.h, transformer.ln_f, lm_head. {error}"
        ) from error
