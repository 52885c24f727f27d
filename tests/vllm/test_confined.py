"""Blocks in confined processes: the same values as in the worker, bit for bit, and no harm from one that means it."""

import inspect
import secrets
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from nnsight.errors import EditError, EngineError, NNsightError
from nnsight.sandbox import missing

from ..endless import catch_everything, spin
from . import test_engine, test_equal, test_refused

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")

TOWER, FRANCE = "The Eiffel Tower is in the city of", "The capital of France is"
LIMITS = {"reply": 4.0, "total": 16.0, "memory": 1 << 30}


@contextmanager
def blocks(model, limits):
    """Inside, blocks run in the worker (None), or in confined processes of the same engine."""
    before, model._limits = model._limits, limits
    try:
        yield model
    finally:
        model._limits = before


@pytest.fixture(params=("llama", "gpt2"), scope="module")
def pair(engines, request):
    found = engines(request.param)
    with blocks(found.engine, LIMITS):
        yield found


@pytest.fixture
def gpt2(engines):
    found = engines("gpt2")
    with blocks(found.engine, LIMITS):
        yield found


@pytest.fixture
def model(gpt2):
    """The engine, which serves the next block as ever."""
    yield gpt2.engine
    check_logits(gpt2.engine)


def check_logits(model):
    values = logits_of(model, FRANCE)
    with blocks(model, None):
        assert torch.equal(logits_of(model, FRANCE), values)


def logits_of(model, prompt):
    with model.trace(prompt):
        logits = model.logits.save()
    return logits


def bits(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def same(pair, block, *args):
    """The same bits from a confined process, and from the worker."""
    found = block(pair.engine, *args)
    with blocks(pair.engine, None):
        bits(found, block(pair.engine, *args))


# --- the same values ---------------------------------------------------------------------------------------------


def bodies(module):
    return [name for name in vars(module) if name.startswith("test_")]


@pytest.mark.parametrize("name", bodies(test_equal))
def test_as_in_the_worker(pair, name, monkeypatch):
    """Each test of `test_equal.py`; where that compares what a block gives, bit for bit with the worker."""
    monkeypatch.setattr(test_equal, "both", same)
    body = getattr(test_equal, name)
    body(pair, *([FRANCE] if "prompt" in inspect.signature(body).parameters else []))


def test_more_values(pair):
    def block(model):
        with model.trace(TOWER, max_tokens=3, ignore_eos=True) as tracer:
            cache = tracer.cache(modules=[model.layers[0], model.layers[1], model.lm_head], include_inputs=True)
            found = [].save()
            for step in tracer.iter[:]:
                layer = model.layers[0].output
                hidden = layer if isinstance(layer, torch.Tensor) else layer[0]
                hidden[:, -1] += 0.5 * step
                model.layers[1].input = model.layers[1].input.double() * 1.25
                model.lm_head.input[:, -1] *= 0.9
                found.append(model.lm_head.output.clone())
                found.append(model.lm_head.input.clone())
                model.output.logits[0, -1, 7] += 0.25
                found += [model.output.logits.clone(), model.samples]
            found.append(tracer.result)
        for path in ("layers.0", "layers.1", "lm_head"):
            path = (
                path
                if path == "lm_head"
                else next(p for p in cache if p.endswith(f".{path[7:]}") and p.count(".") == 3)
            )
            for call in cache[path].calls:
                found.append(call.output if isinstance(call.output, torch.Tensor) else call.output[0])
                found += [] if path == "lm_head" else [call.input]
        return found

    same(pair, block)


def test_a_skipped_layer_in_a_cache(pair):
    def block(model):
        with model.trace(TOWER) as tracer:
            cache = tracer.cache(modules=[model.layers[1]])
            model.layers[1].skip(model.layers[0].output * 2)
            after = model.layers[1].output
            after = (after if isinstance(after, torch.Tensor) else after[0]).save()
            logits = model.logits.save()
        output = next(iter(cache.values())).output
        return [output if isinstance(output, torch.Tensor) else output[0], after, logits]

    same(pair, block)


VALUES = [name for name in vars(test_engine.TestValues) if name.startswith("test_")]
ERRORS = [
    name
    for name, body in vars(test_engine.TestErrors).items()
    if name.startswith("test_") and list(inspect.signature(body).parameters) == ["self", "gpt2"]
]


@pytest.mark.parametrize("name", VALUES)
def test_values_as_in_the_worker(gpt2, name, capfd):
    body = getattr(test_engine.TestValues(), name)
    body(gpt2, *([capfd] if "capfd" in inspect.signature(body).parameters else []))


@pytest.mark.parametrize("name", ERRORS)
def test_errors_as_in_the_worker(gpt2, name):
    getattr(test_engine.TestErrors(), name)(gpt2)


@pytest.mark.parametrize("name", bodies(test_refused))
def test_refused_as_in_the_worker(gpt2, name):
    getattr(test_refused, name)(gpt2)


def test_what_it_reads_of_the_model(model):
    def block():
        with model.trace(TOWER):
            scale = model.transformer.h[2].attn.scale
            names = [path for path, _ in model.named_modules()]
            shown, kind = repr(model), type(model.config).__name__
            token = model.tokenizer.decode(model.samples)
            found = [scale, len(names), shown, kind, model.config.n_embd, token].save()
        return found

    with blocks(model, None):
        expected = block()
    assert block() == expected


@pytest.mark.parametrize("limits", [None, LIMITS], ids=["worker", "confined"])
@pytest.mark.parametrize("path", ["", "lm_head"])
def test_the_last_projection_cannot_be_skipped(gpt2, path, limits):
    model = gpt2.engine
    with blocks(model, limits), pytest.raises(EditError, match=r"assign model(\.lm_head)?\.output"):
        with model.trace(TOWER):
            model.get(path).skip(torch.zeros(1, 10, 1309))
            model.samples


@pytest.mark.parametrize("limits", [None, LIMITS], ids=["worker", "confined"])
def test_rows_of_other_requests_are_not_shown(gpt2, limits):
    """vLLM's `logits_processor` has a row for each request, and not for each token."""
    model = gpt2.engine
    with blocks(model, limits), pytest.raises(NNsightError, match="logits_processor"):
        with model.trace(max_tokens=2, ignore_eos=True) as tracer:
            with tracer.invoke(TOWER):
                model.resid_post[0]
            with tracer.invoke(FRANCE):
                model.get("logits_processor").output.save()


# --- what the worker alone has -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda model: model.lm_head.weight, "ParallelLMHead.weight"),
        (lambda model: model.lm_head(torch.zeros(1, 128)), "A call of ParallelLMHead"),
        (lambda model: model.transformer.h[0].attn(torch.zeros(1, 128)), "A call of GPT2Attention"),
        (lambda model: list(model._module.parameters()), r"parameters\(\)"),
        (lambda model: model._module.state_dict(), r"state_dict\(\)"),
        (lambda model: model.compute_logits, "compute_logits"),
        (lambda model: model._module.register_forward_hook(print), "register_forward_hook"),
        (lambda model: setattr(model.transformer.h[0].attn, "scale", 1.0), "would change nothing"),
        (lambda model: model.to(torch.float64), r"to\(\)"),
    ],
)
def test_weights_and_calls_are_refused_by_name(model, ask, match):
    with pytest.raises(EngineError, match=match), model.trace(TOWER):
        model.resid_post[0]
        ask(model)


def test_parameters_that_a_block_may_not_set(model):
    with pytest.raises(EngineError, match="prompt_logprobs: a confined block may ask for"):
        with model.trace(TOWER, prompt_logprobs=3):
            model.logits.save()


def test_limits_that_there_are_not():
    from nnsight.errors import InputError
    from nnsight.modeling.vllm import VLLM

    with pytest.raises(InputError, match="no limit repply"):
        VLLM("x", confined={"repply": 3})


# --- attacks -----------------------------------------------------------------------------------------------------


def read_file():
    with open("/etc/passwd") as file:
        return file.read()


def list_root():
    import os

    return os.listdir("/")


def write_file():
    with open("/tmp/planted", "w") as file:
        file.write("x")


def open_socket():
    import socket

    socket.socket()


def start_program():
    import subprocess

    subprocess.run(["id"])


def fork_bomb():
    import os

    while True:
        os.fork()


def kill_the_worker():
    import os
    import signal

    os.kill(os.getppid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "attack", [read_file, list_root, write_file, open_socket, start_program, fork_bomb, kill_the_worker]
)
def test_it_reaches_nothing(model, attack):
    with pytest.raises(PermissionError), model.trace(TOWER):
        model.resid_post[2]
        attack()


def test_memory_bomb(model):
    with pytest.raises(MemoryError), model.trace(TOWER):
        model.resid_post[2]
        hoard = []
        while True:
            hoard.append(bytearray(20_000_000))


def test_memory_bomb_of_tensors(model):
    with pytest.raises(RuntimeError, match="allocate memory"), model.trace(TOWER):
        model.resid_post[2]
        hoard = []
        while True:
            hoard.append(torch.empty(20_000_000))


def test_thread_bomb(model):
    with pytest.raises(RuntimeError, match="can't start new thread"), model.trace(TOWER):
        import threading

        model.resid_post[2]
        stop = threading.Event()
        while True:
            threading.Thread(target=stop.wait, daemon=True).start()


def test_crash(model):
    with pytest.raises(EngineError, match="has ended"), model.trace(TOWER):
        import ctypes

        model.resid_post[2]
        ctypes.string_at(0)


def test_garbage_into_the_workers_ear(model):
    with pytest.raises(EngineError, match=r"what it cannot mean|has ended"), model.trace(TOWER):
        import os

        model.resid_post[2]
        for number in range(64):
            try:
                os.write(number, bytes(range(256)))
            except OSError:
                continue


def test_log_bomb(model, capsys):
    with model.trace(TOWER):
        for _ in range(1000):
            print("x" * 10_000)
        model.logits
    printed = capsys.readouterr().out
    assert 2**19 <= len(printed) < 2**20
    assert "more was printed" in printed


def test_another_users_values_are_nowhere(model):
    secret = "xyzzy-" + secrets.token_hex(16)
    with model.trace(f"{TOWER} {secret}"):
        print(secret)
        kept = [secret, model.logits[0, -1].argmax().item()].save()
    assert kept[0] == secret
    with model.trace(TOWER):
        import gc
        import re

        look, seen = re.compile("xyzzy-[0-9a-f]{32}"), [].save()
        model.resid_post[2]
        for thing in gc.get_objects():
            values = list(thing.values()) if type(thing) is dict else thing if type(thing) in (list, tuple) else ()
            seen += [found for value in values if type(value) is str for found in look.findall(value)]
            seen += [found for v in values if type(v) is bytes for found in look.findall(v.decode("latin1"))]
        seen.append("looked")
    assert seen == ["looked"]


def kill(model, which):
    """Kill processes below the engine's: the zygote, or the one that it has forked for the next job."""
    import os
    import signal
    from pathlib import Path

    def children(pid):
        threads = Path(f"/proc/{pid}/task").iterdir()
        return [int(one) for thread in threads for one in (thread / "children").read_text().split()]

    def below(pid):
        return [found for child in children(pid) for found in (child, *below(child))]

    def is_zygote(pid):
        return b"nnsight.vllm._zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()

    zygotes = [pid for pid in below(os.getpid()) if is_zygote(pid) and children(pid)]
    assert len(zygotes) == 1
    found = zygotes if which == "zygote" else children(zygotes[0])
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)


@pytest.mark.parametrize("which", ["zygote", "next"])
def test_a_process_that_is_killed_between_jobs_is_made_again(model, which):
    expected = logits_of(model, TOWER)
    kill(model, which)
    time.sleep(0.2)
    assert torch.equal(logits_of(model, TOWER), expected)


# --- neighbours --------------------------------------------------------------------------------------------------


def sleep():
    time.sleep(10_000)


@pytest.mark.parametrize(
    ("when", "attack"), [("before", spin), ("within", spin), ("within", sleep), ("within", catch_everything)]
)
def test_neighbours_of_one_that_never_ends(model, when, attack):
    alone = logits_of(model, TOWER)
    plain = list(model.trace(FRANCE, trace=False, max_tokens=4)[0].outputs[0].token_ids)
    seen, begun = {}, time.monotonic()

    def good():
        with model.trace(TOWER, max_tokens=3, ignore_eos=True) as tracer:
            kept = [].save()
            for _ in tracer.iter[:]:
                kept.append(model.logits)
        seen["good"] = kept

    def bad():
        try:
            with model.trace(FRANCE, max_tokens=3, ignore_eos=True):
                if when == "within":
                    model.resid_post[2]
                attack()
        except NNsightError as error:
            seen["bad"] = error

    def neither():
        found = model.trace(FRANCE, trace=False, max_tokens=4)
        seen["plain"] = list(found[0].outputs[0].token_ids)

    threads = [threading.Thread(target=one) for one in (bad, good, neither)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert isinstance(seen["bad"], EngineError)
    assert "more than 4 seconds" in str(seen["bad"])
    assert time.monotonic() - begun < 15
    assert len(seen["good"]) == 3
    torch.testing.assert_close(seen["good"][0], alone, atol=1e-4, rtol=1e-4)
    assert seen["plain"] == plain


def test_one_that_takes_a_little_each_time_ends_too(model):
    begun = time.monotonic()
    with pytest.raises(EngineError, match="more than 16 seconds in all"):
        with model.trace(TOWER, max_tokens=100, ignore_eos=True) as tracer:
            for _ in tracer.iter[:]:
                model.resid_post[2]
                time.sleep(3)
    assert time.monotonic() - begun < 30
