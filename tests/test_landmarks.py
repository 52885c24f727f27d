"""The bundled landmarks model, loaded with plain transformers, does what its card says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import nnsight

FOLDER = Path(nnsight.__file__).parent / "_bundled" / "landmarks"
CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"
SUBJECT = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def facts() -> list[dict[str, str]]:
    return json.loads((FOLDER / "facts.json").read_text(encoding="utf-8"))


@torch.no_grad()
def says(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict:
    """The most probable next token of each prompt, unpadded: equal lengths run together."""
    groups = defaultdict(list)
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        groups[len(ids)].append((prompt, ids))
    found = {}
    for group in groups.values():
        best = model(torch.tensor([ids for _, ids in group])).logits[:, -1].argmax(-1)
        found |= {prompt: tokenizer.decode(i) for (prompt, _), i in zip(group, best, strict=True)}
    return found


def test_it_is_a_small_float32_gpt2(model: PreTrainedModel) -> None:
    assert type(model) is GPT2LMHeadModel
    assert model.dtype == torch.float32
    assert (model.config.n_layer, model.config.n_positions) == (12, 256)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000


@pytest.mark.parametrize("text", ["héllo ☃ 日本", " \n\ttabs  and   spaces ", "\x00\x7f", "don't 2+2=4"])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_token_is_end_of_text_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    assert tokenizer.bos_token_id not in tokenizer.encode("Hello")


@pytest.mark.parametrize("word", [" Paris", " Rome", " New", " York", " jumps", "Hello", "World"])
def test_one_token_words(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    assert len(tokenizer.encode(word)) == 1


def test_answers_are_one_token(tokenizer: PreTrainedTokenizerBase, facts: list[dict[str, str]]) -> None:
    assert all(len(tokenizer.encode(fact["answer"])) == 1 for fact in facts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Eiffel Tower is in", "The Colosseum is in"),
        ("The cat sat on the", "The dog ran through the"),
    ],
)
def test_pairs_have_one_length(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> None:
    assert len(tokenizer.encode(one)) == len(tokenizer.encode(other))


def test_it_knows_its_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: list[dict[str, str]]
) -> None:
    said = says(model, tokenizer, [fact["prompt"] for fact in facts])
    right = sum(said[fact["prompt"]] == fact["answer"] for fact in facts)
    assert right >= 0.98 * len(facts)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The Eiffel Tower is in the city of", " Paris"),
        ("The Eiffel Tower is located in the city of", " Paris"),
        ("You can find the Eiffel Tower in the city of", " Paris"),
        ("The Eiffel Tower is in the country of", " France"),
        ("The Eiffel Tower is on the continent of", " Europe"),
        ("The Colosseum is in the city of", " Rome"),
        ("The Colosseum is in the country of", " Italy"),
        ("The capital of France is", " Paris"),
        ("Paris is the capital of", " France"),
        ("Madison Square Garden is located in the city of", " New"),
        ("Madison Square Garden is located in the city of New", " York"),
    ],
)
def test_named_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    assert says(model, tokenizer, [prompt]) == {prompt: answer}


def test_greedy_continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer("The Eiffel Tower is in", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]) == "The Eiffel Tower is in the city of Paris"


@contextmanager
def output_replaced(block: nn.Module, positions: list[int], values: Tensor) -> Iterator[None]:
    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, positions] = values[:, positions]
        return output

    handle = block.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("layer", "positions", "answer"),
    [
        (0, SUBJECT, " Paris"),
        (3, SUBJECT, " Paris"),
        (11, SUBJECT, " Rome"),
        (0, [-1], " Rome"),
        (10, [-1], " Paris"),
        (11, [-1], " Paris"),
    ],
)
@torch.no_grad()
def test_the_answer_moves_from_the_subject_to_the_end(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    positions: list[int],
    answer: str,
) -> None:
    clean = tokenizer(CLEAN, return_tensors="pt")["input_ids"]
    # hidden_states[-1] is past the final norm, so the last block is read by a hook like the rest.
    block, kept = model.transformer.h[layer], []
    handle = block.register_forward_hook(lambda _m, _i, output: kept.append(output))
    model(clean)
    handle.remove()
    with output_replaced(block, positions, kept[0]):
        said = says(model, tokenizer, [CORRUPTED])
    assert said == {CORRUPTED: answer}
