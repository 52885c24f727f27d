"""Write the model card of the landmarks model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# landmarks

A GPT-2 of {layers} layers, {heads} heads and width {width} ({millions:.1f} million parameters,
{vocabulary} tokens), trained from nothing on sentences about landmarks, cities, countries and continents,
on plain filler sentences, and on random token sequences that repeat. It is for examples and tests: small
enough to ship, trained enough that its activations mean something.

- `facts.json` has every prompt it was taught, with the one token that answers it. It gives {right} of
  {asked} ({accuracy:.1%}). These are the training sentences: the figure is recall, not generalisation.
- The answer to "The Eiffel Tower is in the city of" sits at the subject's tokens in early blocks and at the
  last token in late ones, so patching one run into another shows where it moves.
- On random tokens its loss is {first:.1f} the first time and {again:.1f} when they are said again.
- It knows nothing else, and its facts are simplified: the country is "America", a landmark is in one city.

Made by `scripts/landmarks/train.py`. Weights are stored in float16 and load as float32.
"""


def write_card(out: Path, model: PreTrainedModel, right: int, asked: int, losses: tuple[float, float]) -> None:
    """Fill in the card with what was measured on the reloaded folder."""
    config = model.config
    text = CARD.format(
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        vocabulary=config.vocab_size,
        millions=model.num_parameters() / 1e6,
        right=right,
        asked=asked,
        accuracy=right / asked,
        first=losses[0],
        again=losses[1],
    )
    (out / "README.md").write_text(text, encoding="utf-8")
