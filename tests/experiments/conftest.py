"""Small random models, and what experiments find on them by plain hooks on the plain modules."""

from contextlib import ExitStack

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnsight import LanguageModel

VOCAB = 60
LAYERS, HEADS, WIDTH = 3, 4, 32


class Plain:
    """A module run with hooks at `(name, layer)`, ids for ids; every experiment is compared with loops over it."""

    def __init__(self, module, family):
        self.module = module
        self.family = family
        self.layers = module.transformer.h if family == "gpt2" else module.model.layers

    def __call__(self, ids, edits=None, reads=()):
        """The logits `[batch, pos, vocab]`; `edits` change values, and `reads` are put into `self.values`."""
        self.values = {}
        edits = edits or {}
        with ExitStack() as stack:
            for site in {*edits, *reads}:
                stack.callback(self._hook(site, edits.get(site)).remove)
            kwargs = ids if isinstance(ids, dict) else {"input_ids": ids}
            return self.module(**kwargs, use_cache=False).logits

    def _hook(self, site, edit):
        name, layer = site
        block = self.layers[layer]
        gpt2 = self.family == "gpt2"

        def change(value):
            if site not in self.values:
                self.values[site] = value.detach().clone()
            return value if edit is None else edit(value)

        def before(module):
            return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))

        def after(module):
            def hook(m, args, out):
                return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

            return module.register_forward_hook(hook)

        def heads_before(module):
            return module.register_forward_pre_hook(
                lambda m, args: change(args[0].unflatten(-1, (HEADS, -1))).flatten(-2)
            )

        attention = block.attn if gpt2 else block.self_attn
        if name == "resid_pre":
            return before(block)
        if name == "resid_mid":  # the stream itself, which goes around the norm too
            norm = block.ln_2 if gpt2 else block.post_attention_layernorm
            return norm.register_forward_pre_hook(lambda m, args: (args[0].copy_(change(args[0])),))
        if name == "resid_post":
            return after(block)
        if name == "attn_out":
            return after(attention)
        if name == "mlp_out":
            return after(block.mlp)
        if name == "neurons":
            return before(block.mlp.c_proj if gpt2 else block.mlp.down_proj)
        if name == "head_z":
            return heads_before(attention.c_proj if gpt2 else attention.o_proj)
        if name in ("head_q", "head_k", "head_v"):
            part = ("head_q", "head_k", "head_v").index(name)
            if not gpt2:
                return self._split_heads((attention.q_proj, attention.k_proj, attention.v_proj)[part], change)
            return self._split_heads(attention.c_attn, change, part)
        raise KeyError(name)

    def _split_heads(self, module, change, part=None):
        def hook(m, args, out):
            if part is None:
                return change(out.unflatten(-1, (-1, WIDTH // HEADS))).flatten(-2)
            parts = list(out.chunk(3, -1))
            parts[part] = change(parts[part].unflatten(-1, (HEADS, -1))).flatten(-2)
            return torch.cat(parts, -1)

        return module.register_forward_hook(hook)


def build(family, seed=0):
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=VOCAB, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        module = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2, hidden_size=WIDTH,
            intermediate_size=48, vocab_size=VOCAB, max_position_embeddings=32,
        )  # fmt: skip
        module = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():  # far from the tiny initial weights, so that every effect shows
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
        else:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
    return module.eval()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def plain(family):
    return Plain(build(family), family)


@pytest.fixture(scope="session")
def model(plain):
    return LanguageModel(plain.module)


@pytest.fixture(scope="session")
def landmarks():
    return LanguageModel("nnsight/landmarks", dispatch=True)


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def other_ids():
    return torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pairs():
    """Three pairs of prompts of six tokens: `[2, 3, 6]`."""
    return torch.randint(0, VOCAB, (2, 3, 6), generator=torch.Generator().manual_seed(3))


def difference(logits, first=5, second=7):
    """The naive metric."""
    return logits[:, -1, first] - logits[:, -1, second]


@pytest.fixture(scope="session")
def diff():
    return difference
