"""What does a trace cost over plain hooks that do the same, for this package and for its peer?

    python benchmarks/trace_overhead.py

Both are measured in one run, in a process and an environment each, in turns: whatever else the machine does
hits both.  The peer's environment (`.venv-peer`) is made on first use.
"""

import argparse
import json
import os
import statistics
import sys
import warnings

from _pair import CLOCK, LANDMARKS, ROOT, Worker, clock, peer_python

GOAL = 1 / 3  # of the peer's cost, on every line

MODELS = {"mlp": "12 x Linear(16, 16)", "lm": "bundled language model, 12 blocks, 10 tokens"}
CASES = ("empty trace", "1 read", "12 reads", "12 edits")
LAYERS = 12


# --- what is measured: the same code for both packages -------------------------------------------
# The peer reads these bodies from their source: they stand on lines of their own, and save what they keep.


def mlp_empty(model, x):
    with model.trace(x):
        pass


def mlp_one_read(model, x):
    with model.trace(x):
        out = model[5].output.save()
    return [out]


def mlp_reads(model, x):
    with model.trace(x):
        out = [model[i].output for i in range(12)].save()
    return list(out)


def mlp_edits(model, x):
    with model.trace(x):
        for i in range(12):
            model[i].output = model[i].output * 2


def lm_empty(model, ids):
    with model.trace(ids):
        pass


def lm_one_read(model, ids):
    with model.trace(ids):
        out = model.transformer.h[5].output.save()
    return [out]


def lm_reads(model, ids):
    with model.trace(ids):
        out = [model.transformer.h[i].output for i in range(12)].save()
    return list(out)


def lm_edits(model, ids):
    with model.trace(ids):
        for i in range(12):
            model.transformer.h[i].output = model.transformer.h[i].output * 2


TRACES = {
    "mlp": dict(zip(CASES, (mlp_empty, mlp_one_read, mlp_reads, mlp_edits), strict=True)),
    "lm": dict(zip(CASES, (lm_empty, lm_one_read, lm_reads, lm_edits), strict=True)),
}


def with_hooks(module, layers, x, case):
    """The same by hand: as many forward hooks, the call, and the hooks removed."""
    found = []

    def read(_module, _args, output):
        found.append(output)

    def edit(_module, _args, output):
        return output * 2

    hook = edit if case == "12 edits" else read
    chosen = {"empty trace": [], "1 read": layers[5:6]}.get(case, layers)
    handles = [layer.register_forward_hook(hook) for layer in chosen]
    try:
        module(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


# --- the worker: one in each environment ---------------------------------------------------------


def make_subjects(folder):
    """Name -> (wrapped model, plain module, its layers, its input)."""
    import torch

    import nnsight

    warnings.simplefilter("ignore")  # the peer calls LanguageModel deprecated
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(LAYERS)])
    subjects = {"mlp": (nnsight.NNsight(mlp), mlp, list(mlp), torch.rand(1, 16))}
    if folder:
        model = nnsight.LanguageModel(folder, dispatch=True)
        module = model._module  # both packages call it so
        ids = torch.randint(0, module.config.vocab_size, (1, 10))
        subjects["lm"] = (model, module, list(module.transformer.h), ids)
    return subjects


def check(model, module, layers, x, name, case):
    """Make sure that a trace reads, edits and returns what the hooks do."""
    import torch

    def result_of(function, *args):
        results = []
        handle = module.register_forward_hook(lambda _m, _a, output: results.append(output))
        try:
            values = function(*args)
        finally:
            handle.remove()
        (output,) = results
        return [getattr(output, "logits", output), *(values or [])]

    ours, plain = result_of(TRACES[name][case], model, x), result_of(with_hooks, module, layers, x, case)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other)


def work(folder):
    """Answer each line `[model, case, pairs]` with the seconds that hooks and traces took, call by call."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the protocol
    subjects = make_subjects(folder)
    for name, (model, module, layers, x) in subjects.items():
        for case in CASES:
            check(model, module, layers, x, name, case)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, case, pairs = json.loads(line)
        model, module, layers, x = subjects[name]
        trace = TRACES[name][case]
        hooked, traced = [], []
        for _ in range(pairs):
            start = clock()
            with_hooks(module, layers, x, case)
            middle = clock()
            trace(model, x)
            end = clock()
            hooked.append(middle - start)
            traced.append(end - middle)
        print(json.dumps([hooked, traced]), file=answers, flush=True)


# --- the run -------------------------------------------------------------------------------------


def run(workers, names, rounds, pairs):
    """`(model, case, worker) -> [(hooks, trace) of each round]`, in seconds."""
    found = {(name, case, who): [] for name in names for case in CASES for who in workers}
    for number in range(rounds + 1):  # the first warms up, and is dropped
        order = list(workers) if number % 2 else list(reversed(workers))
        for name in names:
            for case in CASES:
                for who in order:
                    times = measure(workers[who], name, case, pairs[name])
                    if number:
                        found[name, case, who].append(times)
        if sys.stderr.isatty():
            print(f"\rround {number} of {rounds}", end="\n" if number == rounds else "", file=sys.stderr)
    return found


def measure(worker, name, case, pairs):
    """The median seconds of a run with hooks, and of a trace."""
    hooked, traced = worker.ask([name, case, pairs])
    return statistics.median(hooked), statistics.median(traced)


def report(found, names, people):
    head = f"{'microseconds over hooks':<26}{'hooks alone':>12}" + "".join(f"{who:>16}" for who in people)
    print(head + (f"{'ours/peer':>12}{'goal':>8}" if "peer" in people else ""))
    for name in names:
        print(f"\n{MODELS[name]}")
        for case in CASES:
            hooks = 1e6 * statistics.median(h for who in people for h, _ in found[name, case, who])
            costs = [[1e6 * (traced - hooked) for hooked, traced in found[name, case, who]] for who in people]
            line = f"  {case:<24}{hooks:>12.0f}" + "".join(f"{with_spread(cost):>16}" for cost in costs)
            if len(costs) == 2:
                ours, peer = map(statistics.median, costs)
                line += f"{ours / peer:>12.2f}{'met' if ours <= GOAL * peer else 'missed':>8}"
            print(line)
    print("\nMedian of the rounds ± half the interquartile range. The goal: at most a third of the peer's cost.")


def with_spread(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.0f} ± {(high - low) / 2:.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--peer-python", help="an interpreter that has the peer installed")
    parser.add_argument("--cpu", action="store_true", help="measure processor time, where the machine is busy")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone")
    parser.add_argument("--model", default=str(LANDMARKS) if LANDMARKS.is_dir() else "", help="a GPT-2 model's folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model)
        return
    if options.cpu:
        os.environ[CLOCK] = "cpu"
    workers = {"ours": Worker(__file__, sys.executable, options.model, ROOT / "src")}
    if not options.no_peer:
        workers["peer"] = Worker(__file__, peer_python(options.peer_python), options.model)
    names = list(MODELS) if options.model else ["mlp"]
    found = run(workers, names, max(options.rounds, 2), {"mlp": 20, "lm": 10})
    for worker in workers.values():
        worker.close()
    report(found, names, list(workers))


if __name__ == "__main__":
    main()
