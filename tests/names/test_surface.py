"""The names as they are written: indices, slices, assignment, the model's own names, and errors."""

import pytest
import torch
from torch import nn

from nnsight import LanguageModel, NNsight
from nnsight.errors import (
    EditError,
    InputError,
    NamesError,
    NotTracingError,
    OutOfOrderError,
    OutOfOrderWarning,
    UnknownPathError,
)

from .cases import BY_NAME, build, close

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def net():
    return build(BY_NAME["llama"])


@pytest.fixture
def model(net):
    return LanguageModel(net)


class TestIndices:
    def test_negative(self, model) -> None:
        with model.trace(IDS):
            last, same = model.resid_post[-1], model.resid_post[2]
        assert torch.equal(last, same)

    def test_slices_are_lists_in_order(self, model) -> None:
        with model.trace(IDS, strict_order=True):
            some = model.resid_pre[1:]
        with model.trace(IDS, strict_order=True):
            mixed = [head.z for head in model.heads[::2]]
        with model.trace(IDS):
            assert [torch.equal(a, model.resid_pre[i + 1]) for i, a in enumerate(some)] == [True, True]
        assert len(mixed) == 2

    def test_iteration(self, model) -> None:
        with model.trace(IDS, strict_order=True):
            streams = list(model.resid_post)
        with model.trace(IDS, strict_order=True):
            mixed = [head.z for head in model.heads]
        assert len(streams) == len(mixed) == len(model.resid_post) == len(model.heads) == len(model.layers) == 3

    def test_out_of_range(self, model) -> None:
        with pytest.raises(IndexError, match="has 3 layers; there is none at index 3"), model.trace(IDS):
            model.resid_pre[3]
        with pytest.raises(IndexError, match="index -4"):
            model.heads[-4]

    def test_of_a_slice_nothing_is_assigned(self, model) -> None:
        with pytest.raises(EditError, match="layer by layer"), model.trace(IDS):
            model.resid_pre[:2] = 0


class TestAssignment:
    def test_numbers_and_smaller_tensors_are_broadcast(self, model) -> None:
        with model.trace(IDS):
            model.attn_out[0] = 0
            first = model.resid_post[0]
            model.mlp_out[1] = torch.arange(32.0)
            second = model.resid_post[1]
        with model.trace(IDS):
            model.attn_out[0][:] = 0
            assert torch.equal(model.resid_post[0], first)
            model.mlp_out[1][:] = torch.arange(32.0)
            assert torch.equal(model.resid_post[1], second)

    def test_a_tensor_of_another_shape(self, model) -> None:
        with pytest.raises(
            EditError, match=r"model\.heads\[1\]\.z has shape \[1, 6, 4, 8\] here and was assigned.*\[3, 8\]"
        ):
            with model.trace(IDS):
                model.heads[1].z = torch.zeros(3, 8)
        with pytest.raises(EditError, match=r"was assigned a str"), model.trace(IDS):
            model.resid_pre[1] = "zero"

    def test_another_dtype(self, model) -> None:
        with model.trace(IDS):
            model.resid_pre[1] = model.resid_pre[1].double()
            assert model.resid_post[1].dtype == torch.float32

    def test_augmented(self, model) -> None:
        with model.trace(IDS):
            model.resid_pre[1] *= 2
            model.heads[1].z *= 0
            model.heads[2].z[:, :, 3] += 1
            mid = model.resid_mid[2]
        with model.trace(IDS):
            model.model.layers[1].input = model.model.layers[1].input * 2
            model.model.layers[1].self_attn.o_proj.input = model.model.layers[1].self_attn.o_proj.input * 0
            model.model.layers[2].self_attn.o_proj.input[..., 24:] += 1
            assert close(mid, model.model.layers[2].post_attention_layernorm.input)

    def test_logits(self, model) -> None:
        with model.trace(IDS):
            model.logits[:, -1] = 7
            model.logits = model.logits + 1
            output = model.output
        assert bool((output.logits[:, -1] == 8).all())
        assert output.past_key_values is not None

    def test_names_are_not_assigned_themselves(self, model) -> None:
        with pytest.raises(EditError, match=r"model\.resid_pre\[3\] = v"):
            model.resid_pre = 3
        with pytest.raises(AttributeError):
            model.heads[1].y = 3


class TestModules:
    def test_paths(self, model, net) -> None:
        assert model.layers[1].attn._module is net.model.layers[1].self_attn
        assert model.layers[1].mlp._module is net.model.layers[1].mlp
        assert model.model.layers[1].attn is model.layers[1].attn
        assert model.get("layers.1.attn.q_proj").path == "model.model.layers.1.self_attn.q_proj"
        assert (model.embed.path, model.unembed.path, model.final_norm.path) == (
            "model.model.embed_tokens",
            "model.lm_head",
            "model.model.norm",
        )

    def test_values_of_modules(self, model) -> None:
        with model.trace(IDS):
            attended = model.layers[1].attn.output[0]
            assert torch.equal(attended, model.attn_out[1])
            final = model.final_norm.output
            assert torch.equal(model.unembed(final), model.logits)

    def test_names_that_no_layer_has(self, model) -> None:
        with pytest.raises(UnknownPathError, match="router"):
            model.layers[1].router
        with pytest.raises(UnknownPathError, match="mixer"):
            model.layers[1].mixer

    def test_a_family_without_a_module_for_its_mlp(self) -> None:
        model = NNsight(build(BY_NAME["opt"]))
        with pytest.raises(UnknownPathError):
            model.layers[1].mlp
        with model.trace(input_ids=IDS):
            assert model.mlp_out[1].shape == (1, 6, 32)


class TestOwnNamesWin:
    def test_modules(self) -> None:
        class Net(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.config = inner.config
                self.model = inner.model
                self.lm_head = inner.lm_head
                self.heads = nn.Linear(32, 3)
                self.neurons = "mine"

            def forward(self, input_ids):
                return self.heads(self.model(input_ids).last_hidden_state)

        model = NNsight(Net(build(BY_NAME["llama"])))
        with model.trace(IDS):
            output = model.heads.output
        assert output.shape == (1, 6, 3)
        assert model.neurons == "mine"

    def test_rename(self, net) -> None:
        model = LanguageModel(
            net, rename={"model.layers": "layers", "lm_head": "unembed", "self_attn": "attn", "mlp": "heads"}
        )
        assert model.layers is model.model.layers
        assert model.layers[1].attn is model.model.layers[1].self_attn
        assert model.layers[1].heads is model.model.layers[1].mlp
        other = LanguageModel(net, rename={"model.norm": "heads", "model.embed_tokens": "logits"})
        assert other.heads.path == "model.model.norm"
        with other.trace(IDS):
            embedded = other.logits.output
            z = other.names.heads[1].z
            logits = other.names.logits
        assert embedded.shape == (1, 6, 32)
        assert z.shape == (1, 6, 4, 8)
        assert logits.shape == (1, 6, 120)

    def test_other_attributes_of_envoys_stay_reserved(self, net) -> None:
        with pytest.raises(InputError, match=r"\.names"):
            LanguageModel(net, rename={"model.norm": "names"})

    def test_a_net_of_no_family(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2))
        net.embed = nn.Linear(2, 2)
        model = NNsight(net)
        assert model.embed.path == "model.embed"
        with pytest.raises(UnknownPathError, match="has no 'layers'"):
            model.layers
        assert not hasattr(model, "heads")
        with pytest.raises(NamesError, match="does not know Sequential"):
            model.names


class TestErrors:
    def test_outside_a_trace(self, model) -> None:
        with pytest.raises(NotTracingError, match=r"model\.resid_pre has a value only while the model runs"):
            model.resid_pre[1]
        with pytest.raises(NotTracingError, match=r"head_z"):
            model.heads[1].z

    def test_late(self, model) -> None:
        with pytest.warns(OutOfOrderWarning, match=r"model\.heads\[1\]\.z was asked for .*: a second forward"):
            with model.trace(IDS):
                model.resid_post[1]
                late = model.heads[1].z.clone()
        with model.trace(IDS):
            assert torch.equal(late, model.heads[1].z)
        with pytest.raises(OutOfOrderError, match=r"model\.heads\[1\]\.z was asked for"), model.trace(IDS):
            model.resid_post[1]
            model.heads[1].z = 0

    def test_a_late_read_sees_the_edits_before_it(self, model) -> None:
        with pytest.warns(OutOfOrderWarning), model.trace(IDS):
            model.resid_mid[0][:, 2] = 1
            model.heads[1].q[:, :, 1] = 0
            model.heads[1].pattern[:, 2] = 0.25
            model.heads[1].result[:, :, 3] = 0
            last = model.resid_post[2].clone()
            mid = model.resid_mid[1].clone()
        with model.trace(IDS):
            model.resid_mid[0][:, 2] = 1
            model.heads[1].q[:, :, 1] = 0
            model.heads[1].pattern[:, 2] = 0.25
            model.heads[1].result[:, :, 3] = 0
            assert close(mid, model.resid_mid[1], 1e-6)
            assert close(last, model.resid_post[2], 1e-6)

    def test_changing_a_late_value_in_place(self, model) -> None:
        with pytest.warns(OutOfOrderWarning), pytest.raises(OutOfOrderError, match="changing it in place"):
            with model.trace(IDS):
                model.resid_post[1]
                model.heads[1].z[:] = 0
                model.logits

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("gptj", "resid_mid", "side by side"),
            ("gpt2", "q_rot", "no rotary embedding"),
            ("mamba", "heads", "no attention with heads"),
            ("mamba", "attn_out", "has no attn_out. It has: resid_pre, mixer_out, resid_post"),
            ("mixtral", "neurons", "experts have neurons of their own"),
            ("bert", "final_norm", "layers end with a norm"),
            ("vit", "logits", "has no unembed"),
            ("whisper-encoder", "embed", "given no tokens"),
            ("llama", "cross_heads", "no attention to an encoder"),
        ],
    )
    def test_what_a_family_has_not(self, name: str, value: str, reason: str) -> None:
        case = BY_NAME[name]
        names = NNsight(build(case)).names.stacks[case.stack]
        with pytest.raises(NamesError, match=reason), torch.no_grad():
            if value == "q_rot":
                names.access("head_q_rot")
            else:
                getattr(names, value)

    def test_what_a_layer_has_not(self) -> None:
        model = NNsight(build(BY_NAME["jamba"]))
        with pytest.raises(NamesError, match=r"has no head_z at layer 0: that layer has no self_attn"):
            with model.trace(input_ids=IDS):
                model.heads[0].z
        with pytest.raises(NamesError, match=r"has no mixer_out at layer 1"), model.trace(input_ids=IDS):
            model.mixer_out[1]
        with pytest.raises(NamesError, match=r"has no neurons at layer 1"), model.trace(input_ids=IDS):
            model.neurons[1]
        with pytest.raises(UnknownPathError):
            model.layers[0].attn
        assert model.layers[0].mixer.path.endswith("mamba")

    def test_two_stacks_are_told_apart(self) -> None:
        model = NNsight(build(BY_NAME["t5-encoder"]))
        with pytest.raises(NamesError, match=r"model\.names\.encoder\.resid_pre or model\.names\.decoder\.resid_pre"):
            model.resid_pre
        assert model.unembed.path == "model.lm_head"
        with pytest.raises(NamesError, match="no 'resid'"):
            model.names.resid


def test_names_are_listed(model) -> None:
    assert {"resid_pre", "heads", "logits", "layers"} <= set(dir(model))
    assert {"resid_pre", "heads", "logits", "layers"} <= set(dir(model.names))
    assert "LlamaForCausalLM (llama), layers at model.model.layers" in repr(model.names)
    assert repr(model.resid_pre) == "model.resid_pre[0 to 2]"
    assert repr(model.heads[1]).startswith("model.heads[1]: q, k, v")
