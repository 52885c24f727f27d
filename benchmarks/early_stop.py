"""What does reading one layer cost where the forward ends there, as a part of the whole forward?

    python benchmarks/early_stop.py

A GPT-2 of 12 layers of width 768, with random weights, on 64 tokens.  Ours is `stop_after_last=True`, the peer's
`tracer.stop()`; both in one run and in turns.
"""

import argparse
import json
import os
import statistics
import sys
import warnings

from _pair import CLOCK, ROOT, Worker, clock, peer_python

LAYERS = (0, 3, 6, 9, 11)
TOKENS = 64
SLACK = 0.03  # of a forward, over the share of the weights that are used


def ours(model, ids, layer):
    with model.trace(ids, stop_after_last=True):
        hidden = model.transformer.h[layer].output.save()
    return hidden


def peers(model, ids, layer):
    with model.trace(ids) as tracer:
        hidden = model.transformer.h[layer].output.save()
        tracer.stop()
    return hidden


def whole(model, ids, layer):
    with model.trace(ids):
        hidden = model.transformer.h[layer].output.save()
    return hidden


def work():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import nnsight

    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config()).eval()
    model = nnsight.NNsight(module)
    ids = torch.randint(0, module.config.vocab_size, (1, TOKENS))
    early = ours if hasattr(nnsight, "unmount") else peers
    for layer in LAYERS:
        torch.testing.assert_close(tensor(early(model, ids, layer)), tensor(whole(model, ids, layer)), rtol=0, atol=0)
    weights = shares(module)
    cases = {
        "plain": lambda _: module(ids),
        "early": lambda layer: early(model, ids, layer),
    }
    print(json.dumps(weights), file=answers, flush=True)
    for line in sys.stdin:
        case, layer = json.loads(line)
        start = clock()
        cases[case](layer)
        print(json.dumps(clock() - start), file=answers, flush=True)


def tensor(value):
    return value[0] if isinstance(value, tuple) else value


def shares(module):
    """The part of all multiplied weights that lies up to each layer."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in module.transformer.h]
    total = sum(blocks) + module.lm_head.weight.numel()
    return {str(layer): sum(blocks[: layer + 1]) / total for layer in LAYERS}


class Sharing(Worker):
    """A worker that first tells the share of the weights up to each layer."""

    def _answer(self):
        answer = super()._answer()
        if isinstance(answer, dict):
            self.shares = answer
        return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
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
    workers = {"ours": Sharing(__file__, sys.executable, "", ROOT / "src")}
    if not options.no_peer:
        workers["peer"] = Sharing(__file__, peer_python(options.peer_python), "")
    found = {(who, layer): [] for who in workers for layer in LAYERS}
    plain = []
    for number in range(options.rounds + 1):  # the first warms up, and is dropped
        for layer in LAYERS:
            for who, worker in workers.items():
                full, early = worker.ask(["plain", layer]), worker.ask(["early", layer])
                if number:
                    plain.append(full)
                    found[who, layer].append(early / full)
    for worker in workers.values():
        worker.close()
    print(f"{TOKENS} tokens, a plain forward takes {1e3 * statistics.median(plain):.0f} ms; its part, median of")
    print(f"{options.rounds} rounds, that reading a layer takes where the forward ends there\n")
    print(f"{'layer of 12':<14}{'weights used':>14}" + "".join(f"{who:>10}" for who in workers) + f"{'goal':>10}")
    for layer in LAYERS:
        share = workers["ours"].shares[str(layer)]
        ratios = [statistics.median(found[who, layer]) for who in workers]
        met = "met" if ratios[0] <= share + SLACK else "missed"
        print(f"{layer:<14}{share:>14.2f}" + "".join(f"{ratio:>10.2f}" for ratio in ratios) + f"{met:>10}")
    print(f"\nThe goal: at most {SLACK} of a forward more than the part of the multiplied weights that is used.")


if __name__ == "__main__":
    main()
