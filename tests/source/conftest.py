"""Small seeded models, and dispatches that record."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

SIZES = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1}
ROTARY = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def gpt2_small(request) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, attn_implementation=request.param, **SIZES)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ROTARY)).eval()


@pytest.fixture(scope="session")
def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager", **ROTARY)
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.tensor([[5, 9, 30, 2, 17], [8, 8, 41, 3, 20]])


class Recorder:
    """A dispatch that makes every call and remembers the operations; `replace` gives other results."""

    def __init__(self, **replace: Any) -> None:
        self.names: list[str] = []
        self.replace = replace

    def __call__(self, name: str, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = f(*args, **kwargs)
        self.names.append(name)
        return self.replace.get(name, result)


@pytest.fixture
def recorder() -> Callable[..., Recorder]:
    return Recorder
