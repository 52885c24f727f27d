"""Bytes of somebody who means harm: an error of the protocol, and nothing else."""

from __future__ import annotations

import contextlib
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nnsight.errors import ProtocolError
from nnsight.protocol import (
    Answer,
    BlockText,
    BoundBlock,
    Decoder,
    DefinitionNode,
    Encoder,
    EnvoyNode,
    GivenNode,
    ImportNode,
    InstanceNode,
    Job,
    ModelState,
    Namespace,
    TensorInfo,
    read_job,
    read_outcome,
    read_tensors,
    write_frame,
)
from nnsight.protocol._nodes import HeldNode, PartsNode


def answer(value):
    encoder = Encoder()
    node = encoder.encode(value, "value")
    return Answer({"value": node}, [], [], encoder.contents, encoder.tensors.infos), encoder.tensors


def decode(frame):
    outcome, payload = read_outcome(frame)
    if not isinstance(outcome, Answer):
        return None
    decoder = Decoder(read_tensors(outcome.tensors, payload), outcome.containers)
    return [decoder.decode(node) for node in outcome.names.values()]


GOOD = write_frame(*answer({"a": [torch.arange(6.0), 2**70, (1, "b"), {3}], "c": torch.ones(3, dtype=torch.bool)}))


def test_the_frame_that_is_spoilt_below_is_a_good_one():
    assert decode(GOOD)[0]["a"][1] == 2**70


@settings(max_examples=5000, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8))
def test_spoilt_bytes_are_an_error_or_other_values(at, new):
    spoilt = GOOD[:at] + new + GOOD[at + len(new) :]
    with contextlib.suppress(ProtocolError):
        decode(spoilt)


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_a_truncated_frame_is_an_error(length):
    with pytest.raises(ProtocolError):
        decode(GOOD[:length])


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error(data):
    with pytest.raises(ProtocolError):
        read_outcome(data)
    with pytest.raises(ProtocolError):
        read_job(data)


infos = st.builds(
    TensorInfo,
    st.sampled_from(["float32", "bool", "int64", "object", "float8_e5m2", ""]),
    st.lists(st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**40, 2**62]), max_size=5),
    st.sampled_from([-64, 0, 1, 64, 128, 2**40]),
    st.sampled_from(["tensor", "parameter", "fake", "pickle"]),
    st.booleans(),
    st.sampled_from([None, -1, 0, 1, 9]),
)


@settings(max_examples=4000, deadline=None)
@given(st.lists(infos, max_size=4), st.binary(max_size=300))
@example([TensorInfo("float32", [2**31, 2**31, 4], 0)], b"")  # the product is 2**64, which is 0 in 64 bits
@example([TensorInfo("float32", [2**40] * 64, 0)], b"")
@example([TensorInfo("int64", [8], 0, requires_grad=True)], bytes(64))
def test_a_table_of_tensors_that_does_not_fit_its_bytes_is_an_error(table, payload):
    try:
        tensors = read_tensors(table, payload)
    except ProtocolError:
        return
    needed = sum(t.numel() * t.element_size() for t, info in zip(tensors, table, strict=True) if info.kind != "fake")
    assert needed <= len(payload)


def test_a_size_that_is_not_there_allocates_nothing():
    header = struct.pack("<4sIQ", b"NNS\x01", 2**26 + 1, 2**50)
    with pytest.raises(ProtocolError, match="header is larger"):
        read_outcome(header)
    with pytest.raises(ProtocolError, match="bytes and says"):
        read_outcome(struct.pack("<4sIQ", b"NNS\x01", 10, 2**50) + bytes(64))


def test_bytes_that_are_no_bool_become_one():
    tensor = read_tensors([TensorInfo("bool", [3], 0)], bytes([0, 1, 255]) + bytes(61))[0]
    assert tensor.view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "node",
    [
        ImportNode("os", "system"),
        DefinitionNode(0),
        EnvoyNode(0, "", "tokenizer"),
        GivenNode(0, False),
    ],
)
def test_what_only_a_job_may_hold_is_no_part_of_an_answer(node):
    with pytest.raises(ProtocolError):
        Decoder([], []).decode(node)


def test_an_answer_makes_no_instances():
    with pytest.raises(ProtocolError, match="no place"):
        Decoder([], [InstanceNode(ImportNode("os", "system"), [])]).decode(HeldNode(0))


@pytest.mark.parametrize(
    "kind", ["os:system", "transformers.utils:logging", "builtins:list", "transformers:pipeline", ""]
)
def test_parts_make_nothing_but_outputs_of_models(kind):
    with pytest.raises(ProtocolError):
        Decoder([], []).decode(PartsNode(kind, ["a"], [1]))


def test_another_version_is_named():
    block = BlockText("pass", "f", 1, "f", None, 1, [0], None, None, 0, [], [], [])
    job = Job(
        99, "m", None, "trace", BoundBlock(block, [], {}, 0), [], {}, [ModelState()], [Namespace("m")], [], [], [], []
    )
    with pytest.raises(ProtocolError, match="version 99; this server speaks 1"):
        read_job(write_frame(job))
