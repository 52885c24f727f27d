"""Indirect objects: which token says whom a sentence goes on with (Wang et al. 2022, Interpretability in the Wild).

"When Mary and John went to the store John gave a drink to" goes on with the name that was said once. Only the second
subject (S2) tells who that is: its state, patched from one sentence into the other, turns the answer around, until in later
layers the last token has it. Other tokens are the control. What every component adds to the answer's logit sums up to it.

    python examples/indirect_object.py    # prints the figures, draws indirect_object.png
"""

import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nnsight import LanguageModel, plots
from nnsight.experiments import activation_patching, direct_logit_attribution, logit_diff, measure

NAMES = """Mary John Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Liam Mia Noah Olive Paul Quinn Rose Sam Tina
Uma Victor Wendy Xavier Yara Zoe""".split()
SENTENCE = "When {} and {} went to the store {} gave a drink to"
S2 = SENTENCE.split().index("{}", 4)


def sentences(count, seed):
    """Sentences, what they go on with, and the other name."""
    chance = random.Random(seed)
    drawn = [(*chance.sample(NAMES, 2), chance.random() < 0.5) for _ in range(count)]
    prompts = [SENTENCE.format(one, two, one if first else two) for one, two, first in drawn]
    answers = [two if first else one for one, two, first in drawn]
    return prompts, answers, [one if first else two for one, two, first in drawn]


def make_model():
    torch.manual_seed(0)
    words = [*NAMES, *dict.fromkeys(word for word in SENTENCE.split() if word != "{}")]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    sizes = {"n_positions": 16, "n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 64, "initializer_range": 0.1}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(words), **sizes, **plain)
    return LanguageModel(GPT2LMHeadModel(config), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def train(model, steps=300):
    module = model._model
    prompts, answers, _ = sentences(20_000, seed=0)
    ids, wanted = (torch.tensor(model.tokenizer(texts).input_ids) for texts in (prompts, answers))
    optimizer = torch.optim.AdamW(module.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(ids), (64,))
        logits = module(ids[rows], logits_to_keep=1, use_cache=False).logits[:, -1]
        loss = cross_entropy(logits, wanted[rows, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()


def run():
    """How often the right name wins, what patches of the state do, and what components add, over new sentences."""
    model = make_model()
    train(model)
    prompts, answers, others = sentences(64, seed=1)
    turned = [prompt.split() for prompt in prompts]
    for words, answer in zip(turned, answers, strict=True):
        words[S2] = answer
    corrupted = [" ".join(words) for words in turned]
    metric = logit_diff(answers, others)
    return {
        "right": (measure(model, prompts, metric).values > 0).float().mean().item(),
        "patches": activation_patching(model, prompts, corrupted, metric, progress=False).mean().normalized(),
        "components": direct_logit_attribution(model, prompts, answers, others).mean(),
    }


if __name__ == "__main__":
    found = run()
    patches, components = found["patches"], found["components"]
    print(f"right {found['right']:.2f}; S2 patched at layer 0: {patches.select(layer=0).values[S2]:.2f}")
    print(components)
    print(f"their sum {components.values.sum():.3f}, the logit difference {components.baseline['logit_diff']:.3f}")
    words = SENTENCE.format("IO", "S1", "S2").split()
    plots.heatmap(
        patches.values,
        rows=[f"layer {layer}" for layer in patches.axes["layer"]],
        columns=words,
        title="Whose state turns the answer around?",
        value_label="restored",
    ).savefig("indirect_object.png", dpi=90)
