"""What the confined process of a block may say to an engine's worker: anything. The worker takes it, or ends that job."""

from __future__ import annotations

import random
import socket
import struct
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Embedding, Linear, Module, Sequential

from nnsight._core import INPUT, OUTPUT
from nnsight.errors import EditError, ProtocolError
from nnsight.protocol import Failure, TensorWriter, read_outcome
from nnsight.sandbox import READY, Pipe
from nnsight.vllm import _engine
from nnsight.vllm._confined import ConfinedJob
from nnsight.vllm._engine import SAMPLES, Engine
from nnsight.vllm._messages import Reply
from nnsight.vllm._runners import DiedError, Limits, Runner
from nnsight.vllm._talk import Told, read_told, write

NUMBER, LIMITS = "job", Limits(reply=5.0, answer=10_000, value=10_000, printed=50, requests=3)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding(10, 4)
        self.layers = Sequential(Linear(4, 4), Linear(4, 4))
        self.lm_head = Linear(4, 10)

    def compute_logits(self, hidden):
        return self.lm_head(hidden)


NET = Net()
LAST = len(list(NET.modules()))


class Process:
    """A process that says what it is told to say, in place of a zygote's."""

    limits = LIMITS

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ended = False

    def take(self) -> Runner:
        return Runner(0, self.ours, LIMITS)

    def end(self, runner: Runner) -> None:
        self.ended = True
        runner.close()

    def prepare(self) -> None:
        """There is no next one."""

    def says(self, data: bytes) -> None:
        self.theirs.sendall(data)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def begun(process: Process) -> ConfinedJob:
    config = SimpleNamespace(get_vocab_size=lambda: 10, get_hidden_size=lambda: 4, dtype=torch.float32)
    runner = SimpleNamespace(model=NET, model_config=config, sampler=Module(), device=torch.device("cpu"))
    return ConfinedJob(Engine(runner), process, NUMBER, b"")


@pytest.fixture(autouse=True, scope="module")
def one_worker():
    """vLLM is not here to say how many workers there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "parts_of", lambda _: None)
        yield


def framed(header: bytes, payload: bytes = b"", sizes: tuple[int | None, int | None] = (None, None)) -> bytes:
    said = [len(part) if size is None else size for part, size in zip((header, payload), sizes, strict=True)]
    return struct.pack("<IQ", *said) + header + payload


ASK = {"key": f"{NUMBER}:1", "prompt": "Hello", "params": {"max_tokens": 2}}
STATE = [f"{NUMBER}:1", False, [2], [-1, 2, LAST - 1, -2], [3], [3]]
GOOD = {"turn": 1, "states": [STATE], "outcome": "", "tensors": [], "asks": [ASK], "answered": False, "printed": []}

# --- hostile parts -------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-5, LAST + 3), st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**64 - 1]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=4), st.floats(), st.binary(max_size=4))
keys = st.sampled_from([f"{NUMBER}:1", f"{NUMBER}:2", "other:1", "", "x" * 200])
places = st.lists(numbers, max_size=4)
states = st.tuples(keys, st.booleans(), places, places, places, places).map(list)
dtypes = st.sampled_from(["float32", "float32", "float32", "float16", "int64", "bool", "complex64", "object", ""])
shapes = st.one_of(
    st.sampled_from([[1, 3, 4], [1, 3, 4], [1, 3, 4], [1, 3, 10], [1, 1, 10], [1], [3, 4], [0], [2**40, 2**40], [-1]]),
    st.lists(numbers, max_size=4),
)
tensors = st.one_of(
    st.tuples(
        dtypes,
        shapes,
        st.sampled_from([0, 0, 0, 64, -1]),
        st.sampled_from(["tensor", "tensor", "parameter", "fake", "?"]),
    ),
    st.tuples(dtypes, shapes, st.just(0), st.just("tensor"), st.booleans(), st.one_of(st.none(), numbers)),
).map(list)
prompts = st.one_of(
    st.text(max_size=4),
    st.lists(numbers, max_size=3),
    st.lists(st.dictionaries(st.text(max_size=3), scalars), max_size=2),
    scalars,
)
parameters = st.dictionaries(
    st.sampled_from(["max_tokens", "n", "extra_args", "prompt_logprobs", "logits_processors"]), scalars, max_size=2
)
asks = st.fixed_dictionaries({"key": keys, "prompt": prompts, "params": parameters})
replies = st.fixed_dictionaries(
    {},
    optional={
        "turn": st.sampled_from([0, 1, 1, 2, 3]),
        "states": st.lists(states, max_size=2),
        "outcome": st.sampled_from(["", "changed", "written", "skipped", "other"]),
        "tensors": st.lists(tensors, max_size=2),
        "asks": st.lists(asks, max_size=4),
        "answered": st.booleans(),
        "printed": st.lists(st.text(max_size=60), max_size=2),
        "more": scalars,
    },
)
payloads = st.one_of(st.sampled_from([b"", bytes(64), bytes(range(64)), bytes(128)]), st.binary(max_size=70))
sizes = st.sampled_from([None, None, None, None, 0, 1, 63, 2**24 + 1, 2**32 - 1])
frames = st.one_of(
    st.builds(lambda changes, payload: framed(msgspec.msgpack.encode({**GOOD, **changes}), payload), replies, payloads),
    st.builds(
        lambda changes, payload, one, two: framed(msgspec.msgpack.encode({**GOOD, **changes}), payload, (one, two)),
        replies,
        payloads,
        sizes,
        sizes,
    ),
    st.binary(max_size=40),
    st.just(framed(msgspec.msgpack.encode(GOOD))),
)


def check_over(job: ConfinedJob, process: Process, reply: Reply | None = None) -> None:
    """The job has ended with an error for its owner, its process was ended, and the engine waits for nothing of it."""
    assert process.ended
    job.close()
    assert not job.engine.waiting
    assert not any("forward" in vars(module) for module in NET.modules())
    assert not any(lane.lives for lane in job._by_key.values())
    failure, _ = read_outcome(job._failure)
    assert isinstance(failure, Failure)
    assert "confined block" in failure.text
    if reply is not None:
        assert reply.answer == job._failure


@settings(max_examples=1200, deadline=None)
@given(st.lists(frames, min_size=2, max_size=6))
def test_whatever_it_says_is_taken_or_ends_its_job(said):
    process = Process()
    try:
        job = begun(process)
        process.says(b"".join(said))
        process.theirs.shutdown(socket.SHUT_WR)
        reply = job.begin()
        if not job.lives:
            check_over(job, process, reply)
            return
        assert all(ask.key.startswith(f"{NUMBER}:") for ask in reply.asks)
        assert len(job._by_key) <= LIMITS.requests
        for lane in list(job._by_key.values()):
            use(job, lane, process)
        job.close()
        assert not job.engine.waiting
    finally:
        process.close()


def use(job: ConfinedJob, lane, process: Process) -> None:
    """Show values as an engine does, and see that only such come back as could have been there."""
    shown = {NET.layers[0]: torch.zeros(1, 3, 4), NET.embed: torch.zeros(1, 3, 4), NET.lm_head: torch.zeros(1, 3, 10)}
    main = lane.main
    assert main.wanted_inputs <= set(NET.modules())
    for place, value in shown.items():
        for kind in (INPUT, OUTPUT):
            if not lane.lives:
                break
            given = ((value,), {}) if kind == INPUT else value
            seen = main._visit(place, kind, given, 0)
            if not job.lives:
                check_over(job, process)
                return
            assert seen.skipped is None or kind == INPUT
            back = seen.value[0][0] if kind == INPUT else seen.value
            assert back.dtype == value.dtype
            assert back.shape == value.shape or (place is NET.lm_head and back.shape[2] == 10)
    if lane.lives:
        try:
            token = main.touch(SAMPLES, torch.tensor([3]))
        except EditError:
            return
        assert token.shape == (1,)
        assert 0 <= int(token) < 10


WELL_FORMED = [
    (msgspec.msgpack.encode(GOOD), b""),
    (msgspec.msgpack.encode({**GOOD, "asks": [], "answered": True}), b"an answer"),
    (msgspec.msgpack.encode({**GOOD, "outcome": "changed", "tensors": [["float32", [1, 3, 4], 0]]}), bytes(range(64))),
]


def spoiled(data: bytes, draw: random.Random) -> bytes:
    """Some bytes exchanged, cut out or repeated."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(changed) + 1), draw.choice((0, 1, 1, 1, 4))
        new = draw.randbytes(draw.choice((0, 1, 1, 4))) if draw.random() < 0.7 else bytes(changed[:at][-length:])
        changed[at : at + length] = new
    return bytes(changed)


@settings(max_examples=700, deadline=None)
@given(st.integers(0, 2**64))
def test_any_spoiled_reply_is_read_or_refused(seed):
    draw = random.Random(seed)
    for _ in range(20):
        header, payload = draw.choice(WELL_FORMED)
        try:
            told, value = read_told(
                spoiled(header, draw), spoiled(payload, draw) if draw.random() < 0.3 else payload, 1
            )
        except ProtocolError:
            continue
        assert told.turn == 1
        if isinstance(value, torch.Tensor):
            assert told.outcome
            assert not value.requires_grad
            assert value.grad is None
        else:
            assert value is None or told.answered


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=120), st.binary(max_size=70))
def test_any_bytes_are_read_or_refused(header, payload):
    with pytest.raises(ProtocolError):
        read_told(header, payload, 1)


# --- one lie at a time -------------------------------------------------------------------------------------------------


@pytest.fixture
def process():
    made = Process()
    yield made
    made.close()


@pytest.fixture
def job(process):
    """One with a request that waits at some places."""
    made = begun(process)
    process.says(framed(msgspec.msgpack.encode(GOOD)))
    assert len(made.begin().asks) == 1
    yield made
    made.close()


def told(outcome, value, turn=2):
    return write(Told(turn, [], outcome), [value])


def visit(job, place, kind, shown):
    return job._by_key[f"{NUMBER}:1"].main._visit(place, kind, shown, 0)


def test_a_value_that_fits_is_taken(job, process):
    for outcome in ("changed", "written"):
        process.says(told(outcome, torch.ones(1, 3, 4), job._runner._turn + 1))
        seen = visit(job, NET.layers[0], OUTPUT, torch.zeros(1, 3, 4))
        assert seen.value.eq(1).all()
        assert seen.written == (outcome == "written")


@pytest.mark.parametrize(
    "value",
    [torch.ones(1, 2, 4), torch.ones(3, 4), torch.ones(1, 3, 4, dtype=torch.float64), torch.ones(0)],
    ids=["rows", "dimensions", "dtype", "nothing"],
)
@pytest.mark.parametrize("outcome", ["changed", "written", "skipped"])
def test_a_value_that_does_not_fit_ends_the_job(job, process, value, outcome):
    process.says(told(outcome, value))
    shown = torch.zeros(1, 3, 4)
    seen = visit(job, NET.layers[0], OUTPUT, shown)
    assert seen.value is shown
    assert shown.eq(0).all()
    assert not job.lives
    check_over(job, process)


def test_a_value_for_a_cache_cannot_be_changed(job, process):
    process.says(told("changed", torch.ones(1, 3, 4)))
    shown = torch.zeros(1, 3, 4)
    job._by_key[f"{NUMBER}:1"].main.record(NET.layers[0], OUTPUT, shown)
    assert shown.eq(0).all()
    check_over(job, process)


def test_the_next_replys_number_is_no_reply(job, process):
    process.says(told("changed", torch.ones(1, 3, 4), turn=3))
    visit(job, NET.layers[0], OUTPUT, torch.zeros(1, 3, 4))
    check_over(job, process)


def test_a_token_that_there_is_not(job, process):
    process.says(told("written", torch.tensor([10])))
    with pytest.raises(EditError, match="0 to 9"):
        visit(job, SAMPLES, OUTPUT, torch.tensor([3]))


def test_ids_that_there_are_not(job, process):
    process.says(told("written", torch.tensor([[1, 2, 10]])))
    with pytest.raises(EditError, match="0 to 9"):
        visit(job, NET.embed, INPUT, ((torch.tensor([[1, 2, 3]]),), {}))


def test_whole_numbers_elsewhere(job, process):
    process.says(told("written", torch.tensor([[1, 2, 3]])))
    with pytest.raises(EditError, match="at embeddings only"):
        visit(job, NET.layers[0], INPUT, ((torch.tensor([[1, 2, 3]]),), {}))


def test_another_jobs_request(process):
    made = begun(process)
    process.says(framed(msgspec.msgpack.encode({**GOOD, "asks": [{**ASK, "key": "other:1"}], "states": []})))
    check_over(made, process, made.begin())
    assert not made.engine.waiting


def test_it_says_nothing(job, process):
    job._runner._limits = Limits(reply=0.2)
    visit(job, NET.layers[0], OUTPUT, torch.zeros(1, 3, 4))
    check_over(job, process)
    assert "more than 0.2 seconds" in read_outcome(job._failure)[0].text


def test_it_says_a_byte_at_a_time(process):
    """Each byte comes in time, and all of them do not."""
    runner = Runner(0, process.ours, Limits(reply=0.3))
    process.says(framed(b"x" * 100)[:20])
    with pytest.raises(DiedError, match=r"more than 0\.3 seconds"):
        runner.ask(None)


def test_it_is_ready_and_then_dead_or_talks_too_soon(process):
    runner = process.take()
    Pipe(process.theirs).send(READY)
    runner.await_ready()
    for more in (b"x", None):
        other = Process()
        Pipe(other.theirs).send(READY)
        other.says(more) if more else other.theirs.close()
        with pytest.raises(DiedError, match="could not be made"):
            other.take().await_ready()
        other.close()


def test_it_does_not_listen(job, process):
    job._runner._limits = Limits(reply=0.3)
    shown = torch.zeros(1, 1_000_000, 4)
    visit(job, NET.layers[0], OUTPUT, shown)
    check_over(job, process)


def test_its_time_is_counted_together(job, process):
    job._runner._limits = Limits(reply=5, total=0.0)
    visit(job, NET.layers[0], OUTPUT, torch.zeros(1, 3, 4))
    check_over(job, process)
    assert "in all" in read_outcome(job._failure)[0].text


def test_a_value_is_written_as_it_is_read():
    writer = TensorWriter()
    writer.add(torch.arange(5.0))
    assert torch.equal(read_told(*unframed(told("written", torch.arange(5.0), 1)), 1)[1], torch.arange(5.0))


def unframed(data):
    header, payload = struct.unpack_from("<IQ", data)
    return data[12 : 12 + header], data[12 + header : 12 + header + payload]
