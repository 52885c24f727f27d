"""How fast are activations collected to disk, beside a plain batched forward of the same prompts?

    python benchmarks/collect.py

Both run the same batches in turns; the plain forward keeps nothing. Then 100,000 short prompts, and the memory meanwhile;
and the same once more, killed in the middle (SIGKILL) and taken up again, whose files must be those of the run that was not.
"""

import argparse
import hashlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nnsight import LanguageModel
from nnsight.experiments import collect_activations
from nnsight.experiments._corpus import batches, encode_prompts

GOAL = 0.9
BATCH_TOKENS = 4096


def random_prompts(count, shortest, longest, vocabulary):
    chance = random.Random(0)
    return [[chance.randrange(vocabulary) for _ in range(chance.randint(shortest, longest))] for _ in range(count)]


def plain(model, encoded):
    module = model._model
    with torch.no_grad():
        for batch in batches(encoded, BATCH_TOKENS, padded=True):
            longest = max(len(prompt.ids) for prompt in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(batch):
                ids[i, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
                mask[i, longest - len(prompt.ids) :] = 1
            if mask.all():
                module(ids, use_cache=False)
            else:
                position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
                module(ids, attention_mask=mask, position_ids=position_ids, use_cache=False)


def speed(model, folder, rounds, sites):
    """Tokens a second of both, and the middle ratio of the rounds."""
    prompts = random_prompts(400, 20, 60, model.config.vocab_size)
    encoded = encode_prompts(None, prompts, 0, "all", None)
    tokens = sum(map(len, prompts))
    times = []
    plain(model, encoded)
    for number in range(rounds):
        start = time.perf_counter()
        plain(model, encoded)
        middle = time.perf_counter()
        to = folder / f"{len(sites)}-{number}"
        collect_activations(model, prompts, sites, to=to, batch_tokens=BATCH_TOKENS, progress=False)
        times.append((middle - start, time.perf_counter() - middle))
        shutil.rmtree(to)
    forward, collected = (tokens / statistics.median(column) for column in zip(*times, strict=True))
    return forward, collected, statistics.median(a / b for a, b in times)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def collect_many(model, to, prompts):
    collect_activations(
        model,
        prompts,
        "resid_post[2]",
        to=to,
        batch_tokens=BATCH_TOKENS,
        shard_bytes=32 * 2**20,
        progress=False,
    )


def short_prompts(model, count):
    return random_prompts(count, 4, 8, model.config.vocab_size)


def memory(model, to, count):
    """Resident memory (MiB) after each tenth of many short prompts."""
    found = []

    def watched():
        for i, prompt in enumerate(short_prompts(model, count)):
            if i and i % (count // 10) == 0:
                found.append(resident())
            yield prompt

    start = time.perf_counter()
    collect_many(model, to, watched())
    return [*found, resident()], count / (time.perf_counter() - start)


def killed(name, to, whole, count):
    """Shards that were there when the process was killed, and whether the files of the one after it are those of `whole`."""
    command = [sys.executable, __file__, "--model", name, "--prompts", str(count), "--into", str(to)]
    half = len(list(whole.glob("*.safetensors"))) // 2
    child = subprocess.Popen(command)
    while child.poll() is None and len(list(to.glob("*.safetensors"))) < half:
        time.sleep(0.01)
    child.kill()
    assert child.wait() < 0, "the process ended before it was killed"
    written = len(list(to.glob("*.safetensors")))
    subprocess.run(command, check=True)
    return written, contents(to) == contents(whole)


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="nnsight/landmarks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # collect to this folder, and nothing else
    arguments = parser.parse_args()
    model = LanguageModel(arguments.model, dispatch=True)
    if arguments.into:
        collect_many(model, arguments.into, short_prompts(model, arguments.prompts))
        return
    layers = len(model.layers)
    folder = Path(tempfile.mkdtemp(prefix="nnsight-collect-"))
    missed = False
    try:
        cases = {
            "last layer": [f"resid_post[{layers - 1}]"],
            "every layer": [f"resid_post[{i}]" for i in range(layers)],
        }
        print(f"{'':24}{'plain, tok/s':>14}{'collected':>12}{'ratio':>8}{'goal':>7}")
        for name, sites in cases.items():
            forward, collected, ratio = speed(model, folder, arguments.rounds, sites)
            missed |= name == "last layer" and ratio < GOAL
            goal = GOAL if name == "last layer" else ""
            print(f"{name:24}{forward:14,.0f}{collected:12,.0f}{ratio:8.2f}{goal:>7}")
        sizes, rate = memory(model, folder / "many", arguments.prompts)
        print(f"\n{arguments.prompts:,} prompts of 4 to 8 tokens, {rate:,.0f} a second; resident MiB after each tenth:")
        print("  " + " ".join(f"{size:.0f}" for size in sizes))
        written, same = killed(arguments.model, folder / "killed", folder / "many", arguments.prompts)
        print(f"killed with {written} shards written, then taken up: {'the same files' if same else 'OTHER FILES'}")
        missed |= not same
    finally:
        shutil.rmtree(folder)
    sys.exit(missed)


if __name__ == "__main__":
    main()
