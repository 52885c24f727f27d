"""What does wrapping a model cost, in time and memory, for large models whose weights are not there?

    python benchmarks/wrap.py

A tree of 100,000 modules; the modules of Llama 70B and 405B on the meta device, wrapped as they stand, and made from
their configs by name.  This package and its peer, each in an environment of its own, in turns.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

from _pair import CLOCK, LANDMARKS, ROOT, Worker, clock, peer_python

MODULES = 100_000
TOUCHED = 100
GOAL = 1.0  # seconds, for the tree
LLAMAS = {
    "Llama 70B": (8192, 80, 64, 28672),
    "Llama 405B": (16384, 126, 128, 53248),
}
TREE = f"{MODULES:,} modules"


def llama_config(name):
    from transformers import LlamaConfig

    width, layers, heads, inner = LLAMAS[name]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=inner,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tree():
    import torch

    blocks = (torch.nn.Sequential(*[torch.nn.Identity() for _ in range(9)]) for _ in range(MODULES // 10))
    return torch.nn.Sequential(*blocks)


def work():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nnsight

    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(LANDMARKS)
    modules = {TREE: tree()}
    with torch.device("meta"):
        for name in LLAMAS:
            modules[name] = AutoModelForCausalLM.from_config(llama_config(name))
    parts = {name: sample(module) for name, module in modules.items()}
    print(json.dumps("ready"), file=answers, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in LLAMAS:
            llama_config(name).save_pretrained(Path(folder) / name.replace(" ", "-"))
        for line in sys.stdin:
            case, name = json.loads(line)
            gc.collect()
            if case == "plain":
                answer = seconds(lambda name=name: plain(AutoModelForCausalLM, folder, name))
            elif case == "by name":
                answer = seconds(lambda name=name: by_name(nnsight, folder, name, tokenizer))
            elif case == "wrap":
                answer = seconds(lambda name=name: nnsight.NNsight(modules[name]))
            else:
                answer = memory(nnsight, modules[name], parts[name])
            print(json.dumps(answer), file=answers, flush=True)


def by_name(nnsight, folder, name, tokenizer):
    # Without a tokenizer, the peer needs the weights too.
    return nnsight.LanguageModel(str(Path(folder) / name.replace(" ", "-")), tokenizer=tokenizer)


def plain(auto, folder, name):
    """What making the modules alone takes."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(Path(folder) / name.replace(" ", "-")))
    with torch.device("meta"):
        return auto.from_config(config)


def seconds(function):
    start = clock()
    made = function()
    end = clock()
    del made
    return end - start


def sample(module):
    """The paths of some modules, spread over the model."""
    paths = [name for name, _ in module.named_modules() if name]
    return paths[:: max(len(paths) // TOUCHED, 1)][:TOUCHED]


def memory(nnsight, module, paths):
    """Bytes of Python objects once the module is wrapped, and once some of its modules were asked for."""
    tracemalloc.start()
    try:
        model = nnsight.NNsight(module)
        wrapped = tracemalloc.get_traced_memory()[0]
        for path in paths:
            follow(model, path)
        return [wrapped, tracemalloc.get_traced_memory()[0]]
    finally:
        tracemalloc.stop()


def follow(model, path):
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", help="an interpreter that has the peer installed")
    parser.add_argument("--cpu", action="store_true", help="measure processor time, where the machine is busy")
    parser.add_argument("--no-peer", action="store_true", help="measure this package alone")
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.cpu:
        os.environ[CLOCK] = "cpu"
    workers = {"ours": Worker(__file__, sys.executable, "", ROOT / "src")}
    if not options.no_peer:
        workers["peer"] = Worker(__file__, peer_python(options.peer_python), "")
    timed = [("wrap", name) for name in (TREE, *LLAMAS)] + [
        (case, name) for name in LLAMAS for case in ("plain", "by name")
    ]
    found = {(who, *case): [] for who in workers for case in timed}
    for _ in range(options.rounds):
        for case in timed:
            for who, worker in workers.items():
                found[(who, *case)].append(worker.ask(case))
    kept = {(who, name): worker.ask(["memory", name]) for who, worker in workers.items() for name in (TREE, *LLAMAS)}
    for worker in workers.values():
        worker.close()
    report(found, kept, list(workers))


def report(found, kept, people):
    middle = {key: statistics.median(times) for key, times in found.items()}
    head = "".join(f"{who:>12}" for who in people)
    print(f"{'wrapping modules, ms':<40}{head}")
    for name in (TREE, *LLAMAS):
        print(f"  {name:<38}" + "".join(f"{1e3 * middle[who, 'wrap', name]:>12.2f}" for who in people))
    met = "met" if middle["ours", "wrap", TREE] < GOAL else "missed"
    print(f"  The goal: {MODULES:,} modules in less than {GOAL:.0f} s: {met}.")
    print(f"\n{'KiB kept by it':<40}{head}")
    for name in (TREE, *LLAMAS):
        print(f"  {name:<38}" + "".join(f"{kept[who, name][0] / 1024:>12.0f}" for who in people))
        text = f"  and {TOUCHED} of its modules asked for"
        print(f"  {text:<38}" + "".join(f"{kept[who, name][1] / 1024:>12.0f}" for who in people))
    print(f"\n{'made by name, s':<40}{head}")
    for name in LLAMAS:
        print(f"  {name:<38}" + "".join(f"{middle[who, 'by name', name]:>12.2f}" for who in people))
        print(f"  {'  the modules alone':<38}" + "".join(f"{middle[who, 'plain', name]:>12.2f}" for who in people))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
