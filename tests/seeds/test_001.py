"""Document 001, snippet by snippet, as printed."""
# fmt: off
# ruff: noqa: I001

import pytest
import torch
from torch.testing import assert_close

from nnsight.errors import OutOfOrderWarning

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"


def test_basic_usage(hub_cache, plain, capsys, recwarn):
    from nnsight import LanguageModel
    import torch

    model = LanguageModel(
      'gpt2',
      device_map='auto')

    with model.trace(
      'The capital of France'
    ) as tracer:
      # Get hidden states
      # from layer 5
      hidden = model\
        .transformer\
        .h[5].output[0]
      hidden_saved = (
        hidden.save())

      # Get attention
      # pattern from layer 3
      attn = model\
        .transformer\
        .h[3].attn\
        .output[0]
      attn_saved = (
        attn.save())

    print(
      f'Hidden shape: '
      f'{hidden_saved.shape}')
    print(
      f'Attn shape: '
      f'{attn_saved.shape}')

    reference = plain(model)
    expected = reference.run("The capital of France")
    assert torch.equal(hidden_saved, expected["transformer.h.5"])
    assert_close(attn_saved, expected["transformer.h.3.attn"])
    shape = f"torch.Size([1, {reference.length('The capital of France')}, {model.config.n_embd}])"
    assert capsys.readouterr().out == f"Hidden shape: {shape}\nAttn shape: {shape}\n"
    # Layer 3 is read after layer 5.
    assert [warning.category for warning in recwarn] == [OutOfOrderWarning]


def define():
    """The document's second snippet; its method names the global `model`, so both are handed out together."""
    from nnsight import LanguageModel
    import torch

    model = LanguageModel(
      'gpt2',
      device_map='auto')

    class InterventionExp:
      def __init__(
        self, model
      ):
        self.model = model

      def patch_layer(
        self,
        prompt: str,
        source_prompt: str,
        layer: int,
        pos: int
      ) -> dict:
        # Get source acts
        with self.model.trace(
          source_prompt
        ) as src:
          src_hidden = (
            self.model
              .transformer
              .h[layer]
              .output[0]
              [:, pos, :]
              .save())

        # Patch target
        with self.model.trace(
          prompt
        ) as tgt:
          self.model\
            .transformer\
            .h[layer]\
            .output[0]\
            [:, pos, :] = (
              src_hidden)
          logits = (
            self.model
              .lm_head
              .output
              .save())

        probs = torch\
          .softmax(
            logits[0, -1],
            dim=-1)
        top = torch.topk(
          probs, 5)
        return {
          'top_probs':
            top.values
              .tolist(),
          'top_tokens': [
            model.tokenizer
              .decode(t)
            for t in
              top.indices]}

    return model, InterventionExp


@pytest.mark.parametrize(("layer", "pos"), [(0, 4), (3, 2), (11, -1)])
def test_real_world_example(hub_cache, plain, layer, pos):
    model, InterventionExp = define()
    found = InterventionExp(model).patch_layer(CORRUPTED, CLEAN, layer, pos)

    reference = plain(model)
    path = f"transformer.h.{layer}"
    source = reference.run(CLEAN)[path]

    def patch(hidden):
        hidden[:, pos] = source[:, pos]
        return hidden

    probs = reference.run(CORRUPTED, edits={path: patch}).logits[0, -1].softmax(-1)
    top = probs.topk(5)
    assert_close(torch.tensor(found["top_probs"]), top.values)
    assert found["top_tokens"] == [model.tokenizer.decode(token) for token in top.indices]
    unpatched = reference.run(CORRUPTED).logits[0, -1].softmax(-1)
    assert not torch.allclose(probs, unpatched)


def test_patching_the_last_position_of_the_last_layer_brings_the_source_answer(hub_cache, plain):
    model, InterventionExp = define()
    found = InterventionExp(model).patch_layer(CORRUPTED, CLEAN, 11, -1)

    best = plain(model).run(CLEAN).logits[0, -1].argmax()
    assert found["top_tokens"][0] == model.tokenizer.decode(best)
