"""`nnsight serve --engine vllm` in a process of its own: jobs, completions, cancelled and failing ones, deaths and the end."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

import nnsight
from nnsight import CONFIG, LanguageModel
from nnsight.cli import main
from nnsight.errors import InputError, JobCancelledError, ServerError
from nnsight.server import create_key

from .conftest import LANDMARKS
from .generations import plainly, same, steered

TOWER, FRANCE, ROME = "The Eiffel Tower is in the city of", "The capital of France is", "The Colosseum"
LONG = 90  # tokens
LIMIT = 240  # seconds that nothing here takes
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
OPTIONS = ("--engine", "vllm", "--dtype", "float32", "--max-model-len", "128")  # confined, where not --trusted


def wait_until(condition, seconds=LIMIT):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(pid):
    """The processes of the engines below a server."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    engines = [child for child in children if b"VLLM" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [*engines, *(process for child in children for process in descendants(child))]


class Site:
    """The server, its users and its model, which has a chat template."""

    def __init__(self, start_server, folder, *options):
        from nnsight.modeling.vllm import VLLM

        self.name = str(shutil.copytree(LANDMARKS, folder / "model"))
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
        self.keys = {name: create_key(folder / "keys", name) for name in ("ann", "bob")}
        self.data = folder / "data"
        self.server = start_server(self.name, *OPTIONS, *options, "--api-keys", str(folder / "keys"), folder=self.data)
        self.host = self.server.host
        self.model = VLLM(self.name)
        self.plain = LanguageModel(self.name, dtype=torch.float32, dispatch=True)

    def client(self, user="ann"):
        key = {"Authorization": f"Bearer {self.keys[user]}"} if user else {}
        return httpx.Client(base_url=self.host, headers=key, timeout=LIMIT)

    def info(self):
        return nnsight.status().models[0]

    def count(self, status):
        mark = f'nnsight_jobs_ended_total{{model="{self.name}",status="{status}"}}'
        lines = httpx.get(f"{self.host}/metrics").text.splitlines()
        return next((int(float(line.split()[-1])) for line in lines if line.startswith(mark)), 0)


@pytest.fixture(scope="module")
def started(start_server, tmp_path_factory):
    return Site(start_server, tmp_path_factory.mktemp("serve"))


@pytest.fixture
def site(started, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", started.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", started.keys["ann"])
    wait_until(lambda: nnsight.is_model_running(started.name))
    return started


def remotely(site, prompt, factor, count):
    return steered(site.model, prompt, factor, count, max_tokens=count, min_tokens=count, remote=True, timeout=LIMIT)


def send(model, prompt=TOWER, pause=0.0):
    """A job of many steps, each of which takes a little."""
    options = {"max_tokens": LONG, "min_tokens": LONG, "timeout": LIMIT}
    with model.generate(prompt, remote=True, blocking=False, **options) as job:
        import time as clock

        numbers = [0].save()
        for _ in job.iter[:]:
            stream = model.resid_post[3]
            clock.sleep(pause)
            numbers[0] += stream.shape[0]
    wait_until(lambda: job.id is not None)
    return job


# --- jobs -----------------------------------------------------------------------------------------------------


def test_a_trace_is_that_of_a_local_engine_and_of_transformers(site, engines):
    found = remotely(site, TOWER, 1.5, 4)
    same(found, plainly(site.plain, TOWER, 1.5, 4))
    local = engines("gpt2").engine
    same(found, steered(local, TOWER, 1.5, 4, max_tokens=4, min_tokens=4))
    assert (remotely(site, TOWER, 1.0, 4)[0][0] - found[0][0]).abs().max() > 0.1  # the edit is one


def test_sampling_parameters_travel_for_each_invoke(site, engines):
    def sample(model, **options):
        with model.trace(max_tokens=6, min_tokens=6, temperature=1.5, **options) as tracer:
            with tracer.invoke(TOWER, seed=3):
                first = tracer.result.save()
            with tracer.invoke(TOWER, seed=3):
                again = tracer.result.save()
            with tracer.invoke(TOWER, seed=4, max_tokens=2, min_tokens=2):
                other = tracer.result.save()
        return [first.tolist(), again.tolist(), other.tolist()]

    first, again, other = sample(site.model, remote=True)
    assert first == again
    assert len(other[0]) == len(first[0]) - 4
    assert [first, again, other] == sample(engines("gpt2").engine)


def test_a_session_is_one_job_with_several_rounds(site):
    model = site.model
    with model.session(remote=True):
        with model.trace(TOWER):
            stream = model.resid_post[3].save()
        with model.trace(TOWER):
            model.resid_post[3][:] = 2 * stream
            logits = model.logits.save()
    with site.plain.trace(TOWER):
        site.plain.resid_post[3][:] *= 2
        expected = site.plain.output.logits.save()
    torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=1e-4)


def test_several_clients_are_served_at_once(site):
    model = site.model
    jobs = [send(model, prompt, pause=0.01) for prompt in (TOWER, FRANCE, ROME) * 2]
    wait_until(lambda: site.info().active == len(jobs), 20)  # all of them are in the engine, none waits
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(remotely, site, prompt, 1.3, 3) for prompt in (TOWER, FRANCE, ROME)]
        for prompt, outcome in zip((TOWER, FRANCE, ROME), found, strict=True):
            same(outcome.result(LIMIT), plainly(site.plain, prompt, 1.3, 3))
    assert [job.result()["numbers"] for job in jobs] == [[LONG]] * len(jobs)


def test_prints_come_as_they_are_made(site, capsys):
    model = site.model
    with model.generate(TOWER, max_tokens=2, min_tokens=2, remote=True) as tracer:
        for step in tracer.iter[:]:
            print("step", step, tuple(model.resid_post[0].shape))
    assert capsys.readouterr().out == "step 0 (1, 10, 128)\nstep 1 (1, 1, 128)\n"


def test_an_error_has_its_class_and_line_and_harms_no_other(site):
    model = site.model
    other = send(model)
    with pytest.raises(IndexError) as caught, model.trace(TOWER, remote=True):
        stream = model.resid_post[3]
        stream[:, 1000]  # this line
    line = caught.traceback[-1]
    assert "# this line" in str(line.statement)
    assert os.path.basename(str(line.path)) == os.path.basename(__file__)
    assert other.result()["numbers"] == [LONG]


def test_what_vllm_refuses_is_an_error_of_that_job(site):
    model = site.model
    with pytest.raises(nnsight.errors.EngineError, match="128"), model.trace(TOWER * 40, remote=True):
        model.resid_post[3].save()
    with pytest.raises(nnsight.errors.EngineError, match="top_pp"), model.trace(TOWER, top_pp=1, remote=True):
        model.resid_post[3].save()


def test_a_cancelled_job_ends_and_leaves_the_engine(site):
    before = site.count("cancelled")
    job = send(site.model, pause=0.05)
    wait_until(lambda: job.status == "running")
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.result()
    assert site.count("cancelled") == before + 1
    wait_until(lambda: site.info().active == 0, 10)
    same(remotely(site, FRANCE, 1.0, 2), plainly(site.plain, FRANCE, 1.0, 2))


def test_a_block_for_the_other_modules_is_refused_by_name(site):
    model = site.plain
    with pytest.raises(ServerError, match=r"served by vLLM.*VLLM\("), model.trace(TOWER, remote=True):
        model.resid_post[3].save()


def test_jobs_are_their_owners_own(site):
    job = send(site.model)
    job.result()
    with site.client("bob") as bob, site.client() as ann:
        assert ann.get(f"/v1/jobs/{job.id}/result").status_code == 200
        assert bob.get(f"/v1/jobs/{job.id}/result").status_code == 404


# --- completions ----------------------------------------------------------------------------------------------


def plain_text(site, prompt, count):
    ids = plainly(site.plain, prompt, 1.0, count)[1][0]
    return site.plain.tokenizer.decode(ids[-count:])


def test_completions_are_those_of_the_model_beside_jobs(site):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{site.host}/v1", api_key=site.keys["bob"], timeout=LIMIT)
    assert [model.id for model in client.models.list()] == [site.name]
    job = send(site.model, pause=0.01)
    options = {"model": site.name, "max_tokens": 6, "temperature": 0, "extra_body": {"min_tokens": 6}}
    expected = plain_text(site, FRANCE, 6)
    exact = {**options, "extra_body": {"min_tokens": 6, "skip_special_tokens": False}}
    assert client.completions.create(prompt=FRANCE, **exact).choices[0].text == expected
    pieces = list(client.completions.create(prompt=FRANCE, stream=True, **exact))
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    assert len(pieces) >= 6
    several = client.completions.create(prompt=[FRANCE, ROME], **exact).choices
    assert [choice.text for choice in several] == [expected, plain_text(site, ROME, 6)]
    chat = client.chat.completions.create(messages=[{"role": "user", "content": FRANCE}], **exact)
    assert chat.choices[0].message.content == expected
    assert job.status == "running"  # all of that was computed beside it
    assert job.result()["numbers"] == [LONG]


def test_completions_are_refused_as_jobs_are(site):
    body = {"model": site.name, "prompt": ROME, "max_tokens": 1}
    with site.client(None) as nobody, site.client() as ann:
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert nobody.post(path, json=body).status_code == 401
        assert nobody.get("/v1/models").status_code == 401
        refused = {
            404: [{**body, "model": "other"}],
            400: [{**body, "max_tokens": "many"}, {**body, "vllm_xargs": {"nnsight": "a"}}, {**body, "n": 1000}, [1]],
        }
        for code, bodies in refused.items():
            for given in bodies:
                assert ann.post("/v1/completions", json=given).status_code == code
        hidden = ("/tokenize", "/v1/load_lora_adapter", "/sleep", "/invocations", "/v1/responses")
        assert {ann.post(path, json=body).status_code for path in hidden} <= {404, 405}


def test_a_user_has_so_many_completions_at_a_time(site):
    body = {"model": site.name, "prompt": [TOWER] * 40, "max_tokens": 100, "min_tokens": 100}
    with ThreadPoolExecutor(2) as pool, site.client() as ann, site.client("bob") as bob:
        codes = [one.status_code for one in pool.map(lambda _: ann.post("/v1/completions", json=body), range(2))]
        assert sorted(codes) == [200, 429]
        assert bob.post("/v1/completions", json={**body, "max_tokens": 1, "min_tokens": 1}).status_code == 200


# --- ends -----------------------------------------------------------------------------------------------------


def test_a_confined_block_ends_alone(site):
    """One that computes for ever, and one that kills a process: the engine and its other jobs know nothing of it."""
    before, model = descendants(site.server.process.pid), site.model
    other = send(model, pause=0.01)
    wait_until(lambda: other.status == "running")
    with pytest.raises(nnsight.errors.EngineError, match="5"), model.trace(TOWER, remote=True, timeout=LIMIT):
        while model.resid_post[3] is not None:
            pass
    with pytest.raises(PermissionError), model.trace(TOWER, remote=True, timeout=LIMIT):
        import os as system

        model.resid_post[3].save()
        system.kill(system.getpid(), 9)
    assert other.result()["numbers"] == [LONG]
    same(remotely(site, FRANCE, 1.0, 2), plainly(site.plain, FRANCE, 1.0, 2))
    assert descendants(site.server.process.pid)[: len(before)] == before


def test_a_confined_block_has_no_files_and_no_weights(site):
    model = site.model
    with pytest.raises(OSError), model.trace(TOWER, remote=True):  # noqa: PT011
        open("/etc/passwd").read()  # noqa: SIM115
    with pytest.raises(nnsight.errors.NNsightError), model.trace(TOWER, remote=True):
        model.lm_head.weight.save()


def test_a_server_that_is_told_to_end_finishes_what_runs(site):
    from nnsight.server._limits import Limits
    from nnsight.server._news import News
    from nnsight.server._queue import Queue
    from nnsight.server._store import Store

    job = send(site.model, pause=0.03)
    wait_until(lambda: job.status == "running")
    lines = []

    def stream():
        body = {"model": site.name, "prompt": ROME, "max_tokens": 100, "min_tokens": 100, "stream": True}
        with site.client() as ann, ann.stream("POST", "/v1/completions", json=body) as answer:
            lines.extend(answer.iter_lines())

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: site.count("done") >= 0 and "nnsight_completions" in httpx.get(f"{site.host}/metrics").text)
    time.sleep(0.2)
    site.server.process.terminate()
    assert site.server.process.wait(60) in (0, -signal.SIGTERM)
    thread.join(10)
    assert "data: [DONE]" in lines
    assert json.loads(lines[0].removeprefix("data: "))["model"] == site.name
    store = Store(site.data)
    state = Queue(store, Limits(), News()).state("ann", job.id, 0)
    store.close()
    assert state.status == "done"


# --- trusted: blocks in the engine's worker ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def another(start_server, tmp_path_factory):
    return Site(start_server, tmp_path_factory.mktemp("trusted"), "--trusted")


@pytest.fixture
def trusted(another, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", another.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", another.keys["ann"])
    wait_until(lambda: nnsight.is_model_running(another.name))
    return another


def test_a_block_that_holds_the_worker_up_is_ended_and_the_others_run_again(trusted):
    """The engine is killed for it: what ran beside it is computed again, each by itself, and ends once."""
    done, cancelled, model = trusted.count("done"), trusted.count("cancelled"), trusted.model
    before = descendants(trusted.server.process.pid)
    assert len(before) >= 1
    other = send(model, pause=0.05)
    wait_until(lambda: other.status == "running")
    with model.trace(TOWER, remote=True, blocking=False, timeout=LIMIT) as stuck:
        while model.resid_post[3] is not None:
            pass
    wait_until(lambda: stuck.status == "running")
    time.sleep(1)  # it stands in the worker
    stuck.cancel()
    with pytest.raises(JobCancelledError):
        stuck.result()
    assert other.result()["numbers"] == [LONG]
    assert (trusted.count("done"), trusted.count("cancelled")) == (done + 1, cancelled + 1)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in before)  # nothing of the killed engine is left


def test_a_job_that_kills_the_engine_fails_once(trusted):
    failed, model = trusted.count("failed"), trusted.model
    with pytest.raises(ServerError, match="died while it computed this job and no other"):
        with model.trace(TOWER, remote=True, timeout=LIMIT):
            import os as system

            model.resid_post[3].save()
            system.kill(system.getpid(), 9)
    with trusted.client() as ann:
        assert ann.post("/v1/completions", json={"model": trusted.name, "prompt": ROME}).status_code == 503
    assert trusted.count("failed") == failed + 1
    assert not nnsight.is_model_running(trusted.name)


# --- what is refused before anything starts -----------------------------------------------------------------------


def refusal(capsys, *options):
    assert main(["serve", "nnsight/landmarks", *options]) == 2
    return capsys.readouterr().err


def test_options_that_do_not_go_together_are_refused(capsys, tmp_path):
    vllm = ("--engine", "vllm")
    assert "--trusted" in refusal(capsys, *vllm, "--no-auth-on-loopback", "--tensor-parallel-size", "2")
    assert "of its own" in refusal(capsys, *vllm, "--no-auth-on-loopback", "--memory-budget", "2")
    assert "this machine alone" in refusal(capsys, *vllm, "--no-auth-on-loopback", "--trusted", "--host", "0.0.0.0")
    own = ("--no-auth-on-loopback", "--trusted", "--data", str(tmp_path))
    assert "--tensor-parallel-size" in refusal(capsys, *vllm, *own, "--replicas", "2")
    assert "--tensor-parallel-size" in refusal(capsys, *vllm, *own, "--device-map", "auto")
    assert "NAME=VALUE" in refusal(capsys, *vllm, *own, "--engine-option", "max_num_seqs")
    assert "--engine vllm" in refusal(capsys, *own, "--max-model-len", "10")
    assert "invalid choice" in refusal(capsys, "--engine", "other", *own)


def test_options_of_the_other_server_are_refused_by_name():
    from nnsight.modeling.vllm import VLLM

    model = VLLM(str(LANDMARKS))
    with pytest.raises(InputError, match="solo="):
        model.trace(TOWER, remote=True, solo=True)
    with pytest.raises(InputError, match="backend="):
        model.trace(TOWER, backend="local-process")
    assert model._client._running is None
