"""Every row is checked on the model at hand before it is served, and the check leaves nothing behind."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
import zoo

from nnsight import LanguageModel, NNsight
from nnsight.errors import NamesError
from nnsight.names import Attention, Family, family, register
from nnsight.names import _registry as registry
from nnsight.names import _vocabulary as vocabulary

from .cases import BY_NAME, FAMILIES, build, close

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def own_rows(monkeypatch):
    monkeypatch.setattr(registry, "_own", {})


@pytest.fixture
def checks(monkeypatch):
    """How often a stack is checked."""
    made = []
    check = vocabulary.check_stack
    monkeypatch.setattr(vocabulary, "check_stack", lambda *args: made.append(args[1].name) or check(*args))
    return made


LLAMA = family("llama")
BROKEN = {
    "another attention output": (replace(LLAMA, attn_out="input_layernorm.output"), "attn_out"),
    "another stream between": (replace(LLAMA, resid_mid="input_layernorm.input"), "resid_mid"),
    "no module of that name": (replace(LLAMA, mlp_out="mlp.down_proj.output", neurons="mlp.gone.input"), "neurons"),
    "keys for queries": (replace(LLAMA, heads=replace(LLAMA.heads, v="self_attn.k_proj.output")), "heads"),
    "rotated the wrong way round": (
        replace(LLAMA, heads=replace(LLAMA.heads, q_rot=LLAMA.heads.k_rot, k_rot=LLAMA.heads.q_rot)),
        "heads",
    ),
    "another split": (replace(LLAMA, heads=replace(LLAMA.heads, heads=2, kv_heads=2)), "heads"),
    "another norm": (replace(LLAMA, final_norm="layers.1.post_attention_layernorm"), "final_norm"),
    "another sum": (
        replace(LLAMA, stream="post_norm", norms=("input_layernorm", "post_attention_layernorm")),
        "attn_out",
    ),
    "another factor": (replace(LLAMA, multiplier="rms_norm_eps"), "attn_out"),
    "another embedding": (replace(LLAMA, entry=("embed_tokens", "embed_tokens")), "resid_pre"),
    "a cap it has not": (replace(LLAMA, head="capped", head_value="hidden_size"), "logits"),
}


@pytest.mark.usefixtures("own_rows")
@pytest.mark.parametrize("what", BROKEN)
def test_broken_row_is_refused(what: str) -> None:
    row, name = BROKEN[what]
    register("llama", row)
    model = NNsight(build(BY_NAME["llama"]))
    with pytest.raises(NamesError, match="LlamaForCausalLM"), model.trace(input_ids=IDS):
        if name == "heads":
            for head in "q k v q_rot k_rot pattern z result".split():
                getattr(model.heads[1], head)
        elif name in ("final_norm", "logits"):
            getattr(model, name)
        else:
            getattr(model, name)[1]
    if name not in ("resid_pre", "logits"):
        with model.trace(input_ids=IDS):  # the rest of the vocabulary is served
            logits = model.logits
        assert close(logits, model._model(IDS).logits)


@pytest.mark.usefixtures("own_rows")
def test_modules_of_a_broken_row_are_refused_when_the_next_trace_begins() -> None:
    register("llama", replace(LLAMA, layers="layers.0"))  # the children of a block for blocks
    model = NNsight(build(BY_NAME["llama"]))
    layers = model.layers
    assert len(layers) == 4
    with pytest.raises(NamesError, match=r"model\.layers is not served"):
        with model.trace(input_ids=IDS):
            layers[0].output


def test_a_model_unlike_its_family_is_refused() -> None:
    class Doubling(tf.models.llama.modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    net = build(BY_NAME["llama"])
    net.model.layers[1].__class__ = Doubling
    model = NNsight(net)
    with pytest.raises(NamesError, match=r"resid_mid, |resid_post is not served.*at layer 1"):
        with model.trace(input_ids=IDS):
            model.resid_post[0]
    with model.trace(input_ids=IDS):
        pattern = model.heads[1].pattern
    assert pattern.shape == (1, 4, 6, 6)


def test_unknown_family_is_refused_by_name() -> None:
    net = build(BY_NAME["llama"])
    net.config.model_type = "unheard_of"
    model = NNsight(net)
    with pytest.raises(NamesError, match=r"does not know LlamaForCausalLM \(unheard_of\)[\s\S]*register"):
        model.resid_pre
    assert not hasattr(model, "heads")


@pytest.mark.usefixtures("own_rows")
def test_registered_family_is_served() -> None:
    net = build(BY_NAME["llama"])
    net.config.model_type = "of_my_own"
    register(
        "of_my_own",
        lambda config: Family(
            layers="layers",
            embed="embed_tokens",
            final_norm="norm",
            unembed="lm_head",
            attn="self_attn",
            resid_mid="post_attention_layernorm.input",
            attn_out="self_attn.output",
            mlp_out="mlp.output",
            heads=Attention(
                module="self_attn",
                out="self_attn.o_proj",
                q="self_attn.q_proj.output",
                k="self_attn.k_proj.output",
                v="self_attn.v_proj.output",
                heads=config.num_attention_heads,
                kv_heads=2,
            ),
        ),
    )
    model = NNsight(net)
    with model.trace(input_ids=IDS):
        z, mid = model.heads[1].z, model.resid_mid[1]
    assert mid.shape == (1, 6, 32)
    assert z.shape == (1, 6, 4, 8)
    with pytest.raises(NamesError, match="has no neurons"):
        model.neurons


def test_register_takes_rows_only() -> None:
    with pytest.raises(TypeError, match="register"):
        register("x", "layers")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_holds(name: str) -> None:
    model = NNsight(zoo.build(FAMILIES[name]))
    model.names.check()
    if name not in ("llava", "qwen2_vl"):  # an image takes the place of some tokens' embeddings
        model.names.check(**zoo.inputs(FAMILIES[name]))


class TestOnce:
    def test_one_trial_a_model(self, checks) -> None:
        model = NNsight(build(BY_NAME["llama"]))
        for _ in range(3):
            with model.trace(input_ids=IDS):
                model.resid_pre[0], model.heads[1].z, model.logits
        with model.edit() as edited:
            model.resid_post[1][:] = 0
        with edited.trace(input_ids=IDS):
            edited.resid_post[2]
        assert checks == [""]

    def test_wrapping_and_plain_traces_cost_none(self, checks) -> None:
        model = NNsight(build(BY_NAME["llama"]))
        with model.trace(input_ids=IDS):
            model.model.layers[1].output
        assert checks == []

    def test_again_once_a_module_is_exchanged(self, checks) -> None:
        net = build(BY_NAME["llama"])
        model = NNsight(net)
        with model.trace(input_ids=IDS):
            model.resid_pre[1]
        net.model.layers[1].mlp.down_proj = torch.nn.Sequential(net.model.layers[1].mlp.down_proj)
        with model.trace(input_ids=IDS):
            model.resid_pre[1]
        assert checks == ["", ""]

    def test_each_half_when_it_is_used(self, checks) -> None:
        model = NNsight(build(BY_NAME["t5-encoder"]))
        given = zoo.inputs(zoo.FAMILIES["t5"])
        with model.trace(**given):
            model.names.decoder.resid_pre[0]
        with model.trace(**given):
            model.names.encoder.resid_pre[0]
        assert checks == ["decoder", "encoder"]


class TestUndisturbed:
    def test_random_numbers_and_modes(self) -> None:
        model = NNsight(build(BY_NAME["llama"]))
        with model.trace(input_ids=IDS):
            pass
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with torch.inference_mode(), model.trace(input_ids=IDS):
            assert torch.is_inference_mode_enabled()
            value = model.resid_pre[1]
            assert torch.is_inference_mode_enabled()
        assert value.is_inference()
        assert torch.is_grad_enabled()
        assert torch.equal(torch.rand(4), expected)

    def test_the_trace_that_is_open(self) -> None:
        net = build(BY_NAME["llama"])
        model = NNsight(net)
        with model.trace(input_ids=IDS, strict_order=True):
            first = model.model.layers[0].output.clone()
            middle = model.resid_mid[1].clone()  # the check runs here, while the model stands in layer 0
            last = model.model.layers[2].output.clone()
            logits = model.logits.clone()
        assert torch.equal(logits, net(IDS).logits)
        with model.trace(input_ids=IDS):
            assert torch.equal(first, model.resid_post[0])
            assert torch.equal(middle, model.resid_mid[1])
            assert torch.equal(last, model.resid_post[2])

    def test_the_module(self) -> None:
        net = build(BY_NAME["gptj"])
        before = {name: dict(vars(module)) for name, module in net.named_modules()}
        buffers = dict(net.named_buffers())
        model = NNsight(net)
        with model.trace(input_ids=IDS):
            model.resid_pre[1]
        for name, module in net.named_modules():
            assert vars(module).keys() == before[name].keys()
            assert all(vars(module)[key] is value for key, value in before[name].items())
        assert all(buffer is buffers[name] for name, buffer in net.named_buffers())

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5-decoder", "vit", "phi3"])
    def test_training_mode(self, name: str) -> None:
        case = BY_NAME[name]
        net = build(case).train()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model = NNsight(net)
        given = zoo.inputs(zoo.FAMILIES[case.family])
        with model.trace(**given):
            value = model.names.stacks[case.stack].resid_post[1]
        assert value.shape[0] == 2
        assert net.training
        assert all(module.training for module in net.modules())

    def test_in_an_invoke(self) -> None:
        model = LanguageModel(build(BY_NAME["gpt2"]))
        with model.trace() as tracer:
            with tracer.invoke([5, 6, 7]):
                first = model.resid_mid[1].clone()
            with tracer.invoke([8, 9]):
                second = model.resid_mid[1].clone()
        with model.trace([5, 6, 7]):
            assert close(first, model.resid_mid[1])
        with model.trace([8, 9]):
            assert close(second[:, 1:], model.resid_mid[1])


def test_a_model_that_needs_inputs_of_its_own_is_checked_on_them() -> None:
    class Picky(tf.LlamaForCausalLM):
        def forward(self, input_ids=None, *, flag, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    net = build(BY_NAME["llama"])
    net.__class__ = Picky
    model = NNsight(net)
    with pytest.raises(NamesError, match="trial forward failed with TypeError"):
        with model.trace(input_ids=IDS, flag=1):
            model.resid_pre[1]
    model.names.check(input_ids=IDS, flag=1)
    with model.trace(input_ids=IDS, flag=1):
        assert model.resid_pre[1].shape == (1, 6, 32)
