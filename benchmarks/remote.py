"""What does it cost to run a block on a server, confined, and how many jobs does a server do a second?

    python benchmarks/remote.py

Client and server share this machine's cores, and talk over loopback.  `--jobs 10000` adds a long run, which shows whether
the server's memory, descriptors and shared memory stay as they are.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from nnsight import CONFIG, LanguageModel, is_model_running
from nnsight.server import create_key

NAME = "nnsight/landmarks"
PROMPT = "The Eiffel Tower is in the city of"
GOAL = 15.0  # milliseconds over the local trace, warm and confined
SHARED_GOAL = 3.0  # times the jobs a second, with shared forwards
CLIENTS = (1, 8, 64)
SIZES = (0.025, 1, 16, 64)  # MiB


class Server:
    """`nnsight serve` of the bundled model, on a port of its own, for as many users as there are clients."""

    def __init__(self, *options):
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "nnsight", "serve", NAME, "--port", "0"]
        if "--trusted" in options:
            self.keys = [None] * max(CLIENTS)  # it is for one user
            command += ["--no-auth-on-loopback"]
        else:
            file = Path(self.folder.name) / "keys"
            self.keys = [create_key(file, f"user-{number}") for number in range(max(CLIENTS))]
            command += ["--api-keys", str(file)]
        command += ["--data", self.folder.name, "--user-jobs", "1000", "--keep", "5", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        CONFIG.API.HOST = self.process.stdout.readline().split()[-1]
        CONFIG.API.APIKEY = self.keys[0]
        while not is_model_running(NAME):
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def one_read(model, **where):
    with torch.no_grad(), model.trace(PROMPT, **where):
        hidden = model.transformer.h[5].output[0].save()
    return hidden


def median(work, rounds):
    """Milliseconds."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def round_trips(model, local, rounds, how):
    for _ in range(10):
        one_read(model, remote=True)
    pairs = [
        (median(lambda: one_read(local), 1), median(lambda: one_read(model, remote=True), 1)) for _ in range(rounds)
    ]
    here, there = zip(*pairs, strict=True)
    goal = GOAL if how == "confined" else ""
    for name, of in (("median", statistics.median), ("best tenth", lambda times: statistics.quantiles(times, n=10)[0])):
        over = of(there) - of(here)
        print(f"{how:10}{name:12}{of(here):8.1f}{of(there):10.1f}{over:10.1f}{goal:>8}")
    return over


def throughput(model, clients, jobs, keys, **options):
    """Jobs a second of so many clients, each of which waits for its answer before it asks again; a key each."""
    left, lock, failures = [jobs], threading.Lock(), []

    def client(key):
        while True:
            with lock:
                if left[0] <= 0:
                    return
                left[0] -= 1
                CONFIG.API.APIKEY = key
                with torch.no_grad():
                    trace = model.trace(PROMPT, remote=True, **options)
            try:
                with torch.no_grad(), trace:
                    hidden = model.transformer.h[5].output[0].save()
                assert hidden.shape[0] == 1
            except Exception as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=client, args=(key,)) for key in keys[:clients]]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    CONFIG.API.APIKEY = keys[0]
    if failures:
        raise failures[0]
    return jobs / (time.perf_counter() - start)


def throughputs(model, jobs, how, keys):
    """Alone, each job has a forward and a process of its own; then clients of one user, and of a user each, share."""
    one = keys[:1] * len(keys)
    for clients in CLIENTS:
        alone = throughput(model, clients, jobs, one, solo=True)
        shared = throughput(model, clients, jobs, one)
        users = throughput(model, clients, jobs, keys)
        print(
            f"{how:12}{clients:>8}{alone:10.1f}{shared:10.1f}{shared / alone:8.2f}{users:12.1f}{users / alone:8.2f}"
            f"{SHARED_GOAL if clients > 1 else '':>7}"
        )


def sizes(model, rounds):
    base = median(lambda: one_read(model, remote=True), rounds)
    for size in SIZES:
        count = int(size * 2**18)

        def save(count=count):
            with torch.no_grad(), model.trace(PROMPT, remote=True):
                values = (model.transformer.h[5].output[0].new_zeros(count) + 1).save()
            assert values.numel() == count

        print(f"{size:>12} MiB{median(save, max(rounds // 5, 3)) - base:12.1f}")


def accesses(model, local, rounds):
    """Microseconds of one access inside a block: many in one job, less the job with one."""

    def many(model, **where):
        with torch.no_grad(), model.trace(PROMPT, **where):
            start = time.perf_counter()
            for _ in range(200):
                for layer in (5,):
                    model.transformer.h[layer].output
            spent = [1e6 * (time.perf_counter() - start) / 200].save()
        return spent[0]

    here = statistics.median(many(local) for _ in range(rounds))
    there = statistics.median(many(model, remote=True) for _ in range(rounds))
    print(f"\nOne access inside a block, microseconds: {here:.1f} here, {there:.1f} confined on the server")


def state_of(pid):
    """Resident MiB, descriptors, and segments of shared memory of a process and those below it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    pages = descriptors = 0
    for process in found:
        with contextlib.suppress(OSError):  # it has just ended
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
            descriptors += len(os.listdir(f"/proc/{process}/fd"))
    return pages * 4096 / 2**20, descriptors, len(os.listdir("/dev/shm"))


def long_run(model, server, jobs):
    print(
        f"\n{jobs:,} jobs of 8 clients; after each tenth: resident MiB, descriptors, shared memory segments, files kept"
    )
    for _ in range(10):
        rate = throughput(model, 8, jobs // 10, server.keys)
        time.sleep(1.0)  # until the runners that are made and ended meanwhile are
        resident, descriptors, segments = state_of(server.process.pid)
        kept = len(os.listdir(Path(server.folder.name) / "jobs"))
        print(f"  {resident:8.0f}{descriptors:6}{segments:6}{kept:8}{rate:10.1f} jobs/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=0, help="a long run of so many jobs")
    parser.add_argument("--burst", type=int, default=256, help="jobs of each measurement of throughput")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, local = LanguageModel(NAME), LanguageModel(NAME, dispatch=True)
    over = 0.0
    print(f"A job with one read, milliseconds\n{'':22}{'local':>8}{'remote':>10}{'over it':>10}{'goal':>8}")
    for how, options in (("confined", ()), ("trusted", ("--trusted",))):
        with Server(*options):
            found = round_trips(model, local, arguments.rounds, how)
            over = found if how == "confined" else over
    columns = f"{'alone':>10}{'one user':>10}{'ratio':>8}{'a user each':>12}{'ratio':>8}{'goal':>7}"
    print(f"\nJobs a second\n{'':12}{'clients':>8}{columns}")
    for how, options in (("confined", ()), ("trusted", ("--trusted",))):
        with Server(*options) as server:
            throughputs(model, arguments.burst, how, server.keys)
    with Server() as server:
        print("\nA saved value, milliseconds over the job with one read")
        sizes(model, arguments.rounds)
        accesses(model, local, 9)
        if arguments.jobs:
            long_run(model, server, arguments.jobs)
    sys.exit(over > GOAL)


if __name__ == "__main__":
    main()
