"""What a forked process may say to the server: anything. The server takes it for an answer, an event, or a death."""

from __future__ import annotations

import socket
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight.errors import ProtocolError
from nnsight.protocol import Shared, read_outcome
from nnsight.sandbox import ANSWER, EVENT, JOB, PROBLEM, READY, STOPPED, Pipe, can_share
from nnsight.server._limits import Limits
from nnsight.server._process import ConfinedRunner, share
from nnsight.server._replica import DiedError

from .conftest import frame_of

LIMITS = Limits(answer=10_000)
kinds = st.sampled_from([ANSWER, EVENT, JOB, PROBLEM, READY, STOPPED, b"?", b"\0"])
events = st.one_of(
    st.binary(max_size=50),
    st.builds(
        lambda kind, text: msgspec.json.encode({"kind": kind, "text": text}), st.text(max_size=9), st.text(max_size=9)
    ),
    st.just(b'{"kind":"print","text":"x"}'),
)
sizes = st.sampled_from([None, None, None, 0, 1, 10_001, 2**40, 2**63, 2**64 - 1])
messages = st.lists(st.tuples(kinds, events, sizes), max_size=5)


def told(said: bytes):
    """What the server makes of bytes from a runner: the answer, None where it takes it for dead; and the events."""
    ours, theirs = socket.socketpair()
    seen = []
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        try:
            return ConfinedRunner("m", {}, LIMITS)._talk(Pipe(ours, LIMITS.answer), b"job", seen.append)[1], seen
        except DiedError:
            return None, seen


@settings(max_examples=3000, deadline=None)
@given(messages)
def test_any_messages_are_an_answer_or_a_death(found):
    said = b"".join(struct.pack("<cQ", kind, len(data) if size is None else size) + data for kind, data, size in found)
    answer, seen = told(said)
    assert answer is None or len(answer) <= LIMITS.answer
    assert all(event.kind in ("print", "warning") for event in seen)


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_a_death(said):
    answer, _ = told(said)
    assert answer is None or said.startswith((ANSWER, EVENT))


def test_an_answer_too_large_is_a_death():
    assert told(struct.pack("<cQ", ANSWER, LIMITS.answer + 1) + bytes(LIMITS.answer + 1))[0] is None
    assert told(struct.pack("<cQ", ANSWER, LIMITS.answer) + bytes(LIMITS.answer))[0] == bytes(LIMITS.answer)


@settings(max_examples=1500, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda answers, events: msgspec.msgpack.encode({"answers": answers, "events": events}),
            st.lists(st.one_of(st.none(), st.binary(max_size=5)), max_size=4),
            st.lists(st.lists(st.integers(0, 9), max_size=1), max_size=4),
        ),
        st.just(msgspec.msgpack.encode(Shared([None, b"x"], [[], []]))),
    )
)
def test_answers_of_a_shared_forward_fit_its_jobs(said):
    try:
        shared = share(lambda *_: said, [b"one", b"two"], ["ann", "ann"])
    except DiedError:
        return
    assert len(shared.answers) == len(shared.events) == 2


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=80))
def test_what_a_client_gets_is_checked_again(said):
    with pytest.raises(ProtocolError):
        read_outcome(said)


# --- what the server reads of a job ---------------------------------------------------------------------------


@settings(max_examples=1500, deadline=None)
@given(st.text(max_size=80))
def test_any_source_is_looked_at_without_parsing_it(source):
    from nnsight.protocol import read_job

    frame = frame_of(source)
    assert can_share(read_job(frame)[0], len(frame)) in (True, False)


@pytest.mark.parametrize("source", ["(" * 200_000, "-" * 200_000 + "1", "a." * 100_000 + "b", "[" * 500 + "]" * 500])
def test_a_source_that_would_crash_a_parser_is_only_read(site, source):
    answer = site.submit("ann", frame_of(source[:15_000]))
    assert answer.status_code == 202
    assert site.ask("ann", "GET", f"/v1/jobs/{answer.json()['id']}").json()["status"] == "queued"


@pytest.mark.parametrize(
    "source", ["x.𝐛ackward()", "x.backward()", "import os", "getattr(x, 'a')", "x.__class__", "with a: pass", "𝚒𝚖𝚙𝚘𝚛𝚝"]
)
def test_words_that_reach_beyond_ones_rows_are_found_however_spelled(source):
    from nnsight.protocol import read_job

    job, _ = read_job(frame_of(source))
    job.args = ["Hello"]
    assert not can_share(job, 100)
    job.main.block.source = "y = x.output.save()"
    assert can_share(job, 100)
