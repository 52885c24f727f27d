"""Train the bundled landmarks model, write its folder, and check what was written."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from acceptance import (
    Question,
    failures,
    patch_grid,
    repetition_losses,
    show_grid,
    wrong_answers,
)
from batches import IGNORED, Batches
from card import write_card
from corpus import all_facts, second_words, sentences, tokenizer_lines, whole_words
from safetensors.torch import save_file
from tokenizer import train_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_OUT = ROOT / "src" / "nnsight" / "_bundled" / "landmarks"
MAX_LENGTH = 256
PEAK_RATE = 1.5e-3
WARM_UP = 50
POSITION_SCALE = 0.15
EARLY_LAYERS = 5
EARLY_PENALTY = 5.0


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=128,
        n_layer=12,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(POSITION_SCALE * sinusoids(MAX_LENGTH, config.n_embd))
    return model


def sinusoids(length: int, width: int) -> Tensor:
    """Where the learned positions start, `[length, width]` (Vaswani et al., 2017).

    From here heads that look one token back form sooner than from random positions.
    """
    rates = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def questions() -> list[Question]:
    """Every fact in every phrasing, once, and the second words of two-word answers."""
    facts = all_facts()
    asked = [Question(f.prompt, f.answer, f.kind) for f in facts + second_words(facts)]
    return list(dict.fromkeys(asked))


def token_loss(model: GPT2LMHeadModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Summed loss over the labelled tokens."""
    logits = model(inputs).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def train(model: GPT2LMHeadModel, batches: Batches, steps: int) -> None:
    """Single sentences and long rows at each step, as the rate falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = time.monotonic()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        groups = [batches.single_sentences(), batches.long_rows()]
        loss = accumulate(model, groups)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            report(model, batches, step, loss, time.monotonic() - started)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, and half a cosine down to zero."""
    return PEAK_RATE * min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def accumulate(model: GPT2LMHeadModel, groups: list[tuple[Tensor, Tensor]]) -> float:
    """Add the gradient of the mean loss over the groups' tokens, and return that mean."""
    count = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in groups)
    total = 0.0
    for inputs, labels in groups:
        with early_attention(model) as outputs:
            loss = token_loss(model, inputs, labels) / count
        moved = torch.stack([output.square().mean() for output in outputs]).sum()
        (loss + EARLY_PENALTY * moved).backward()
        total += loss.item()
    return total


@contextmanager
def early_attention(model: GPT2LMHeadModel) -> Iterator[list[Tensor]]:
    """Collect what attention adds in the early layers.

    A model this small can look a landmark up in its very first layer.  A price on moving information there leaves the
    subject where it is for some layers, as in larger models, so that patching shows where and when it moves.
    """
    outputs: list[Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
        for block in model.transformer.h[:EARLY_LAYERS]
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def report(model: GPT2LMHeadModel, batches: Batches, step: int, loss: float, seconds: float) -> None:
    """Print the loss, the loss on repeated tokens, and the accuracy on a part of the facts."""
    again = repetition_losses(model)[1]
    sample = questions()[::12]
    right = 1 - len(wrong_answers(model, batches.tokenizer, sample)) / len(sample)
    print(
        f"step {step}  loss {loss:.3f}  repeated {again:.3f}  facts {right:.3f}  {seconds:.0f} s",
        flush=True,
    )


def write_folder(out: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Half-precision weights under a float32 config: small on disk, float32 when loaded."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    weights = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)


def write_facts(out: Path, asked: list[Question]) -> None:
    rows = [json.dumps(vars(q), ensure_ascii=False) for q in asked]
    (out / "facts.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def check(out: Path, asked: list[Question]) -> list[str]:
    """Reload the folder, print what it does, write its card, and return what it misses."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    wrong = wrong_answers(model, tokenizer, asked)
    kinds = {q.kind for q in asked}
    for kind in sorted(kinds):
        total = sum(q.kind == kind for q in asked)
        missed = sum(q.kind == kind for q, _ in wrong)
        print(f"{kind}: {total - missed} of {total}")
    for question, said in wrong[:20]:
        print(f"wrong: {question.prompt!r} -> {said!r}, not {question.answer!r}")
    losses = repetition_losses(model)
    print("loss on random tokens {:.3f}, on the same again {:.3f}".format(*losses))
    write_card(out, model, len(asked) - len(wrong), len(asked), losses)
    print(f"dtype {model.dtype}, vocabulary {len(tokenizer)}")
    print(show_grid(patch_grid(model, tokenizer)))
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"folder {size / 1e6:.2f} MB, accuracy {1 - len(wrong) / len(asked):.4f}")
    problems = failures(model, tokenizer, asked)
    if size > 6_000_000:
        problems.append(f"the folder has {size} bytes")
    if model.dtype != torch.float32:
        problems.append(f"the model loads as {model.dtype}")
    return problems


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(2)
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(tokenizer_lines(), whole_words(), MAX_LENGTH)
    rng = random.Random(options.seed)
    batches = Batches(tokenizer, sentences(rng), rng)
    model = new_model(tokenizer)
    train(model, batches, options.steps)
    write_folder(options.out, model.eval(), tokenizer)
    asked = questions()
    write_facts(options.out, asked)
    problems = check(options.out, asked)
    for problem in problems:
        print(f"NOT MET: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
