"""Small models with random weights, made in a moment."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from nnsight import LanguageModel


def gpt2_config(**changes):
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    return GPT2Config(**sizes | changes, bos_token_id=0, eos_token_id=0, architectures=["GPT2LMHeadModel"])


@pytest.fixture(scope="module")
def tiny():
    """A GPT-2 of three layers of width 32 that knows 100 tokens."""
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(gpt2_config()).eval(), tokenizer=object())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config of such a model and a tokenizer, and no weights."""
    path = tmp_path_factory.mktemp("no_weights")
    gpt2_config().save_pretrained(path)
    words = {word: number for number, word in enumerate("<unk> the tower is in city of".split())}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return str(path)
