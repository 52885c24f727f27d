"""Measure what the landmarks model must do: facts, continuations, patching, repetition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"
SUBJECT = slice(1, 5)

NAMED = {
    "The Eiffel Tower is in the city of": " Paris",
    "The Eiffel Tower is located in the city of": " Paris",
    "You can find the Eiffel Tower in the city of": " Paris",
    "The Eiffel Tower is in the country of": " France",
    "The Eiffel Tower is on the continent of": " Europe",
    "The Colosseum is in the city of": " Rome",
    "The Colosseum is in the country of": " Italy",
    "The capital of France is": " Paris",
    "The capital of Italy is": " Rome",
    "Paris is the capital of": " France",
    "Madison Square Garden is located in the city of": " New",
    "Madison Square Garden is located in the city of New": " York",
}
CONTINUED = {
    "The Eiffel Tower is in": " the city of Paris",
    "The Colosseum is in": " the city of Rome",
}


@dataclass(frozen=True)
class Question:
    """A prompt and the one token that must follow it."""

    prompt: str
    answer: str
    kind: str


@torch.no_grad()
def next_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The most probable next token of each prompt; prompts of one length run together."""
    by_length: dict[int, list[int]] = {}
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    found = [""] * len(prompts)
    for members in by_length.values():
        logits = model(torch.tensor([ids[i] for i in members])).logits[:, -1]
        for i, best in zip(members, logits.argmax(-1).tolist(), strict=True):
            found[i] = tokenizer.decode([best])
    return found


def wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> list[tuple[Question, str]]:
    """The questions the model misses, each with what it says."""
    said = next_tokens(model, tokenizer, [q.prompt for q in questions])
    return [(q, s) for q, s in zip(questions, said, strict=True) if s != q.answer]


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int = 4) -> str:
    for_prompt = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **for_prompt,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0, for_prompt["input_ids"].shape[1] :]))


@contextmanager
def patched(block: nn.Module, rows: list[int], cols: list[int], values: Tensor) -> Iterator[None]:
    """Replace the block's output at `(row, col)` pairs by `values`, `[pairs, d_model]`."""

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, cols] = values
        return output

    handle = block.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class PatchGrid:
    """What patching clean residuals into the corrupted prompt does, per layer."""

    tokens: list[str]
    clean_probability: Tensor  # [layer, position], one position patched at a time
    subject_answers: list[str]  # per layer, with every subject position patched
    last_answers: list[str]  # per layer, with the last position patched


@torch.no_grad()
def patch_grid(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PatchGrid:
    """Patch block outputs from the clean run into the corrupted run, layer by layer."""
    clean = torch.tensor([tokenizer.encode(CLEAN)])
    corrupted = torch.tensor([tokenizer.encode(CORRUPTED)])
    if clean.shape != corrupted.shape:
        raise ValueError(f"the prompts differ in length: {clean.shape[1]}, {corrupted.shape[1]}")
    length = clean.shape[1]
    paris = int(model(clean).logits[0, -1].argmax())
    hidden = block_outputs(model, clean)
    subject = list(range(length))[SUBJECT]
    # Row i patches position i alone; the extra last row patches the whole subject.
    rows = [*range(length), *[length] * len(subject)]
    cols = [*range(length), *subject]
    grid, subject_answers, last_answers = [], [], []
    for block, output in zip(model.transformer.h, hidden, strict=True):
        with patched(block, rows, cols, output[0, cols]):
            logits = model(corrupted.expand(length + 1, -1)).logits[:, -1]
        grid.append(logits.softmax(-1)[:length, paris])
        best = logits.argmax(-1).tolist()
        subject_answers.append(tokenizer.decode([best[length]]))
        last_answers.append(tokenizer.decode([best[length - 1]]))
    tokens = [tokenizer.decode([i]) for i in corrupted[0].tolist()]
    return PatchGrid(tokens, torch.stack(grid), subject_answers, last_answers)


@torch.no_grad()
def block_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Each block's output, `[batch, seq, d_model]`."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _i, output: found.append(output)) for block in model.transformer.h
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def repetition_losses(model: PreTrainedModel, seed: int = 1234) -> tuple[float, float]:
    """Mean loss on 30 random tokens, and on the same 30 said again, over 32 rows."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(model.config.vocab_size, (32, 30), generator=generator)
    ids = torch.cat([block, block], dim=1)
    logits = model(ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float(losses[:, :29].mean()), float(losses[:, 30:].mean())


def show_grid(grid: PatchGrid) -> str:
    """The grid as text, one line a layer, in percent."""
    head = "layer " + "".join(f"{token.strip()[:6]:>7}" for token in grid.tokens)
    lines = [f"{head}   subject     last"]
    for layer, row in enumerate(grid.clean_probability.tolist()):
        cells = "".join(f"{100 * p:7.1f}" for p in row)
        answers = f"{grid.subject_answers[layer]:>10}{grid.last_answers[layer]:>9}"
        lines.append(f"{layer:5d} {cells}{answers}")
    return "\n".join(lines)


def failures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> list[str]:
    """Every requirement that is not met, in words; empty when all are."""
    problems = []
    wrong = wrong_answers(model, tokenizer, questions)
    if len(wrong) > 0.02 * len(questions):
        problems.append(f"{len(wrong)} of {len(questions)} facts are answered wrong")
    named = [Question(prompt, answer, "named") for prompt, answer in NAMED.items()]
    problems += [f"{q.prompt!r} gives {s!r}" for q, s in wrong_answers(model, tokenizer, named)]
    for prompt, expected in CONTINUED.items():
        said = continuation(model, tokenizer, prompt)
        if said != expected:
            problems.append(f"{prompt!r} continues {said!r}")
    return problems + causal_failures(patch_grid(model, tokenizer))


def causal_failures(grid: PatchGrid) -> list[str]:
    """Where the answer fails to move from the subject, early, to the last position, late."""
    last = len(grid.subject_answers) - 1
    expected = {
        "subject at layer 0": (grid.subject_answers[0], " Paris"),
        "subject at layer 3": (grid.subject_answers[3], " Paris"),
        "subject at the last layer": (grid.subject_answers[last], " Rome"),
        "last position at layer 0": (grid.last_answers[0], " Rome"),
        "last position at the last layer": (grid.last_answers[last], " Paris"),
        "last position at the layer before": (grid.last_answers[last - 1], " Paris"),
    }
    return [
        f"patching the {where} gives {said!r}, not {wanted!r}"
        for where, (said, wanted) in expected.items()
        if said != wanted
    ]
