"""The tree of envoys: finding modules, and what an envoy shows of its module."""

import re
import weakref

import pytest
import torch
from torch.nn import LayerNorm, Linear, Module, ModuleDict, ModuleList, ReLU, Sequential

from nnsight import Envoy, NNsight
from nnsight.errors import NNsightError, UnknownPathError


class Layer(Module):
    """As in BERT, with submodules whose names are those of an envoy's own attributes."""

    def __init__(self):
        super().__init__()
        self.attention = Linear(4, 4)
        self.output = Linear(4, 4)
        self.input = ReLU()
        self.path = LayerNorm(4)
        self.scale = 2.0

    def forward(self, x):
        return self.output(self.input(self.path(self.attention(x)))) * self.scale

    def halve(self):
        self.scale /= 2
        return self

    @property
    def doubled(self):
        return self.scale * 2


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layers = ModuleList([Layer() for _ in range(4)])
        self.named = ModuleDict({"first": Linear(4, 4), "get": ReLU()})
        self.head = Sequential(Linear(4, 3), ReLU())
        self.nothing = None
        self.register_module("absent", None)
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for module in self.named.values():
            x = module(x)
        return self.head(x) + self.offset


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4)


class TestFinding:
    def test_attributes(self, net, model):
        assert isinstance(model.layers, Envoy)
        assert model.layers[1].attention._module is net.layers[1].attention
        assert model._model is net

    def test_same_envoy_each_time(self, model):
        assert model.layers[1] is model.layers[1]
        assert model.layers[-3] is model.layers[1]
        assert model.layers["1"] is model.layers[1]
        assert model.get("layers.1") is model.layers[1]
        assert next(iter(model.layers)) is model.layers[0]

    @pytest.mark.parametrize("index", [0, 3, -1, -4])
    def test_index(self, net, model, index):
        assert model.layers[index]._module is net.layers[index]

    @pytest.mark.parametrize("index", [4, -5, 100])
    def test_index_that_is_not_there(self, model, index):
        with pytest.raises(IndexError, match=rf"model\.layers has 4 submodules.*{index}"):
            model.layers[index]

    @pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(None, None, -1), slice(-2, None), slice(9, 12)])
    def test_slice(self, net, model, part):
        assert [envoy._module for envoy in model.layers[part]] == list(net.layers)[part]

    def test_iteration_and_length(self, net, model):
        assert [envoy._module for envoy in model.layers] == list(net.layers)
        assert len(model.layers) == 4
        assert len(model.head[0]) == 0
        assert bool(model.head[0])
        assert [index for index, _ in enumerate(model.head)] == [0, 1]
        assert [envoy._module for envoy in reversed(model.layers)] == list(net.layers)[::-1]

    def test_contains(self, model):
        assert "layers" in model
        assert "nope" not in model

    def test_module_dict(self, net, model):
        assert model.named["first"]._module is net.named["first"]
        assert model.named.first._module is net.named["first"]
        assert model.named["get"]._module is net.named["get"]
        assert model.named[1]._module is net.named["get"]

    def test_get(self, net, model):
        assert model.get("layers.2.attention")._module is net.layers[2].attention
        assert model.get("model.layers.2.attention")._module is net.layers[2].attention
        assert model.layers[2].get("attention")._module is net.layers[2].attention
        assert model.get("") is model
        assert model.get("named.get")._module is net.named["get"]

    def test_get_on_a_module_called_model(self):
        net = Sequential()
        net.model = Sequential(Linear(2, 2))
        model = NNsight(net)
        assert model.get("model.0")._module is net.model[0]
        assert model.get("model.model.0")._module is net.model[0]
        assert model.model.path == "model.model"

    def test_named_modules(self, net, model):
        assert [(name, e._module) for name, e in model.named_modules()] == list(net.named_modules())
        part = model.layers[1]
        assert [(name, e._module) for name, e in part.named_modules()] == list(net.layers[1].named_modules())

    def test_modules_and_children(self, net, model):
        assert [e._module for e in model.modules()] == list(net.modules())
        assert [e._module for e in model.children()] == list(net.children())

    def test_absent_submodule(self, model):
        assert model.absent is None
        assert model.nothing is None
        assert [envoy.path for envoy in model] == ["model.layers", "model.named", "model.head"]

    def test_exchanged_submodule(self, net, model, x):
        old = model.layers[1]
        net.layers[1] = Layer()
        assert model.layers[1]._module is net.layers[1]
        assert model.layers[1] is not old
        for _ in range(2):
            with model.trace(x):
                found = model.layers[1].attention.output
                out = model.output
            assert torch.equal(found, net.layers[1].attention(net.layers[0](x)))
            assert torch.equal(out, net(x))

    def test_added_submodule(self, net, model, x):
        with model.trace(x):
            model.output
        net.head.append(Linear(3, 3))
        with model.trace(x):
            found = model.head[2].input
            out = model.output
        assert torch.equal(found, net.head[:2](net.named["first"](rest(net, x)).relu()))
        assert torch.equal(out, net(x))


def rest(net, x):
    for layer in net.layers:
        x = layer(x)
    return x


class TestPaths:
    def test_path(self, model):
        assert model.path == "model"
        assert model.layers.path == "model.layers"
        assert model.layers[1].attention.path == "model.layers.1.attention"
        assert model.layers[-1].path == "model.layers.3"
        assert model.named["get"].path == "model.named.get"

    def test_path_leads_back(self, model):
        for envoy in model.modules():
            assert model.get(envoy.path) is envoy

    @pytest.mark.parametrize(
        ("find", "where", "wrong", "right"),
        [
            (lambda m: m.layer, "model (Net)", "layer", "layers"),
            (lambda m: m.layers[0].atention, "model.layers.0 (Layer)", "atention", "attention"),
            (lambda m: m.get("layers.0.attn"), "model.layers.0 (Layer)", "attn", "attention"),
            (lambda m: m["haed"], "model (Net)", "haed", "head"),
            (lambda m: m.layers[0].outptu, "model.layers.0 (Layer)", "outptu", "output"),
            (lambda m: m.get("layers.9"), "model.layers (ModuleList)", "9", "0, 1, 2, 3"),
            (lambda m: m.get("named.frist"), "model.named (ModuleDict)", "frist", "first"),
            (lambda m: m.head[0].attention, "model.head.0 (Linear)", "attention", "no submodules"),
        ],
    )
    def test_unknown_path_names_the_nearest(self, model, find, where, wrong, right):
        with pytest.raises(UnknownPathError, match=re.escape(f"{where} has no {wrong!r}")) as caught:
            find(model)
        assert right in str(caught.value).partition(repr(wrong))[2]
        assert isinstance(caught.value, AttributeError)
        assert isinstance(caught.value, NNsightError)

    def test_hasattr_and_getattr(self, model):
        assert hasattr(model, "layers")
        assert not hasattr(model, "nope")
        assert getattr(model, "nope", 5) == 5


class TestCollisions:
    def test_the_attribute_is_the_value(self, net, model, x):
        with model.trace(x):
            given = model.layers[0].input
            found = model.layers[0].output
        assert torch.equal(given, x)
        assert torch.equal(found, net.layers[0](x))
        assert model.layers[0].path == "model.layers.0"

    def test_the_submodule_is_an_item(self, net, model, x):
        layer = model.layers[0]
        assert layer["output"]._module is net.layers[0].output
        assert layer.get("output")._module is net.layers[0].output
        assert model.get("layers.0.output")._module is net.layers[0].output
        assert model.get("layers.0.input")._module is net.layers[0].input
        assert layer["path"]._module is net.layers[0].path
        seen = []
        net.layers[0].output.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        with model.trace(x):
            inside = layer["output"].input
            out = layer["output"].output
        assert inside is seen[0][0]
        assert out is seen[0][1]

    def test_edit_of_the_submodule(self, net, model, x):
        with model.trace(x):
            model.layers[0]["output"].output[:] = 1
            found = model.layers[0].output
        assert torch.equal(found, torch.full((3, 4), 2.0))

    def test_named_modules_has_the_submodules(self, net, model):
        names = dict(model.layers[0].named_modules())
        assert names["output"]._module is net.layers[0].output


class TestTheModuleItself:
    def test_attributes(self, net, model):
        assert model.head[0].weight is net.head[0].weight
        assert model.offset is net.offset
        assert model.head[0].in_features == 4
        assert model.training is True
        assert model.layers[0].scale == 2.0
        assert model.layers[0].doubled == 4.0

    def test_methods(self, net, model):
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in net.named_parameters()]
        assert model.state_dict().keys() == net.state_dict().keys()
        assert model.layers[0].halve() is model.layers[0]
        assert net.layers[0].scale == 1.0
        assert model.eval() is model
        assert not net.training
        assert model.train()._module is net
        assert net.training
        model.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in net.parameters())

    def test_device(self, net, model):
        assert model.device == torch.device("cpu")
        assert model.head[1].device is None
        assert NNsight(Linear(2, 2, device="meta")).device == torch.device("meta")

    def test_to(self, net, model, x):
        assert model.to(torch.float64) is model
        assert net.head[0].weight.dtype == torch.float64
        assert model.layers[0].to(torch.float32) is model.layers[0]
        assert net.layers[0].attention.weight.dtype == torch.float32
        model.double()
        with model.trace(x.double()):
            found = model.head[0].output
        assert found.dtype == torch.float64

    def test_repr_is_that_of_torch(self, net, model):
        assert repr(model) == repr(net)
        assert repr(model.layers) == repr(net.layers)
        assert repr(model.layers[0].attention) == repr(net.layers[0].attention)
        assert str(model) == str(net)

    def test_dir(self, model):
        names = dir(model.head[0])
        assert {"output", "input", "inputs", "weight", "in_features", "path"} <= set(names)
        assert {"layers", "head"} <= set(dir(model))

    def test_call(self, net, model, x):
        assert torch.equal(model(x), net(x))
        assert torch.equal(model.layers[0](x), net.layers[0](x))
        with model.trace(x):
            hidden = model.layers[1].output
            early = model.head(hidden)
        assert torch.equal(early, net.head(net.layers[1](net.layers[0](x))))

    def test_only_modules_are_wrapped(self):
        with pytest.raises(NNsightError, match="not a function"):
            NNsight(lambda x: x)
        with pytest.raises(TypeError):
            NNsight("gpt2-is-not-here")

    def test_no_input(self, model):
        with pytest.raises(ValueError, match="no input"):
            with model.trace():
                model.output
        with pytest.raises(ValueError, match="no input"):
            with model.trace():
                pass

    def test_trace_false(self, net, model, x):
        assert torch.equal(model.trace(x, trace=False), net(x))

    def test_envoys_die_with_the_model(self, net):
        model = NNsight(net)
        gone = [weakref.ref(envoy) for envoy in model.modules()]
        del model
        assert [found() for found in gone if found() is not None] == []
