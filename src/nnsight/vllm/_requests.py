"""Requests as vLLM takes them: token ids, and sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

Request = tuple[dict[str, Any], Any]  # prompt and sampling parameters


def prompt_of(prompt: Any, tokenizer: Any) -> dict[str, Any]:
    """A text, token ids or chat messages as ids."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], dict):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = list(prompt)
    return {"prompt_token_ids": ids}


def sampling_of(params: Mapping[str, Any], extra: dict[str, Any] | None = None) -> Any:
    """Sampling parameters: greedy and one token where nothing else is said.

    Raises:
        InputError: There is no such parameter, or a block could not see what it asks for.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    given = {"temperature": 0.0, "max_tokens": 1, **params}
    if given.get("n", 1) != 1:
        raise InputError("n=: a block sees one continuation; give each an invoke of its own.")
    if extra is not None:
        given["extra_args"] = {**given.get("extra_args", {}), **extra}
    try:
        return SamplingParams(**given)
    except TypeError as error:
        raise InputError(f"vLLM's sampling parameters do not fit: {error}.") from None


def check_length(prompt: Mapping[str, Any], most: int) -> None:
    """A prompt with a block must fit one step of the engine, of `most` tokens.

    Raises:
        InputError: It does not.
    """
    size = len(prompt["prompt_token_ids"])
    if size > most:
        raise InputError(
            f"A block needs its whole prompt in one step: this one has {size} tokens, a step {most}. Give the engine "
            f"max_num_batched_tokens={size} or more."
        )
