"""The process that runs the model for blocks elsewhere believes none of them, and shows each its own rows alone."""

from __future__ import annotations

import gc
import socket
import threading

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nnsight import LanguageModel
from nnsight.protocol import TensorInfo, TensorWriter, read_frame, read_tensors, write_frame
from nnsight.protocol._nodes import GivenNode, HeldNode, TensorNode, TupleNode
from nnsight.sandbox._beside import Begin, Elsewhere, Said, ShownDecoder, leaves_of, read_shown
from nnsight.sandbox._host import Host
from nnsight.sandbox._pipe import ANSWER, Pipe

IDS = torch.tensor([[1, 2, 3, 4, 5]])
OTHERS = torch.tensor([[9, 8, 7, 6, 5]])


@pytest.fixture(scope="module")
def served():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    tokenizer = LanguageModel("nnsight/landmarks").tokenizer
    return LanguageModel(transformers.LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def host(served):
    return Host(served)


class Block:
    """The other end of a host, as a block's process has it."""

    def __init__(self, ids=IDS):
        ours, self.theirs = socket.socketpair()
        ours.settimeout(10)
        self.pipe = Pipe(ours)
        tensors = TensorWriter()
        tensors.add(ids)
        self.send(Begin(["input_ids"], grad=False, inference=False, tensors=tensors.infos), tensors)

    def send(self, message, tensors=None):
        self.pipe.send(ANSWER, write_frame(message, tensors or TensorWriter()))

    def ask(self, place, *, is_input=False):
        """The value at a module, by its number."""
        self.send(Said(place, is_input, {}, "", None, [], []))
        shown, payload = read_frame(self.pipe.receive()[1], read_shown)
        return ShownDecoder(read_tensors(shown.tensors, payload), shown.contents).decode(shown.value)

    def end(self):
        self.send(Said(None, False, {}, "", None, [], []))


def number_of(served, path):
    return [name for name, _ in served._module.named_modules()].index(path)


def run(host, *acts, ids=(IDS, OTHERS)):
    """What the host says of blocks that act so, each on a thread."""
    blocks = [Block(each) for each in ids]
    errors = []

    def act(block, do):
        try:
            do(block)
        except (EOFError, OSError):
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            block.pipe.close()

    threads = [threading.Thread(target=act, args=pair) for pair in zip(blocks, acts, strict=True)]
    for thread in threads:
        thread.start()
    found = host.run([block.theirs for block in blocks])
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


def reader(served, wanted, found=None):
    """A block that reads the logits, which are to be as they are alone."""

    def do(block):
        logits = block.ask(number_of(served, "lm_head"))
        block.end()
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)

    return do


@pytest.fixture(scope="module")
def wanted(served):
    with torch.no_grad():
        return served._module(OTHERS).logits


def test_each_block_sees_its_own_rows_and_nothing_of_the_others(host, served):
    """At every place: what is shown is what the model computes for this input alone."""
    names = [
        name for name, module in served._module.named_modules() if name and not isinstance(module, torch.nn.ModuleList)
    ]
    seen = {}

    def asks(block):
        for name in names:
            for is_input in (True, False):
                if is_input or "." not in name:
                    seen[name, is_input] = block.ask(number_of(served, name), is_input=is_input)
        block.end()

    def asks_alone(name, is_input):
        def do(block):
            seen[name, is_input] = block.ask(number_of(served, name), is_input=is_input)
            block.end()

        return do

    with torch.no_grad(), served.trace(IDS) as tracer:
        cache = tracer.cache(include_inputs=True)
    told = 0
    for name in names:
        entry = cache[f"model.{name}"]
        for is_input in (True, False):
            run(host, asks_alone(name, is_input), reader_of_nothing)
            value = seen.pop((name, is_input), None)
            if value is None:
                continue
            own = (entry.inputs[0], entry.inputs[1]) if is_input else entry.output
            for shown, plain in zip(leaves_of(value), leaves_of(own), strict=True):
                if isinstance(shown, torch.Tensor):
                    torch.testing.assert_close(shown, plain, rtol=1e-5, atol=1e-5)
                    told += 1
    assert told > 40


def reader_of_nothing(block):
    block.end()


def test_what_all_rows_have_in_common_is_not_shown(host, served):
    seen = []

    def asks(block):
        seen.append(block.ask(number_of(served, "model.rotary_emb")))
        block.end()

    assert run(host, asks, reader_of_nothing) == [True, True]
    assert all(type(leaf) is Elsewhere for leaf in leaves_of(seen[0]))
    assert run(host, asks, ids=[IDS]) == [True]  # alone, there is nobody else
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves_of(seen[1]))


HIDDEN = torch.zeros(1, 5, 16)


def message(host, served, rest, tensors):
    writer = TensorWriter()
    for tensor in tensors:
        writer.add(tensor)
    fields = {"is_input": False, "changed": {}, "done": "", "value": None, "contents": [], "tensors": writer.infos}
    return Said(**({"place": number_of(served, "model.norm")} | fields | rest)), writer


LIES = {
    "a leaf that there is not": ({"changed": {7: 0}}, [HIDDEN]),
    "a leaf below none": ({"changed": {-1: 0}}, [HIDDEN]),
    "a tensor that there is not": ({"changed": {0: 3}}, [HIDDEN]),
    "another shape in place": ({"changed": {0: 0}}, [HIDDEN[:, :2]]),
    "another type in place": ({"changed": {0: 0}}, [HIDDEN.double()]),
    "another shape": ({"done": "written", "value": TensorNode(0)}, [torch.zeros(1, 7, 16)]),
    "another user's rows": ({"done": "written", "value": TensorNode(0)}, [torch.zeros(2, 5, 16)]),
    "a skip of what is over": ({"done": "skipped", "value": TensorNode(0)}, [HIDDEN]),
    "no tensor": ({"done": "written", "value": 3}, []),
    "a value given that was not": ({"done": "written", "value": GivenNode(5, tensor=True)}, []),
    "a container that there is not": ({"done": "written", "value": HeldNode(5)}, []),
    "a tuple in itself": ({"done": "written", "value": TupleNode([TupleNode([])])}, []),
    "a module that there is not": ({"place": 10**6}, []),
    "a module below none": ({"place": -3}, []),
    "another type": ({"done": "written", "value": TensorNode(0)}, [HIDDEN.double()]),
    "a parameter": ({"done": "written", "value": TensorNode(0)}, [torch.nn.Parameter(HIDDEN)]),
    "a tensor without numbers": (
        {"done": "written", "value": TensorNode(0)},
        [FakeTensorMode(allow_non_fake_inputs=True).from_tensor(HIDDEN)],
    ),
    "what needs gradients": ({"changed": {0: 0}}, [HIDDEN.clone().requires_grad_()]),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_end_the_block_and_disturb_nobody(host, served, wanted, lie):
    def lies(block):
        block.ask(number_of(served, "model.layers.0"))
        block.send(*message(host, served, *LIES[lie]))
        block.pipe.receive()
        block.end()

    weights = [weight.clone() for weight in served._module.state_dict().values()]
    assert run(host, lies, reader(served, wanted)) == [False, True]
    assert not host.is_spoilt()
    assert all(map(torch.equal, weights, served._module.state_dict().values()))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[1, 2, 50]]),
        torch.tensor([[-1]]),
        torch.ones(1, 3),
        torch.tensor([1, 2]),
        torch.ones(1, 0, dtype=torch.int64),
        torch.ones(1, 2000, dtype=torch.int64),
        torch.ones(100, 1, dtype=torch.int64),
    ],
    ids=lambda ids: f"{ids.dtype} {list(ids.shape)}",
)
def test_inputs_that_the_model_does_not_take_are_refused(host, served, wanted, ids):
    assert run(host, reader_of_nothing, reader(served, wanted), ids=(ids, OTHERS)) == [False, True]


def test_a_block_that_says_nothing_is_waited_for_a_moment(host, served, wanted, monkeypatch):
    silent = threading.Event()

    def waits(block):
        silent.wait(20)

    def reads(block):
        reader(served, wanted)(block)
        silent.set()

    assert run(host, waits, reads) == [False, True]


def test_a_weight_is_not_changed_where_a_value_is_one(served, wanted):
    """A module that returns its own weight: what is shown lies in the memory of the model."""
    config = served._module.config
    with torch.no_grad():
        module = transformers.LlamaForCausalLM(config).eval()
        own = torch.nn.Parameter(torch.zeros(1, 5, 16))

        class Gives(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.own = own

            def forward(self, x):
                return self.own + 0 * x if x.shape[0] > 1 else self.own

        module.model.norm = Gives()
    spoilt = Host(LanguageModel(module, tokenizer=served.tokenizer))

    def changes(block):
        block.ask(number_of(served, "model.norm"))
        said, writer = message(spoilt, served, {"place": None, "changed": {0: 0}}, [torch.ones(1, 5, 16)])
        block.send(said, writer)

    assert run(spoilt, changes, ids=[IDS]) == [False]
    assert not own.any()
    assert not spoilt.is_spoilt()


trees = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3) | st.builds(TensorNode, st.integers(-2, 4)),
    lambda inner: (
        st.builds(TupleNode, st.lists(inner, max_size=3)) | st.builds(GivenNode, st.integers(-2, 4), st.booleans())
    ),
    max_leaves=5,
)
infos = st.builds(
    TensorInfo,
    st.sampled_from(["float32", "int64", "bool", "float16", "nothing"]),
    st.lists(st.integers(-1, 17), max_size=3),
    st.sampled_from([0, 0, 0, 64, -64]),
    st.sampled_from(["tensor", "parameter", "fake"]),
    st.booleans(),
    st.none() | st.integers(-1, 1),
)
messages = st.builds(
    Said,
    st.none() | st.integers(-2, 40),
    st.booleans(),
    st.dictionaries(st.integers(-2, 4), st.integers(-2, 2), max_size=2),
    st.sampled_from(["", "written", "skipped", "else"]),
    trees,
    st.just([]),
    st.lists(infos, max_size=2),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(messages, max_size=3), junk=st.binary(max_size=40), at=st.integers(0, 200))
def test_messages_of_all_kinds_disturb_nobody(host, served, wanted, sent, junk, at):
    def says(block):
        for said in sent:
            size = sum(-(-max(_size(info), 0) // 64) * 64 for info in said.tensors)
            frame = bytearray(write_frame(said))
            frame[8:16] = size.to_bytes(8, "little")  # of the payload
            block.pipe.send(ANSWER, bytes(frame) + bytes(size))
        frame = write_frame(Said(None, False, {}, "", None, [], []))
        block.pipe.send(ANSWER, frame[:at] + junk + frame[at + len(junk) :])

    assert run(host, says, reader(served, wanted))[1]
    assert not host.is_spoilt()


def _size(info):
    size = {"float32": 4, "int64": 8, "float16": 2}.get(info.dtype, 1)
    for length in info.shape:
        size *= length
    return 0 if info.kind == "fake" else size


def test_nothing_of_a_block_stays(host, served):
    def living():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    run(host, reader_of_nothing, reader_of_nothing)
    before = living()
    for _ in range(5):
        run(host, reader_of_nothing, reader_of_nothing)
    assert living() <= before
