"""A small random model with a tokenizer in a folder, and one of another family."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = "the Eiffel Tower Colosseum Forum is in city of Paris Rome 東京 <unk>".split()


def save_model(model, folder):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_layer=3, n_head=2, n_embd=16, n_positions=32, initializer_range=0.5)
    return save_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def small_neox(tmp_path_factory):
    config = GPTNeoXConfig(
        vocab_size=len(WORDS),
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    return save_model(GPTNeoXForCausalLM(config), tmp_path_factory.mktemp("neox"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
