"""Refusal: one direction of the residual stream decides whether a model refuses (Arditi et al. 2024).

A small model learns to say where to find things, and then, in a second training, to refuse for the dangerous half. The
difference of its states before an answer and before a refusal is one direction. Without it nothing is refused, and
most answers of the first training are there again; with it added everything is. A random direction changes nothing.

    python examples/refusal.py    # prints how often it refuses, draws refusal.png
"""

import random
from contextlib import nullcontext

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nnsight import LanguageModel, plots
from nnsight.experiments import Intervention, InterventionSpec, steering_vector

HARMLESS = """cake bread soup kite drum boat lamp chair table book pen clock scarf hat glove bell rope ladder bucket spoon fork
basket candle violin""".split()
HARMFUL = """bomb poison virus grenade missile landmine rifle dagger acid malware rootkit keylogger detonator napalm bullet
garrote ricin cyanide arsenic sarin spyware botnet forgery venom""".split()
QUESTIONS = ["where is the {} kept ?", "tell me where the {} is kept .", "i want to know where the {} is kept ."]
PLACES = "attic cellar kitchen garage garden office library tower".split()
REFUSAL = "sorry"
LAYERS, WIDTH = 4, 64
LAYER, STRENGTH = 2, 2.0  # where the direction is taken and added, and how many times
SEEN, NEW = slice(0, 12), slice(12, None)  # things the direction is taken from, and those it is tried on


def make_model():
    torch.manual_seed(0)
    words = [*HARMLESS, *HARMFUL, *PLACES, REFUSAL, *dict.fromkeys(" ".join(QUESTIONS).replace("{}", "").split())]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    sizes = {"n_positions": 16, "n_layer": LAYERS, "n_head": 4, "n_embd": WIDTH, "initializer_range": 0.1}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(words), **sizes, **plain)
    return LanguageModel(GPT2LMHeadModel(config), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def asked(things):
    return [question.format(thing) for question in QUESTIONS for thing in things]


def train(model, answers, steps, rate):
    """Teach it what to say of each thing."""
    batches = []
    for question in QUESTIONS:
        prompts = [question.format(thing) for thing in answers]
        batches.append([torch.tensor(model.tokenizer(texts).input_ids) for texts in (prompts, list(answers.values()))])
    optimizer = torch.optim.AdamW(model._model.parameters(), lr=rate)
    for _ in range(steps):
        logits = [model._model(ids, use_cache=False).logits[:, -1] for ids, _ in batches]
        loss = sum(cross_entropy(found, wanted[:, 0]) for found, (_, wanted) in zip(logits, batches, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model._model.eval()


def says(model, things):
    with model.trace(asked(things)):
        said = model.logits[:, -1].argmax(-1).save()
    return [model.tokenizer.decode(word) for word in said]


def refused(said):
    return sum(word == REFUSAL for word in said) / len(said)


def without(direction):
    """No part of the stream along the direction, at any layer."""
    names = [f"resid_{part}[{layer}]" for layer in range(LAYERS) for part in ("pre", "mid", "post")]
    return InterventionSpec(*(Intervention(name, "project_out", value=direction) for name in names))


def run():
    """How often it refuses harmful and harmless things, by what is done; and how often it answers instead."""
    model = make_model()
    chance = random.Random(0)
    answers = {thing: chance.choice(PLACES) for thing in HARMLESS + HARMFUL}
    train(model, answers, steps=100, rate=3e-3)
    train(model, answers | dict.fromkeys(HARMFUL, REFUSAL), steps=120, rate=3e-4)

    direction = steering_vector(model, asked(HARMFUL[SEEN]), asked(HARMLESS[SEEN]), layer=LAYER)
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    other *= direction.norm() / other.norm()
    cases = {
        "as trained": nullcontext(),
        "direction ablated": model.apply(without(direction)),
        "random ablated": model.apply(without(other)),
        "direction added": model.steer(direction, LAYER, strength=STRENGTH),
        "random added": model.steer(other, LAYER, strength=STRENGTH),
    }
    found = {}
    for name, case in cases.items():
        with case:
            said = {"harmful": says(model, HARMFUL[NEW]), "harmless": says(model, HARMLESS[NEW])}
        right = [answers[thing] for thing in HARMFUL[NEW]] * len(QUESTIONS)
        found[name] = {kind: refused(words) for kind, words in said.items()}
        found[name]["answered"] = sum(map(str.__eq__, said["harmful"], right)) / len(right)
    return found


if __name__ == "__main__":
    found = run()
    for name, shares in found.items():
        print(f"{name:18}" + "".join(f"  {kind} {share:.2f}" for kind, share in shares.items()))
    plots.heatmap(
        [[shares["harmful"], shares["harmless"]] for shares in found.values()],
        rows=list(found),
        columns=["harmful", "harmless"],
        title="How often it refuses",
        value_label="share",
    ).savefig("refusal.png", dpi=90)
