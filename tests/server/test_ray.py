"""Replicas in a real Ray cluster: the same answers, deaths of actors, nodes and the service, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import torch

import nnsight
from nnsight import CONFIG, LanguageModel
from nnsight.server._ray import Cluster, RayError

pytest.importorskip("ray", reason='Ray is not installed: pip install "nnsight[ray]"')

NAME = "nnsight/landmarks"
PROMPT = "The Eiffel Tower is in the city of"
LIST_GROUPS = """
import json, sys, ray, ray.util
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
while sys.stdin.readline():
    print(json.dumps([[g["name"], g["state"]] for g in ray.util.placement_group_table().values()]), flush=True)
"""


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Nodes:
    """A cluster whose head holds no replicas, and nodes with room for one each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        noticing = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": noticing})
        self.address = self.cluster.address
        self.workers = []
        command = [sys.executable, "-c", LIST_GROUPS, self.address]
        self.asked = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def add(self):
        self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, wait=False))
        return self.workers[-1]

    def groups(self):
        """The placement groups that are there."""
        self.asked.stdin.write("\n")
        self.asked.stdin.flush()
        while not (line := self.asked.stdout.readline()).startswith("["):
            assert line
        return [name for name, state in json.loads(line) if state != "REMOVED"]

    def close(self):
        self.asked.stdin.close()
        self.asked.wait(30)
        self.asked.stdout.close()
        logs = Path(self.cluster.head_node.get_session_dir_path())
        self.cluster.shutdown()
        shutil.rmtree(logs, ignore_errors=True)


def actors():
    """The processes of replicas, by node."""
    return processes(lambda line: line[0].startswith("ray::ModelActor"))


def holders():
    """The processes that hold models, beside the actors."""
    owners = set(actors())
    found = processes(lambda line: "nnsight.server._worker" in line)
    return {pid: process for pid, process in found.items() if process.ppid() in owners}


def processes(wanted):
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if line and wanted(line) and os.environ["HF_HOME"] == process.environ().get("HF_HOME"):
                found[process.pid] = process
    return found


@pytest.fixture(scope="module")
def nodes():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def place(nodes, start_server, tmp_path_factory):
    """A server with two replicas, each on a node of its own; tests may put another in its stead."""

    class Place:
        folder = tmp_path_factory.mktemp("ray")
        workers = (nodes.add(), nodes.add())  # before the server, which is to find room at once

        def start(self, *more):
            self.server = start_server(NAME, "--ray", nodes.address, "--replicas", "2", *more, folder=self.folder)
            CONFIG.API.HOST = self.server.host
            self.wait(2)

        def wait(self, ready):
            wait_until(lambda: [model.ready for model in nnsight.status().models] == [ready])

        def ended(self):
            """How many jobs have ended how, as this process of the server has counted them."""
            lines = httpx.get(f"{self.server.host}/metrics").text.splitlines()
            found = (line for line in lines if line.startswith("nnsight_jobs_ended_total"))
            return {line.partition('status="')[2].partition('"')[0]: float(line.split()[-1]) for line in found}

    before, place = CONFIG.API.HOST, Place()
    place.start()
    yield place
    CONFIG.API.HOST = before
    place.server.process.terminate()  # before the cluster is gone
    place.server.process.wait(60)


def send(number, seconds, size=0):
    model = LanguageModel(NAME)
    with model.trace(PROMPT, remote=True, blocking=False, timeout=200, solo=True) as job:
        import time as clock

        import torch as library

        print("begun")
        clock.sleep(seconds)
        mine = [number].save()
        large = library.full((size,), float(number)).save()
    wait_until(lambda: job.id is not None)
    return job


def check(job, number, size=0):
    values = job.result()
    assert values["mine"] == [number]
    assert torch.equal(values["large"], torch.full((size,), float(number)))


def test_a_job_is_confined_and_equals_the_local_trace(place):
    model = LanguageModel(NAME)
    with model.trace(PROMPT, remote=True):
        model.transformer.h[0].output[0][:, -1] = 0
        hidden = model.transformer.h[1].output[0].save()
        logits = model.output.logits.save()
        try:
            with open("/etc/passwd") as file:
                seen = file.read(1)
        except OSError as error:
            seen = type(error).__name__
        seen = seen.save()
    with model.trace(PROMPT):
        model.transformer.h[0].output[0][:, -1] = 0
        hidden_here = model.transformer.h[1].output[0].save()
        logits_here = model.output.logits.save()
    assert torch.equal(hidden, hidden_here)
    assert torch.equal(logits, logits_here)
    assert seen in ("PermissionError", "FileNotFoundError")
    assert len(actors()) == len(holders()) == 2


def test_an_error_of_a_block_is_the_same_error(place):
    model = LanguageModel(NAME)
    with pytest.raises(ValueError, match="of the block"):
        with model.trace(PROMPT, remote=True):
            raise ValueError("of the block")


def test_replicas_on_two_nodes_share_the_queue(place):
    parents = [process.parent().pid for process in actors().values()]
    assert len(set(parents)) == 2
    begun = time.monotonic()
    for number, job in enumerate([send(0, 2), send(1, 2)]):
        check(job, number)
    assert time.monotonic() - begun < 3.9


def test_a_job_is_cancelled_where_it_runs(place):
    job = send(0, 100)
    wait_until(lambda: job.status == "running")
    job.cancel()
    wait_until(lambda: job.status == "cancelled", 10)
    check(send(5, 0), 5)


def test_every_job_ends_once_when_actors_die(place):
    """Both die: one job is done, two run, one is about to answer with megabytes or has just begun to, one waits."""
    counted = place.ended()
    done = send(0, 0)
    check(done, 0)
    running, finishing, waiting = send(1, 1.5), send(2, 0, size=8_000_000), send(3, 0)
    wait_until(lambda: running.status == "running" and finishing.status != "queued")
    for process in actors().values():
        process.kill()
    check(running, 1)
    check(finishing, 2, 8_000_000)
    check(waiting, 3)
    assert done.status == "done"
    assert place.ended()["done"] - counted["done"] == 4
    assert place.ended().keys() == counted.keys()


def test_a_service_that_starts_again_finds_its_actors_and_ends_every_job_once(place):
    place.wait(2)
    before, held = set(actors()), set(holders())
    jobs = [send(1, 3), send(2, 3), send(3, 0)]
    wait_until(lambda: [job.status for job in jobs] == ["running", "running", "queued"])
    address = place.server.host
    place.server.process.kill()
    place.server.process.wait()
    assert set(actors()) == before  # they outlive it
    place.start("--port", address.rpartition(":")[2])
    assert place.server.host == address
    for number, job in enumerate(jobs, 1):
        check(job, number)
    assert set(actors()) == before
    assert set(holders()) == held  # and the weights were not loaded again
    assert place.ended() == {"done": 3}


def test_every_job_ends_once_when_a_node_dies(place, nodes):
    counted = place.ended()
    jobs = [send(1, 2), send(2, 2), send(3, 0), send(4, 0, size=1_000_000)]
    wait_until(lambda: sum(job.status == "running" for job in jobs) == 2)
    node = place.workers[0]
    nodes.workers.remove(node)
    raylets = [info.process.pid for kind, infos in node.all_processes.items() if kind == "raylet" for info in infos]
    assert len(raylets) == 1
    os.kill(raylets[0], signal.SIGKILL)
    for number, job in enumerate(jobs, 1):
        check(job, number, 1_000_000 if number == 4 else 0)
    assert place.ended()["done"] - counted["done"] == 4
    wait_until(lambda: [model.ready for model in nnsight.status().models] == [1])
    wait_until(lambda: any("no room" in (model.failure or "") for model in nnsight.status().models))
    wait_until(lambda: len(actors()) == len(holders()) == 1)  # what the node held has gone with it


def test_nothing_is_left_when_the_server_ends(place, nodes):
    assert nodes.groups()
    place.server.process.terminate()
    place.server.process.wait(60)
    wait_until(lambda: not actors() and not holders(), 20)
    assert nodes.groups() == []


def test_ray_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r'pip install "nnsight\[ray\]"'):
        Cluster("auto", "tests", {"CPU": 1})


@pytest.mark.parametrize(
    ("address", "text"),
    [("127.0.0.1:1", "There is no Ray cluster at '127.0.0.1:1'"), ("ray://host", "is no address of a Ray cluster")],
)
def test_a_cluster_that_is_not_there_is_named(address, text):
    with pytest.raises(RayError, match=text):
        Cluster(address, "tests", {"CPU": 1})


# --- within a memory budget -------------------------------------------------------------------------------------

HERE, THERE = "openai-community/gpt2", "gpt2"  # one small model by two names: 9.8 MiB of weights each


def tiers():
    return {model.name: model.tier for model in nnsight.status().models}


def trace(name):
    model = LanguageModel(name)
    with model.trace(PROMPT, remote=True, timeout=100):
        logits = model.output.logits.save()
    with model.trace(PROMPT):
        expected = model.output.logits.save()
    assert torch.equal(logits, expected)


@pytest.fixture
def worker(nodes):
    """There is a node with room for two halves."""
    if not nodes.workers:
        nodes.add()


@pytest.mark.usefixtures("worker")
def test_models_are_loaded_on_demand_within_the_budget(nodes, start_server, monkeypatch):
    """There is room for the weights of one, and on the node that is left for the processes of two."""
    options = ("--memory-budget", "0.015", "--warm", "1", "--replica-cpus", "0.5")
    server = start_server(HERE, THERE, "--ray", nodes.address, *options)
    monkeypatch.setattr(CONFIG.API, "HOST", server.host)
    server.wait_for(HERE)
    most, over = [0.0], threading.Event()

    def watch():
        while not over.wait(0.05):
            lines = httpx.get(f"{server.host}/metrics").text.splitlines()
            most.append(sum(float(line.split()[-1]) for line in lines if line.startswith("nnsight_replicas_ready{")))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        assert tiers() == {HERE: "hot", THERE: "cold"}
        first = set(actors())
        trace(THERE)
        assert tiers() == {HERE: "warm", THERE: "hot"}
        assert set(actors()) > first  # what is warm has its process
        pair = set(actors())
        trace(HERE)
        assert tiers() == {HERE: "hot", THERE: "warm"}
        assert set(actors()) == pair
        httpx.post(f"{server.host}/v1/models", json={"model": NAME}, timeout=60).raise_for_status()
        assert tiers()[NAME] == "cold"
        httpx.delete(f"{server.host}/v1/models/{THERE}").raise_for_status()
        assert tiers() == {HERE: "hot", NAME: "cold"}
        wait_until(lambda: len(actors()) == 1)
    finally:
        over.set()
        watching.join()
        server.process.terminate()
        server.process.wait(60)
    assert max(most) == 1  # never were two loaded
    wait_until(lambda: not actors(), 20)
    assert nodes.groups() == []


ABANDON = """
import os, sys
from nnsight.server import Limits
from nnsight.server._ray import Cluster, RayRunner
cluster = Cluster(sys.argv[1], "abandoned", {"CPU": 0.5}, patience=3.0)
RayRunner(cluster, "nnsight/landmarks", 0, {}, Limits(), trusted=False).rest()
os._exit(0)
"""


@pytest.mark.usefixtures("worker")
def test_an_actor_that_no_server_asks_for_ends_by_itself(nodes):
    before = set(processes(_is_worker))  # of other tests' servers
    subprocess.run([sys.executable, "-c", ABANDON, nodes.address], check=True, timeout=100)
    assert nodes.groups() == ["nnsight-abandoned-nnsight/landmarks#0"]
    assert len(actors()) == 1
    wait_until(lambda: not actors() and not nodes.groups(), 60)
    wait_until(lambda: set(processes(_is_worker)) <= before, 20)


def _is_worker(line):
    return "nnsight.server._worker" in line
