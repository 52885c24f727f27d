"""A scan gives the shapes and dtypes that a trace has, of models with and without weights."""

import gc
import json
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from torch.nn import BatchNorm1d, Dropout, Linear, Module, Parameter, ReLU, Sequential

from nnsight import LanguageModel, NNsight
from nnsight._core import Fakes
from nnsight.errors import NoInputError, OutOfOrderWarning, ScanError

IDS = [[1, 2, 3, 4, 5, 6], [5, 6, 7]]


def net():
    torch.manual_seed(0)
    return Sequential(Linear(5, 10), ReLU(), Linear(10, 2))


def held(module):
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(m).items()}
        for m in module.modules()
    ]


class TestPlainModule:
    def test_shapes_and_dtypes(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            hidden = model[0].output
            dim = hidden.shape[-1]
            output = model.output
        assert (dim, type(dim)) == (10, int)
        assert (hidden.shape, hidden.dtype, hidden.device.type) == ((3, 10), torch.float32, "cpu")
        assert output.shape == (3, 2)

    def test_saved_shape(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            shape = model[0].output.shape.save()
        assert shape == torch.Size([3, 10])
        assert type(shape) is torch.Size

    def test_there_are_no_numbers(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            value = model.output
            with pytest.raises(ScanError):
                bool(value.sum() > 0)
            with pytest.raises(ScanError, match=r"use trace\(\)"):
                value.tolist()

    def test_without_weights(self):
        with torch.device("meta"):
            empty = net()
        model = NNsight(empty)
        with model.scan(torch.rand(3, 5)):
            hidden = model[0].output
            model[0].output = hidden + torch.ones(10)
            output = model.output
        assert (hidden.device.type, output.device.type) == ("cpu", "cpu")
        assert empty[0].weight.device.type == "meta"

    def test_without_a_read_the_model_runs_too(self):
        model = NNsight(net())
        with pytest.raises(RuntimeError):
            with model.scan(torch.rand(3, 6)):
                pass

    def test_what_the_body_makes_itself_is_real(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            model[0].output
            mine = torch.arange(4).sum().item()
            mixed = model[1].output @ torch.ones(10, 7)
            torch.ones(3, 10).copy_(model[1].output)
        assert mine == 6
        assert mixed.shape == (3, 7)

    def test_a_module_called_from_the_body(self):
        with torch.device("meta"):
            model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            other = model[2](model[0].output)
        assert other.shape == (3, 2)

    def test_result_and_stop(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)) as tracer:
            result = tracer.result
        assert result.shape == (3, 2)
        with model.scan(torch.rand(3, 5)) as tracer:
            early = model[0].output
            tracer.stop()
        assert early.shape == (3, 10)

    def test_reads_out_of_order(self):
        model = NNsight(net())
        with pytest.warns(OutOfOrderWarning):
            with model.scan(torch.rand(3, 5)):
                model.output
                early = model[0].output.shape
        assert early == (3, 10)

    def test_gradients_have_shapes(self):
        module = net()
        model = NNsight(module)
        with model.scan(torch.rand(3, 5)):
            hidden = model[0].output
            hidden.retain_grad()
            model[2](model.output @ torch.ones(2, 10)).sum().backward()
        assert hidden.grad.shape == (3, 10)
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_real_gradients_are_kept(self):
        module = net()
        module(torch.rand(3, 5)).sum().backward()
        before = [parameter.grad for parameter in module.parameters()]
        model = NNsight(module)
        with model.scan(torch.rand(3, 5)):
            model[2](model[1].output).sum().backward()
        assert all(p.grad is g for p, g in zip(module.parameters(), before, strict=True))

    def test_no_input(self):
        with pytest.raises(NoInputError):
            with NNsight(net()).scan():
                pass

    def test_autocast_and_no_grad(self):
        model = NNsight(net())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            with model.scan(torch.rand(3, 5)):
                hidden = model[0].output
        assert hidden.dtype == torch.bfloat16
        assert not hidden.requires_grad


class TestWrongShapes:
    def test_in_place(self):
        model = NNsight(net())
        with pytest.raises(RuntimeError, match="10"):
            with model.scan(torch.rand(3, 5)):
                model[0].output[:] = torch.ones(7)

    def test_assigned(self, capfd):
        model = NNsight(net())
        with pytest.raises(RuntimeError) as caught:
            with model.scan(torch.rand(3, 5)):
                model[0].output = torch.ones(3, 9)
        if sys.version_info >= (3, 11):
            assert "model.0.output" in caught.value.__notes__[0]
        assert capfd.readouterr().err == ""

    def test_that_a_trace_would_refuse_as_well(self):
        model = NNsight(net())
        for start in (model.scan, model.trace):
            with pytest.raises(RuntimeError):
                with start(torch.rand(3, 5)):
                    model[1].input = torch.rand(3, 10)
                    model[1].output = model[1].output[:, :9]


class Selects(Module):
    def __init__(self):
        super().__init__()
        self.inner = Linear(5, 5)

    def forward(self, x):
        return self.inner(x)[x > 0]


class Chooses(Selects):
    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class TestShapesThatDependOnValues:
    @pytest.mark.parametrize("kind", [Selects, Chooses])
    def test_the_error_names_the_module(self, kind):
        model = NNsight(Sequential(Linear(5, 5), kind(), ReLU()))
        with pytest.raises(ScanError, match=r"model\.1 calls aten\."):
            with model.scan(torch.rand(3, 5)):
                model[2].output

    def test_what_comes_before_can_be_read(self):
        model = NNsight(Sequential(Linear(5, 5), Selects(), ReLU()))
        with model.scan(torch.rand(3, 5)) as tracer:
            shape = model[0].output.shape
            tracer.stop()
        assert shape == (3, 5)


class Cut(Module):
    """Shapes that whole numbers of the input decide: lengths, a mask, places counted from them."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)
        self.pieces = torch.nn.Identity()

    def forward(self, ids, lengths):
        start, places = 0, torch.zeros(ids.shape[0], dtype=torch.long)
        for length in lengths.tolist():
            places[start : start + length] = torch.arange(length) + 1
            start += length
        found = self.table(ids)[: int(places.argmax()) + 1]
        ends = torch.tensor([places.max(), lengths.sum()])
        return self.pieces(found), found.new_zeros(int(ends.sum())), places + ids[: places.numel()]


class TestWholeNumbersOfTheInput:
    def test_may_decide_on_shapes(self):
        net = Cut()
        ids, lengths = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2, 3])
        pieces, ends, places = net(ids, lengths)
        for given in (net, Cut().to("meta")):
            with NNsight(given).scan(ids, lengths) as tracer:
                seen = tracer.result
            assert [part.shape for part in seen] == [pieces.shape, ends.shape, places.shape]
            assert [part.dtype for part in seen] == [pieces.dtype, ends.dtype, places.dtype]

    def test_unless_they_meet_others(self):
        model = NNsight(Cut())
        with pytest.raises(ScanError, match="depends on numbers"), model.scan(torch.ones(6).long(), torch.ones(2)):
            model.inputs = (*model.inputs[0][:1], (model.inputs[0][1] * 2).long()), {}
            model.output

    def test_are_left_as_they_were(self):
        class Writes(Module):
            def forward(self, ids):
                ids[0] = 7
                return torch.zeros(int(ids.sum()))

        ids = torch.tensor([1, 2])
        with NNsight(Writes()).scan(ids) as tracer:
            result = tracer.result
        assert result.shape == (9,)
        assert ids.tolist() == [1, 2]


class Remembers(Module):
    """Keeps a table, a buffer and a statistic of its inputs, as rotary embeddings and batch norms do."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNorm1d(5)
        self.weight = Parameter(torch.ones(5))
        self.length = 0
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x):
        if x.shape[0] > self.length:
            self.length = x.shape[0]
            self.register_buffer("table", torch.arange(x.shape[0], dtype=x.dtype))
            self.seen = x
        return self.norm(x) * self.weight + self.table[: x.shape[0], None]


class TestModelIsUntouched:
    @pytest.mark.parametrize("ending", [None, ValueError])
    def test_attributes_buffers_and_hooks(self, ending):
        module = Sequential(Remembers(), ReLU()).train()
        before, values = held(module), [t.clone() for t in module.state_dict().values()]
        model = NNsight(module)

        def scan():
            with model.scan(torch.rand(4, 5)):
                model[0].output
                if ending:
                    raise ending

        if ending:
            with pytest.raises(ending):
                scan()
        else:
            scan()
        assert held(module) == before
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), values, strict=True))
        module(torch.rand(4, 5))
        assert module[0].length == 4

    def test_modes_of_the_body(self):
        model = NNsight(net())
        count = torch._C._len_torch_function_stack
        for error in (None, ValueError):
            with torch.device("cpu"):
                device = torch._C._get_function_stack_at(0)
                try:
                    with model.scan(torch.rand(3, 5)):
                        model[0].output
                        inside = count()
                        if error:
                            raise error
                except ValueError:
                    pass
                assert inside == 2
                assert (count(), torch._C._get_function_stack_at(0)) == (1, device)
            assert count() == 0
        assert torch._C._len_torch_dispatch_stack() == 0

    def test_random_state(self):
        model = NNsight(Sequential(Linear(5, 5), Dropout(0.5)).train())
        x = torch.rand(3, 5)
        before = torch.get_rng_state()
        with model.scan(x):
            model.output
        assert torch.equal(torch.get_rng_state(), before)

    def test_it_teaches_nothing(self):
        model = NNsight(net())
        with model.scan(torch.rand(3, 5)):
            model.output
        assert model._tree.instruments.profile is None
        with model.trace(torch.rand(3, 5)):
            model.output
        assert model._tree.instruments.profile is not None

    def test_a_trace_in_the_body_is_real(self):
        model = NNsight(net())
        x = torch.rand(3, 5)
        with model.scan(x):
            model[0].output
            with model.trace(x):
                real = model[1].output
            shape = model.output.shape
        assert torch.equal(real, model._model[1](model._model[0](x)))
        assert shape == (3, 2)

    def test_another_thread_traces_meanwhile(self):
        module = net()
        x, expected = torch.rand(3, 5), []
        expected = module(x)
        results = []

        def trace():
            model = NNsight(module)
            for _ in range(20):
                with model.trace(x):
                    results.append(model.output)

        thread = threading.Thread(target=trace)
        thread.start()
        model = NNsight(module)
        for _ in range(20):
            with model.scan(x):
                assert model[0].output.shape == (3, 10)
        thread.join()
        assert len(results) == 20
        assert all(torch.equal(result, expected) for result in results)

    def test_nothing_is_kept(self):
        module = net()
        model = NNsight(module)
        with model.scan(torch.rand(3, 5)):
            model.output
        gc.collect()
        assert not [kept for kept in gc.get_objects() if type(kept) is Fakes]


class TestLanguageModel:
    def test_weights_are_not_loaded(self, folder):
        model = LanguageModel(folder, tokenizer=object())
        with model.scan(IDS):
            dim = model.transformer.h[0].output[0].shape[-1]
            model.transformer.h[0].output[0][:, -1] = 0
            model.transformer.h[1].output = model.transformer.h[1].output * 2
            logits = model.output.logits
            last = model.output[0, -1]
        assert dim == 32
        assert logits.shape == (2, 6, 100)
        assert last.shape == (100,)
        assert not model.dispatched
        assert model._model.lm_head.weight.device.type == "meta"

    def test_block_outputs_in_both_spellings(self, folder):
        model = LanguageModel(folder, tokenizer=object())
        with model.scan(IDS):
            block = model.transformer.h[0].output
            shapes = [block.shape, block[0].shape, block[:, -1].shape, (block + 1).shape]
            assert isinstance(block, torch.Tensor)
            with pytest.raises(IndexError, match="batch"):
                block[1]
        assert shapes == [(2, 6, 32), (2, 6, 32), (2, 32), (2, 6, 32)]

    def test_text(self, folder):
        model = LanguageModel(folder)
        with model.scan("the tower is in the city"):
            assert model.transformer.h[0].output[0].shape == (1, 6, 32)
        with model.scan(["the tower is in the city", "the city"]):
            assert model.transformer.h[0].output[0].shape == (2, 6, 32)
        assert not model.dispatched

    def test_dtype_option(self, folder):
        model = LanguageModel(folder, tokenizer=object(), dtype=torch.bfloat16)
        with model.scan(IDS):
            assert model.transformer.h[0].output[0].dtype == torch.bfloat16

    def test_attention_pattern(self, folder):
        model = LanguageModel(folder, tokenizer=object())
        with model.scan(IDS):
            assert model.transformer.h[0].attn.attn_dropout.input.shape == (2, 4, 6, 6)

    def test_invokes(self, folder):
        model = LanguageModel(folder, tokenizer=object())
        shapes = {}
        with model.scan() as tracer:
            with tracer.invoke([1, 2, 3]):
                hidden = model.transformer.h[0].output[0]
                shapes["one"] = hidden.shape
            with tracer.invoke(IDS):
                model.transformer.h[1].output[0][:] = hidden
                shapes["two"] = model.lm_head.output.shape
            with tracer.invoke():
                shapes["all"] = model.lm_head.output.shape
        assert shapes == {"one": (1, 6, 32), "two": (2, 6, 100), "all": (3, 6, 100)}
        assert model._tree.instruments.layouts is None

    def test_with_a_cache(self, folder, tiny):
        model = LanguageModel(folder, tokenizer=object())
        with model.scan(IDS) as tracer:
            scanned = tracer.cache(include_inputs=True)
        with tiny.trace(IDS) as tracer:
            traced = tracer.cache(include_inputs=True)
        assert [repr(call) for entry in scanned.values() for call in entry.calls] == [
            repr(call) for entry in traced.values() for call in entry.calls
        ]

    def test_edits_of_the_model(self, folder):
        model = LanguageModel(folder, tokenizer=object())
        with model.edit() as edited:
            model.transformer.h[0].output[:] = torch.ones(7)
        with pytest.raises(RuntimeError):
            with edited.scan(IDS):
                edited.output


SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
MIXTURE = GROUPED | {"num_experts_per_tok": 2}
FAMILIES = {
    "bloom": ("Bloom", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 3}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8}),
    "mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", MIXTURE | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "gpt_oss": ("GptOss", MIXTURE | {"num_local_experts": 4, "head_dim": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_a_trace(family):
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    full = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config).eval()

    def shapes(module, method):
        with getattr(LanguageModel(module, tokenizer=object()), method)(IDS) as tracer:
            cache = tracer.cache()
        return {path: [repr(call) for call in entry.calls] for path, entry in cache.items()}

    expected = shapes(full, "trace")
    assert shapes(empty, "scan") == expected
    assert shapes(full, "scan") == expected


LARGE = """
import json, resource, sys, time
import torch
from transformers import LlamaConfig
from nnsight import LanguageModel

config = LlamaConfig(
    hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
    num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)
config.save_pretrained(sys.argv[1])
start = time.process_time()
model = LanguageModel(sys.argv[1], tokenizer=object())
with model.scan(list(range(1, 2049))):
    hidden = model.model.layers[-1].output[0]
    logits = model.lm_head.output
seconds = time.process_time() - start
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([list(hidden.shape), str(hidden.dtype), list(logits.shape), seconds, memory]))
"""


def test_405_billion_parameters(tmp_path):
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    hidden, dtype, logits, seconds, memory = json.loads(done.stdout.splitlines()[-1])
    assert (hidden, dtype, logits) == ([1, 2048, 16384], "torch.bfloat16", [1, 2048, 128256])
    assert seconds < 60
    assert memory < 2e9
