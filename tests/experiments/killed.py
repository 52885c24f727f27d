"""Collects activations in processes that are killed (SIGKILL), at each moment of the writing and at any time.

Run as a script with a folder; prints how many were killed. Kept apart from the test's own process, since it forks.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nnsight import NNsight
from nnsight.experiments import ActivationStore, collect_activations

# A child that is killed while it holds the lock that tqdm shares between processes would stop all others.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

torch.set_num_threads(1)  # a forked child has one, and sums in another order than several do

PROMPTS = [[(7 * i + j) % 50 for j in range(1 + i % 9)] for i in range(120)]


def collect(folder):
    torch.manual_seed(0)
    model = NNsight(torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 16)))
    collect_activations(model, PROMPTS, ["0", "1"], to=folder, shard_bytes=16_000, batch_tokens=64, progress=False)


def in_child(work):
    """Run `work` in a child; whether it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def was_killed(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die_at(call, before):
    """Be killed at the `call`-th renaming of a file, before or after it."""
    calls = 0
    replace = os.replace

    def replace_and_die(*paths):
        nonlocal calls
        calls += 1
        if before and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def differing(folder, expected):
    """The files that are not as expected, with their sizes."""
    found = contents(folder)
    names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    return {name: [len(files[name]) if name in files else None for files in (found, expected)] for name in names}


def main(root):
    whole = root / "whole"
    collect(whole)
    expected = contents(whole)
    shards = len(ActivationStore(whole).manifest["shards"])
    assert shards > 3, shards
    killed = 0
    for call in range(1, 2 * shards + 3, 1 if shards < 9 else 2):
        for before in (True, False):
            folder = root / f"{call}-{before}"

            def work(call=call, before=before, folder=folder):
                die_at(call, before)
                collect(folder)

            killed += was_killed(in_child(work))
            collect(folder)
            assert not differing(folder, expected), (call, before, differing(folder, expected))
            shutil.rmtree(folder)
    folder = root / "often"
    delay = 0.01
    while not ((folder / "manifest.json").exists() and ActivationStore(folder).complete):
        child = in_child(lambda: collect(folder))
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        killed += was_killed(child)
        delay *= 1.3
    assert not differing(folder, expected), differing(folder, expected)
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
