"""Envoy classes of the user's own, and values with a view of their own."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import Envoy, LanguageModel, NNsight, View
from nnsight.errors import EditError, InputError, NeverRanError, UnknownPathError

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
IDS = torch.tensor([[1, 2, 3]])


class Mine(Envoy):
    @property
    def double(self):
        return self.output * 2

    def silence(self):
        self.output = torch.zeros_like(self.output)


class Other(Envoy):
    pass


class Special(nn.Linear):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Special(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4)


class TestClasses:
    def test_by_class_of_module(self, net):
        model = NNsight(net, envoys={nn.Linear: Mine})
        assert [type(envoy) for envoy in model.body] == [Mine, Envoy, Mine]
        assert type(model.head) is Mine

    def test_most_specific_class(self, net):
        model = NNsight(net, envoys={nn.Module: Other, nn.Linear: Mine, Special: Envoy})
        assert [type(envoy) for envoy in model.body] == [Mine, Other, Envoy]

    def test_by_name(self, net):
        model = NNsight(net, envoys={"0": Mine, "head": Other})
        assert [type(envoy) for envoy in model.body] == [Mine, Envoy, Envoy]
        assert type(model.head) is Other

    def test_path_before_name_before_class(self, net):
        model = NNsight(net, envoys={nn.Linear: Other, "2": Mine, "model.body.2": Envoy, "0": Mine})
        assert [type(envoy) for envoy in model.body] == [Mine, Envoy, Envoy]
        assert type(model.head) is Other

    def test_every_way_to_it(self, net):
        model = NNsight(net, envoys={"head": Mine})
        assert model.get("head") is model.head is model["head"]
        assert {type(e) for p, e in model.named_modules() if p == "head"} == {Mine}

    def test_values(self, net, x):
        model = NNsight(net, envoys={nn.Linear: Mine})
        with model.trace(x):
            doubled = model.body[0].double
            model.body[2].silence()
            out = model.head.input
        assert torch.equal(doubled, net.body[0](x) * 2)
        assert not out.any()

    def test_error_inside_a_property_is_its_own(self, net):
        class Broken(Envoy):
            @property
            def wrong(self):
                return self.no_such_thing

        with pytest.raises(UnknownPathError, match="no_such_thing"):
            NNsight(net, envoys={"head": Broken}).head.wrong

    def test_after_loading(self, tmp_path):
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, **SIZES)).save_pretrained(tmp_path)
        model = LanguageModel(str(tmp_path), envoys={"attn": Mine}, rename={"transformer.h": "layers"})
        before = model.layers[0].attn
        model.dispatch()
        assert type(before) is Mine
        assert model.layers[0].attn is before
        assert before.device == torch.device("cpu")
        with model.trace(IDS):
            assert before.output[0].shape == (1, 3, 16)

    @pytest.mark.parametrize("cls", [nn.Linear, "Mine", None, object])
    def test_no_envoy_class(self, net, cls):
        with pytest.raises(InputError, match=r"not a subclass of nnsight\.Envoy"):
            NNsight(net, envoys={"head": cls})

    @pytest.mark.parametrize("key", [3, int, None])
    def test_no_key(self, net, key):
        with pytest.raises(InputError, match="is no key"):
            NNsight(net, envoys={key: Mine})

    @pytest.mark.parametrize(("key", "close"), [("haed", "head"), ("body.9", r"body\.")])
    def test_unknown_key(self, net, key, close):
        with pytest.raises(UnknownPathError, match=close):
            NNsight(net, envoys={key: Mine})


def split(value, envoy):
    """The heads: `[batch, head, 3]`."""
    return value.unflatten(-1, (2, -1))


def merge(value, heads, envoy):
    return heads.flatten(-2)


class Heads(Envoy):
    heads = View("output", get=split, set=merge)
    given = View(
        "input",
        get=lambda value, envoy: value[:, :2],
        set=lambda value, new, _: torch.cat([new, value[:, 2:]], 1),
    )
    total = View("output", get=lambda value, envoy: value.sum(-1))
    scores = View(
        lambda envoy: (envoy.source.F_linear_0, "output"),
        get=lambda value, envoy: value.t(),
        set=lambda value, new, envoy: new.t(),
    )


class TestView:
    @pytest.fixture
    def model(self, net):
        return NNsight(net, envoys={"0": Heads})

    def test_reading(self, model, net, x):
        with model.trace(x):
            heads = model.body[0].heads
        assert torch.equal(heads, net.body[0](x).reshape(3, 2, 3))

    def test_in_place(self, model, net, x):
        with torch.no_grad(), model.trace(x):
            model.body[0].heads[:, 1] = 0
            after = model.body[1].input
        expected = net.body[0](x)
        expected[:, 3:] = 0
        assert torch.equal(after, expected)

    def test_assigning(self, model, net, x):
        new = torch.randn(3, 2, 3)
        with model.trace(x):
            model.body[0].heads = new
            heads, out = model.body[0].heads, model.body[1].input
        assert torch.equal(heads, new)
        assert torch.equal(out, new.reshape(3, 6))

    def test_input(self, model, net, x):
        with model.trace(x):
            model.body[0].given = torch.zeros(3, 2)
            out = model.body[0].output
        assert torch.equal(out, net.body[0](torch.cat([torch.zeros(3, 2), x[:, 2:]], 1)))

    def test_operation(self, model, net, x):
        with model.trace(x):
            scores = model.body[0].scores
            model.body[0].scores = scores * 2
            out = model.body[0].output
        assert torch.equal(scores.t(), net.body[0](x))
        assert torch.equal(out, net.body[0](x) * 2)

    def test_copy_can_be_read(self, model, net, x):
        with model.trace(x):
            total = model.body[0].total
            model.output
        assert torch.equal(total, net.body[0](x).sum(-1))

    def test_copy_changed_in_place_is_no_silent_loss(self, model, x):
        with pytest.raises(EditError, match=r"model\.body\.0\.total, read at line \d+ .*, is a copy"):
            with torch.no_grad(), model.trace(x):
                model.body[0].total[:] = 0

    def test_copy_changed_in_place_later(self, model, x):
        with pytest.raises(EditError, match="is a copy"):
            with torch.no_grad(), model.trace(x):
                total = model.body[0].total
                model.head.output
                total += 1

    def test_clone_of_a_copy(self, model, x):
        with torch.no_grad(), model.trace(x):
            total = model.body[0].total.clone()
            total += 1

    def test_without_set(self, model, x):
        with pytest.raises(EditError, match=r"model\.body\.0\.total cannot be assigned"):
            with model.trace(x):
                model.body[0].total = torch.zeros(3)

    def test_rows_of_an_invoke(self, model, net, x):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(x):
                model.body[0].heads[:, 0] = 0
                first = model.body[1].input
            with tracer.invoke(x):
                model.body[0].heads = model.body[0].heads * 2
                second = model.body[1].input
        expected = net.body[0](x)
        assert torch.allclose(second, expected * 2)
        expected[:, :3] = 0
        assert torch.allclose(first, expected)

    def test_on_the_class(self):
        assert isinstance(Heads.heads, View)
        assert Heads.heads.__doc__ == split.__doc__

    def test_wrong_source(self):
        with pytest.raises(EditError, match="neither"):
            View("outputs", get=split)

    def test_heads_of_attention(self):
        def by_head(value, attn):
            return value.unflatten(-1, (2, -1))

        class Attention(Envoy):
            z = View(
                lambda attn: (attn.source.self_c_proj_0, "input"),
                get=by_head,
                set=lambda _, z, attn: z.flatten(-2),
            )

        torch.manual_seed(0)
        module = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, **SIZES)).eval()
        model = LanguageModel(module, envoys={"attn": Attention})
        with torch.no_grad(), model.trace(IDS):
            model.transformer.h[1].attn.z[:, :, 0] = 0
            z = model.transformer.h[1].attn.c_proj.input
        assert not z[..., :8].any()
        assert z[..., 8:].any()

    def test_error_of_the_place(self, model, net, x):
        net.body = net.body[1:2]
        net.head = nn.Linear(4, 2)
        model = NNsight(Unused(), envoys={"extra": Heads})
        with pytest.raises(NeverRanError, match=r"model\.extra\.output"):
            with model.trace(x):
                model.extra.heads


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.extra = nn.Linear(4, 6)

    def forward(self, x):
        return self.used(x)
