"""How much faster is a compiled sweep of patches than a loop of traces, of this package and of its peer?

    python benchmarks/sweep.py

A model of GPT-2's size with random weights, ten tokens, layer × position and layer × head.  All loops and sweeps are
measured in one run, in turns, and their numbers are compared; the sweep's memory is held against its budget.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

from _pair import LANDMARKS, ROOT, Worker, peer_python

GOAL = 8  # times faster than either loop
TOLERANCE = 1e-4  # between the numbers of a loop and of a sweep
LAYERS, HEADS, WIDTH, TOKENS, ANSWER = 12, 12, 768, 10, 5
SIZE = WIDTH // HEADS
SWEEPS = {"pos": "layer × position of resid_pre", "head": "layer × head of z"}


# --- the loops: the same code for both packages --------------------------------------------------
# The peer reads these bodies from their source: they stand on lines of their own, and save what they keep.


def loop_pos(model, clean, corrupted):
    with model.trace(clean):
        source = [model.transformer.h[i].input for i in range(12)].save()
    found = []
    for layer in range(LAYERS):
        for pos in range(TOKENS):
            with model.trace(corrupted):
                model.transformer.h[layer].input[:, pos] = source[layer][:, pos]
                last = model.lm_head.output[0, -1].save()
            found.append(last.log_softmax(-1)[ANSWER].item())
    return found


def loop_head(model, clean, corrupted):
    with model.trace(clean):
        source = [model.transformer.h[i].attn.c_proj.input for i in range(12)].save()
    found = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            part = slice(head * SIZE, (head + 1) * SIZE)
            with model.trace(corrupted):
                model.transformer.h[layer].attn.c_proj.input[:, :, part] = source[layer][:, :, part]
                last = model.lm_head.output[0, -1].save()
            found.append(last.log_softmax(-1)[ANSWER].item())
    return found


# --- the sweeps ----------------------------------------------------------------------------------


def sweep(model, clean, corrupted, axis, memory):
    from nnsight.experiments import activation_patching, log_prob

    site = "resid_pre" if axis == "pos" else "head_z"
    found = activation_patching(
        model, clean[0], corrupted[0], log_prob(ANSWER), site, ("layer", axis), memory=memory, progress=False
    )
    return found.values.flatten().tolist()


# --- the worker: one in each environment ---------------------------------------------------------


def make_subject():
    """The wrapped model and two prompts."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import nnsight

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    module = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)).eval()
    prompts = torch.randint(0, module.config.vocab_size, (2, 1, TOKENS))
    tokenizer = AutoTokenizer.from_pretrained(LANDMARKS)  # the peer wants one; the prompts are token ids
    return nnsight.LanguageModel(module, tokenizer=tokenizer), prompts[0], prompts[1]


def memory_of(run):
    """The bytes by which a run raised the process' memory at most; None where that cannot be told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    except OSError:
        run()
        return None
    before = status_of("VmRSS")
    run()
    return status_of("VmHWM") - before


def status_of(name):
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def work(settings):
    """Answer each line `[what, axis]` with the seconds, the processor's seconds, and the numbers or the memory."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    warnings.simplefilter("ignore")  # the peer calls LanguageModel deprecated
    threads, memory = json.loads(settings)
    torch.set_num_threads(threads)
    subject = make_subject()
    loops = {"pos": loop_pos, "head": loop_head}
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        what, axis = json.loads(line)
        wall, processor = time.perf_counter(), time.process_time()
        if what == "loop":
            found = loops[axis](*subject)
        elif what == "sweep":
            found = sweep(*subject, axis, memory)
        else:
            found = memory_of(lambda axis=axis: sweep(*subject, axis, memory))
        times = time.perf_counter() - wall, time.process_time() - processor
        print(json.dumps([*times, found]), file=answers, flush=True)


# --- the run -------------------------------------------------------------------------------------


def run(workers, rounds):
    """`(axis, who) -> [(seconds, processor's seconds)]`, and the largest difference of numbers by axis."""
    times = {(axis, who): [] for axis in SWEEPS for who in ("sweep", *workers)}
    apart = dict.fromkeys(SWEEPS, 0.0)
    for number in range(rounds):
        for axis in SWEEPS:
            numbers = {}
            for who in times_order(workers, number):
                worker = workers["ours" if who == "sweep" else who]
                wall, processor, numbers[who] = worker.ask(["sweep" if who == "sweep" else "loop", axis])
                times[axis, who].append((wall, processor))
            for who in workers:
                gaps = [abs(a - b) for a, b in zip(numbers["sweep"], numbers[who], strict=True)]
                apart[axis] = max(apart[axis], *gaps)
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {rounds}", end="\n" if number + 1 == rounds else "", file=sys.stderr)
    return times, apart


def times_order(workers, number):
    order = ["sweep", *workers]
    return order if number % 2 else order[::-1]


def report(times, apart, memory, budget, people):
    columns = "".join(f"{f'loop, {who}':>16}" for who in people) + "".join(f"{f'ratio, {who}':>14}" for who in people)
    for kind, title in enumerate(("seconds", "processor's seconds")):
        print(f"\n{title:<34}{'sweep':>10}{columns}{'goal':>8}")
        for axis, name in SWEEPS.items():
            ours = statistics.median(pair[kind] for pair in times[axis, "sweep"])
            loops = [statistics.median(pair[kind] for pair in times[axis, who]) for who in people]
            line = f"{name:<34}{ours:>10.2f}" + "".join(f"{loop:>16.2f}" for loop in loops)
            line += "".join(f"{loop / ours:>14.1f}" for loop in loops)
            print(f"{line}{'met' if min(loops) >= GOAL * ours else 'missed':>8}")
    print(f"\n{'':<34}{'largest difference':>20}{'memory':>12}{'budget':>12}{'goal':>8}")
    for axis, name in SWEEPS.items():
        used = memory[axis]
        fits = used is None or used <= budget
        shown = "unknown" if used is None else f"{used / 1e6:.0f} MB"
        met = "met" if apart[axis] <= TOLERANCE and fits else "missed"
        print(f"{name:<34}{apart[axis]:>20.1e}{shown:>12}{f'{budget / 1e6:.0f} MB':>12}{met:>8}")
    print(
        f"\nMedian of the rounds. The goals: {GOAL} times faster, numbers within {TOLERANCE}, memory within the budget."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=200, help="the sweep's budget in MB")
    parser.add_argument("--peer-python", help="an interpreter that has the peer installed")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone")
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)  # the worker's settings
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model)
        return
    budget = options.memory * 10**6
    settings = json.dumps([options.threads, budget])
    workers = {"ours": Worker(__file__, sys.executable, settings, ROOT / "src")}
    if not options.no_peer:
        workers["peer"] = Worker(__file__, peer_python(options.peer_python), settings)
    for axis in SWEEPS:  # what a first run sets up is not measured
        workers["ours"].ask(["sweep", axis])
    times, apart = run(workers, options.rounds)
    memory = {axis: workers["ours"].ask(["memory", axis])[2] for axis in SWEEPS}
    for worker in workers.values():
        worker.close()
    report(times, apart, memory, budget, list(workers))


if __name__ == "__main__":
    main()
