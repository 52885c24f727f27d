"""Other names for modules: both spellings lead to the same place."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import LanguageModel, NNsight
from nnsight.errors import InputError, UnknownPathError

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
RENAME = {"transformer.h": "layers", "transformer.wte": "embed", "attn": "attention", "c_proj": "out"}
IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=16, **SIZES)).eval()


@pytest.fixture
def model(gpt2):
    return LanguageModel(gpt2, rename=RENAME)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.scale = 3.0

    def forward(self, x):
        return self.head(self.body(x))


class TestBothSpellings:
    def test_path_is_mounted_at_the_root(self, model):
        assert model.layers is model.transformer.h
        assert model.layers[2] is model.transformer.h[2]
        assert model.layers[-1].path == "model.transformer.h.2"
        assert model.embed is model.transformer.wte

    def test_name_anywhere(self, model):
        for i in range(3):
            assert model.layers[i].attention is model.transformer.h[i].attn
        assert model.layers[0].attention.out is model.transformer.h[0].attn.c_proj
        assert model.layers[0].mlp.out is model.transformer.h[0].mlp.c_proj

    def test_name_at_the_root(self):
        model = NNsight(Net(), rename={"head": "classifier"})
        assert model.classifier is model.head

    @pytest.mark.parametrize(
        "path",
        [
            "layers.1.attention",
            "model.layers.1.attention",
            "transformer.h.1.attention",
            "model.layers.1.attn",
        ],
    )
    def test_get(self, model, path):
        assert model.get(path) is model.transformer.h[1].attn

    def test_item(self, model):
        assert model["layers"] is model.transformer.h
        assert model.layers[0]["attention"] is model.transformer.h[0].attn

    def test_values(self, model, gpt2):
        with model.trace(IDS):
            attended = model.layers[1].attention.output[0]
            model.layers[2].output[0][:] = 0
            normed = model.transformer.ln_f.input
        with model.trace(IDS):
            assert torch.equal(model.transformer.h[1].attn.output[0], attended)
        assert not normed.any()

    def test_mounted_name_is_no_name_elsewhere(self, model):
        with pytest.raises(UnknownPathError):
            model.transformer.layers

    def test_with_the_leading_model(self, gpt2):
        model = LanguageModel(gpt2, rename={"model.transformer.h": "layers"})
        assert model.layers is model.transformer.h

    def test_resolve(self, model, gpt2):
        modules = dict(gpt2.named_modules())

        def resolve(path):
            return model._tree.aliases.resolve(
                path, lambda own: dict(modules[own].named_children()) if own in modules else ()
            )

        assert resolve("layers.1.attention.out") == "transformer.h.1.attn.c_proj"
        assert resolve("transformer.h.1.attn") == "transformer.h.1.attn"
        assert resolve("nowhere.at.all") == "nowhere.at.all"

    def test_in_an_edited_model(self, model):
        with model.edit() as edited:
            model.layers[0].attention.output[0][:] = 0
        with edited.trace(IDS):
            assert not edited.layers[0].attention.output[0].any()

    def test_names_for_several_architectures(self):
        net = Net()
        net.tail = nn.Sequential(nn.Linear(2, 2))
        model = NNsight(net, rename={"body": "blocks", "0": "first"})
        assert model.blocks.first is model.body[0]
        assert model.tail.first is model.tail[0]


class TestListing:
    def test_dir(self, model):
        assert {"layers", "embed", "transformer"} <= set(dir(model))
        assert {"attention", "attn"} <= set(dir(model.layers[0]))
        assert "layers" not in dir(model.transformer)

    def test_repr(self, model, gpt2):
        assert repr(model).startswith(repr(gpt2))
        assert "layers = transformer.h" in repr(model).splitlines()[-1]
        assert repr(model.layers[0]) == repr(gpt2.transformer.h[0])

    def test_contains(self, model):
        assert "layers" in model
        assert "attention" in model.layers[0]
        assert "attention" not in model

    def test_error_for_a_name_names_the_alias(self, model):
        with pytest.raises(UnknownPathError, match="attention"):
            model.layers[0].atention

    def test_module_is_untouched(self, model, gpt2):
        assert not hasattr(gpt2, "layers")
        assert "attention" not in dict(gpt2.transformer.h[0].named_children())


class TestRefused:
    @pytest.mark.parametrize(
        ("rename", "message"),
        [
            ({"head": "body"}, r"model\.body, which exists already"),
            ({"body.0": "head"}, r"model\.head, which exists already"),
            ({"head": "scale"}, r"model\.scale, which exists already"),
            ({"head": "output"}, "every envoy has"),
            ({"head": "trace"}, "every envoy has"),
            ({"head": "a.b"}, "one plain name"),
            ({"head": "2nd"}, "one plain name"),
            ({"head": "x", "body": "x"}, "would stand for"),
            ({"body.0": "x", "body.1": "x"}, "would stand for"),
            ({"body.0": "x", "head": "x"}, "would stand for"),
        ],
    )
    def test_new_name(self, rename, message):
        with pytest.raises(InputError, match=message):
            NNsight(Net(), rename=rename)

    @pytest.mark.parametrize(("key", "close"), [("haed", "head"), ("body.2", "body.0")])
    def test_unknown_key(self, key, close):
        with pytest.raises(UnknownPathError, match=rf"no module {key!r}.*{close}"):
            NNsight(Net(), rename={key: "x"})

    def test_name_of_a_property_of_a_custom_envoy(self):
        from nnsight import Envoy

        class Named(Envoy):
            @property
            def special(self):
                return 1

        with pytest.raises(InputError, match="every envoy has"):
            NNsight(Net(), rename={"head": "special"}, envoys={"head": Named})


def test_cache(model):
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["layers.1.attention", "transformer.h.2.mlp"])
    attended = cache["model.transformer.h.1.attn"].output[0]
    assert cache["model.layers.1.attention"].output[0] is attended
    assert cache["layers.1.attention"].output[0] is attended
    assert cache.model.layers[1].attention.output[0] is attended
    assert cache.model.layers[2].mlp.output.shape == (1, 3, 16)
