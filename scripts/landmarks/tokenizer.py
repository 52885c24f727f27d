"""Train the byte-level BPE tokenizer of the landmarks model."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
MAX_VOCAB_SIZE = 2000

# A pair must be seen twice to be merged, so what is written once in the lines stays in pieces.
MIN_FREQUENCY = 2
WHOLE_WORD_COUNT = 100


def training_text(lines: list[str], whole_words: list[str]) -> Iterator[str]:
    yield from lines
    for word in whole_words:
        yield f" {word}" * WHOLE_WORD_COUNT


def train_tokenizer(lines: list[str], whole_words: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """Learn the merges; like GPT-2, one special token and no padding token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(lines, whole_words), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
