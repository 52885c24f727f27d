"""Jobs that share a forward: the same values as alone, and nobody notices the others."""

from __future__ import annotations

import time

import httpx
import pytest
import torch

from nnsight import CONFIG, LanguageModel, NNsight
from nnsight.errors import JobCancelledError
from nnsight.protocol import read_job
from nnsight.remote._open import _embedded
from nnsight.sandbox import can_share
from nnsight.server import create_key

NAME = "nnsight/landmarks"
PROMPTS = [f"The {name} is in the city of" for name in ("Eiffel Tower", "Colosseum", "Louvre", "Pantheon", "Prado")]
HERE = {"backend": "local-process", "blocking": False}


@pytest.fixture(scope="module")
def model():
    model = LanguageModel("nnsight/landmarks")
    with model.trace("Hello", **HERE) as job:
        model.lm_head.output.save()
    job.result()
    return model


@pytest.fixture(scope="module")
def local():
    return LanguageModel("nnsight/landmarks", dispatch=True)


def service_of(model):
    return _embedded[model._tree]._client._transport.app.state.service


def shared(model):
    text = service_of(model).monitor.text().decode()
    return int(
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("nnsight_jobs_shared_total"))
    )


class held:
    """Keeps the replica busy, so that the jobs that are sent meanwhile wait together."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        model = self.model
        with model.session(**HERE) as job:
            import time as clock

            clock.sleep(1.5)
        self.job = job
        while self.job.status != "running":
            time.sleep(0.01)

    def __exit__(self, *_error):
        self.job.result()


def test_jobs_that_wait_share_a_forward_and_get_what_they_get_alone(model, local):
    before, jobs = shared(model), []
    layers = [2, 4, 6, 8, 2]
    with held(model):
        for prompt, layer in zip(PROMPTS, layers, strict=True):
            with model.trace(prompt, **HERE) as job:
                model.transformer.h[layer].output[0][:, -1] = 0
                hidden = model.transformer.h[layer + 1].output[0].save()
                logits = model.lm_head.output.save()
                best = [logits[0, -1].argmax().item()].save()
            jobs.append(job)
    assert len({local.tokenizer(prompt, return_tensors="pt")["input_ids"].shape for prompt in PROMPTS}) > 1
    for prompt, layer, job in zip(PROMPTS, layers, jobs, strict=True):
        with local.trace(prompt):
            local.transformer.h[layer].output[0][:, -1] = 0
            hidden = local.transformer.h[layer + 1].output[0].save()
            logits = local.lm_head.output.save()
        found = job.result()
        torch.testing.assert_close(found["hidden"], hidden.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found["logits"], logits.detach(), rtol=1e-5, atol=1e-4)
        assert found["best"] == [logits[0, -1].argmax().item()]
    assert shared(model) - before == 5


def test_names_do_not_go_from_one_job_to_another(model, local):
    jobs = []
    secret, other = torch.tensor(1.0), torch.tensor(2.0)
    with held(model):
        with model.trace(PROMPTS[0], **HERE) as job:
            value = secret.save()
            model.lm_head.output.save()
        jobs.append(job)
        value = other
        with model.trace(PROMPTS[0], **HERE) as job:
            seen = (value + 0 * model.lm_head.output[0, 0, 0]).save()
        jobs.append(job)
    assert jobs[0].result()["value"] == 1
    assert jobs[1].result()["seen"] == 2


def test_prints_and_containers_go_to_their_own_job(model, capsys):
    kept = [[] for _ in range(3)]
    jobs = []
    with held(model):
        for number, own in enumerate(kept):
            with model.trace(PROMPTS[0], **HERE) as job:
                print("job", number)
                own.append(model.transformer.h[number].output[0].norm().save())
            jobs.append(job)
    for job in jobs:
        job.result()
    assert sorted(capsys.readouterr().out.splitlines()) == ["job 0", "job 1", "job 2"]
    assert [len(own) for own in kept] == [1, 1, 1]


def test_an_error_is_its_own_jobs_alone(model, local):
    before, jobs = shared(model), []
    with held(model):
        for number in range(4):
            with model.trace(PROMPTS[0], **HERE) as job:
                hidden = model.transformer.h[3].output[0].save()
                wrong = hidden[0, 0] if number != 1 else hidden[0, 0] @ torch.ones(3)
            jobs.append(job)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        jobs[1].result()
    with local.trace(PROMPTS[0]):
        hidden = local.transformer.h[3].output[0].save()
    for number in (0, 2, 3):
        assert torch.equal(jobs[number].result()["hidden"], hidden.detach())  # run alone: the very same numbers
    assert shared(model) == before


def test_a_job_that_would_be_seen_by_others_is_run_alone(model, local):
    """Random numbers are the job's own, whatever it is queued with."""
    before, jobs = shared(model), []
    noise = torch.distributions.Normal(0.0, 1.0)
    torch.manual_seed(3)
    with held(model):
        for _ in range(2):
            with model.trace(PROMPTS[0], **HERE) as job:
                drawn = (model.transformer.h[0].output[0] * 0 + torch.empty(3).exponential_().sum()).save()
            jobs.append(job)
    values = [job.result()["drawn"][0, 0, 0] for job in jobs]
    assert values[0] != values[1]
    assert shared(model) == before


def test_changed_weights_are_changed_for_nobody_else(model, local):
    with model.trace(PROMPTS[0], **HERE) as job:
        clean = model.lm_head.output.save()
    clean = job.result()["clean"]
    jobs = []
    with held(model):
        with model.trace(PROMPTS[0], **HERE) as first:
            model.lm_head.output.save()
            model.transformer.ln_f.weight.mul_(1.0)
        for _ in range(2):
            with model.trace(PROMPTS[0], **HERE) as job:
                logits = model.lm_head.output.save()
            jobs.append(job)
    first.cancel()
    for job in jobs:
        torch.testing.assert_close(job.result()["logits"], clean, rtol=1e-5, atol=1e-4)


def test_solo_jobs_have_a_forward_of_their_own(model):
    before, jobs = shared(model), []
    with held(model):
        for _ in range(3):
            with model.trace(PROMPTS[0], solo=True, **HERE) as job:
                hidden = model.transformer.h[0].output[0].save()
            jobs.append(job)
    for job in jobs:
        job.result()
    assert shared(model) == before


# --- confined -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    return {"file": str(file), **{name: create_key(file, name) for name in ("ann", "bob", "cid", "dee")}}


@pytest.fixture(scope="module")
def running(keys, start_server):
    return start_server(NAME, "--api-keys", keys["file"])


@pytest.fixture
def server(running, keys, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", running.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", keys["ann"])
    running.wait_for(NAME)
    return running


def shared_on(server):
    lines = httpx.get(f"{server.host}/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("nnsight_jobs_shared_total")))


def send(model, prompt, layer):
    with model.trace(prompt, remote=True, blocking=False) as job:
        hidden = model.transformer.h[layer].output[0].save()
    return job


def keep_busy(model):
    """A job that the replica has to end first, so that those that are sent meanwhile wait together."""
    with model.session(remote=True, blocking=False) as first:
        import time as clock

        clock.sleep(3)
    while first.status != "running":
        time.sleep(0.01)
    return first


def test_confined_jobs_of_one_user_share(server, keys, local):
    model, before = LanguageModel(NAME), shared_on(server)
    keep_busy(model)
    jobs = [send(model, PROMPTS[1], layer) for layer in range(3)]
    CONFIG.set_default_api_key(keys["bob"])
    jobs += [send(model, PROMPTS[1], layer) for layer in range(2)]
    with local.trace(PROMPTS[1]):
        expected = [local.transformer.h[layer].output[0].save() for layer in range(3)]
    for job, values in zip(jobs, expected + expected, strict=False):
        torch.testing.assert_close(job.result()["hidden"], values.detach(), rtol=1e-5, atol=1e-4)
    assert shared_on(server) - before == 5


def test_confined_jobs_of_several_users_share(server, keys, local):
    """One of them has asked for a forward of its own."""
    model, before = LanguageModel(NAME), shared_on(server)
    keep_busy(model)
    jobs = []
    for layer, name in enumerate(("ann", "bob", "cid", "dee")):
        CONFIG.set_default_api_key(keys[name])
        with model.trace(PROMPTS[layer], remote=True, blocking=False, solo=name == "dee") as job:
            model.transformer.h[layer].output[0][:, -1] = 0
            print(f"of {name}")
            hidden = model.transformer.h[layer + 1].output[0].save()
        jobs.append(job)
        while not job.id:
            time.sleep(0.01)
    for layer, job in enumerate(jobs):
        with local.trace(PROMPTS[layer]):
            local.transformer.h[layer].output[0][:, -1] = 0
            hidden = local.transformer.h[layer + 1].output[0].save()
        torch.testing.assert_close(job.result()["hidden"], hidden.detach(), rtol=1e-5, atol=1e-4)
    assert shared_on(server) - before == 3


def test_one_that_hangs_holds_the_others_up_for_seconds(server, local):
    model, before = LanguageModel(NAME), shared_on(server)
    first = keep_busy(model)
    jobs = [send(model, PROMPTS[1], layer) for layer in range(2)]
    while not all(job.id for job in jobs):  # they are taken in before the one that hangs
        time.sleep(0.01)
    with model.trace(PROMPTS[1], remote=True, blocking=False, timeout=60) as hanging:
        hidden = model.transformer.h[0].output[0].save()
        for _ in range(10**12):
            pass
    first.result()
    start = time.monotonic()
    with local.trace(PROMPTS[1]):
        expected = [local.transformer.h[layer].output[0].save() for layer in range(2)]
    for job, values in zip(jobs, expected, strict=True):
        assert torch.equal(job.result()["hidden"], values.detach())
    assert time.monotonic() - start < 40
    hanging.cancel()
    with pytest.raises(JobCancelledError):
        hanging.result(60)
    assert shared_on(server) == before


# --- which jobs may ---------------------------------------------------------------------------------------------


def frame_of(model, make):
    """The frame that a remote block is sent as."""
    sent = []
    service = service_of(model)
    submit = service.queue.submit

    def keep(owner, key, name, frame, *args, **options):
        sent.append(frame)
        return submit(owner, key, name, frame, *args, **options)

    service.queue.submit = keep
    try:
        make()
        while not sent:
            time.sleep(0.01)
    finally:
        service.queue.submit = submit
    return read_job(sent[0])[0], len(sent[0])


def helper(values):
    return values


def test_plain_traces_may_and_others_may_not(model):
    def plain():
        with model.trace("Hello", **HERE):
            hidden = model.transformer.h[0].output[0].save()

    def with_a_tracer():
        with model.trace("Hello", **HERE) as tracer:
            hidden = model.transformer.h[0].output[0].save()
            tracer.stop()

    def with_gradients():
        with model.trace("Hello", **HERE):
            model.lm_head.output.sum().backward()

    def with_weights():
        with model.trace("Hello", **HERE):
            weight = model.lm_head.weight.save()

    def with_an_import():
        with model.trace("Hello", **HERE):
            import math

            print(math.pi)

    def with_a_helper():
        with model.trace("Hello", **HERE):
            hidden = helper(model.transformer.h[0].output[0]).save()

    def with_options():
        with model.trace("Hello", use_cache=False, **HERE):
            hidden = model.transformer.h[0].output[0].save()

    def generated():
        with model.generate("Hello", max_new_tokens=2, **HERE):
            hidden = model.transformer.h[0].output[0].save()

    def edited():
        with model.edit() as other:
            model.transformer.h[0].output[0][:] = 0
        with other.trace("Hello", **HERE):
            hidden = other.transformer.h[0].output[0].save()

    assert can_share(*frame_of(model, plain))
    others = (
        with_gradients,
        with_weights,
        with_an_import,
        with_a_helper,
        with_options,
        generated,
        edited,
        with_a_tracer,
    )
    for make in others:
        assert not can_share(*frame_of(model, make)), make.__name__


def test_models_that_are_no_language_models_run_jobs_alone():
    torch.manual_seed(0)
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4)))
    jobs = []
    for _ in range(4):
        with model.trace(torch.ones(1, 3), **HERE) as job:
            hidden = model[0].output.save()
        jobs.append(job)
    for job in jobs:
        assert torch.equal(job.result()["hidden"], model._model(torch.ones(1, 3)).detach())
