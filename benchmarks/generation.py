"""What do reads at every step, and a cache of all modules, cost in a generation of 200 tokens?

    python benchmarks/generation.py

Beside plain hooks that do the same and beside the peer, each in an environment of its own, in one run and in turns.
"""

import argparse
import json
import os
import statistics
import sys
import warnings

from _pair import CLOCK, LANDMARKS, ROOT, Worker, clock, peer_python

TOKENS = 200
GOALS = {"read per step": 1.05, "cache of all modules": 1.10}
PROMPT = "The Eiffel Tower is in the city of"


def read_steps(model, ids):
    with model.generate(ids, **OPTIONS) as tracer:
        logits = [].save()
        with tracer.iter[:]:
            logits.append(model.lm_head.output)
    return len(logits)


def read_steps_natively(model, ids):
    logits = []
    with model.generate(ids, **OPTIONS) as tracer:
        for _ in tracer.iter[:]:
            logits.append(model.lm_head.output)
    return len(logits)


def cache_all(model, ids):
    with model.generate(ids, **OPTIONS) as tracer:
        cache = tracer.cache()
    return cache


OPTIONS = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


def hooked_steps(module, ids):
    logits = []
    handle = module.lm_head.register_forward_hook(lambda _m, _a, output: logits.append(output))
    try:
        module.generate(ids, **OPTIONS)
    finally:
        handle.remove()
    return len(logits)


def hooked_cache(module, ids):
    found = {}

    def keep(name):
        def hook(_module, _args, output):
            found.setdefault(name, []).append(detach(output))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in module.named_modules()]
    try:
        module.generate(ids, **OPTIONS)
    finally:
        for handle in handles:
            handle.remove()
    return found


def detach(value):
    if hasattr(value, "detach"):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(detach(item) for item in value)
    if isinstance(value, dict):
        return {key: detach(item) for key, item in value.items()}
    return value


def work(folder):
    import torch

    import nnsight

    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = nnsight.LanguageModel(folder, dispatch=True)
    module = model._module
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    OPTIONS["pad_token_id"] = module.config.eos_token_id
    ours = hasattr(nnsight, "unmount")
    cases = {
        "plain": (lambda: module.generate(ids, **OPTIONS)),
        "hooks: read per step": (lambda: hooked_steps(module, ids)),
        "hooks: cache of all modules": (lambda: hooked_cache(module, ids)),
        "read per step": (lambda: (read_steps_natively if ours else read_steps)(model, ids)),
        "cache of all modules": (lambda: cache_all(model, ids)),
    }
    assert hooked_steps(module, ids) == cases["read per step"]() == TOKENS
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        start = clock()
        kept = cases[json.loads(line)]()
        seconds = clock() - start
        del kept
        print(json.dumps(seconds), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python", help="an interpreter that has the peer installed")
    parser.add_argument("--cpu", action="store_true", help="measure processor time, where the machine is busy")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone")
    parser.add_argument("--model", default=str(LANDMARKS), help="a GPT-2 model's folder")
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
    cases = ["plain", *(f"hooks: {name}" for name in GOALS), *GOALS]
    found = {(who, case): [] for who in workers for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            for who, worker in workers.items():
                found[who, case].append(worker.ask(case))
    for worker in workers.values():
        worker.close()
    print(f"{TOKENS} tokens, median of {options.rounds} rounds; ratios to plain hooks that do the same\n")
    print(f"{'':<24}{'hooks':>10}" + "".join(f"{who:>10}" for who in workers) + f"{'goal':>8}")
    for name, goal in GOALS.items():
        hooks = statistics.median(found["ours", f"hooks: {name}"])
        line = f"{name:<24}{hooks:>9.2f}s"
        for who in workers:
            ratios = [
                ours / theirs for ours, theirs in zip(found[who, name], found[who, f"hooks: {name}"], strict=True)
            ]
            line += f"{statistics.median(ratios):>10.3f}"
        print(line + f"{goal:>8.2f}")
    print(f"{'plain generate':<24}{statistics.median(found['ours', 'plain']):>9.2f}s")


if __name__ == "__main__":
    main()
