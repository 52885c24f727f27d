"""Refusal: one direction of the residual stream decides whether a model refuses (Arditi et al. 2024).

A small model learns to say where to find things, and then, in a second training, to refuse for the dangerous half. The
difference of its states before an answer and before a refusal is one direction. Without it nothing is refused, and the
answers of the first training are there again; with it added everything is. A random direction changes nothing.

    python examples/refusal.py    # prints how often it refuses, draws refusal.png
"""

import random

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
HARMFUL = """bomb poison virus grenade missile landmine rifle dagger nerve-gas acid malware rootkit keylogger detonator napalm
bullet garrote ricin cyanide arsenic sarin spyware botnet forgery""".split()
ASKED = ["where is the {} kept ?", "tell me where the {} is kept .", "i want to know where the {} is kept ."]
PLACES = "attic cellar kitchen garage garden office library tower".split()
REFUSAL = "sorry"
LAYERS, WIDTH, LAYER = 4, 64, 2


def make_model():
    torch.manual_seed(0)
    words = [*HARMLESS, *HARMFUL, *PLACES, REFUSAL, *dict.fromkeys(" ".join(ASKED).replace("{}", "").split())]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    sizes = {"n_positions": 16, "n_layer": LAYERS, "n_head": 4, "n_embd": WIDTH, "initializer_range": 0.1}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=len(words), **sizes, **plain)
    return LanguageModel(GPT2LMHeadModel(config), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def train(model, answers, steps, rate):
    """On the first two ways to ask; the third is never seen."""
    data = [(frame.format(thing), answer) for frame in ASKED for thing, answer in answers.items()]
    groups = {}
    for prompt, answer in data:
        ids, wanted = model.tokenizer(prompt).input_ids, model.tokenizer(answer).input_ids[0]
        groups.setdefault(len(ids), []).append((ids, wanted))
    batches = [tuple(map(torch.tensor, zip(*group))) for group in groups.values()]
    optimizer = torch.optim.AdamW(model._model.parameters(), lr=rate)
    for step in range(steps):
        loss = sum(cross_entropy(model._model(ids, use_cache=False).logits[:, -1], wanted) for ids, wanted in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(step, loss.item())


def prompts_of(things):
    return [frame.format(thing) for frame in ASKED for thing in things]


def says(model, things):
    with model.trace(prompts_of(things)):
        said = model.logits[:, -1].argmax(-1).save()
    return [model.tokenizer.decode(i) for i in said]


def refused(said):
    return sum(word == REFUSAL for word in said) / len(said)


def without(direction):
    return InterventionSpec(
        *(
            Intervention(f"resid_{name}[{layer}]", "project_out", value=direction)
            for layer in range(LAYERS)
            for name in ("pre", "mid", "post")
        )
    )


def run():
    model = make_model()
    chance = random.Random(0)
    answers = {thing: chance.choice(PLACES) for thing in HARMLESS + HARMFUL}
    train(model, answers, 100, 3e-3)
    print(sum(a == answers[t] for a, t in zip(says(model, HARMFUL), HARMFUL * 3)) / 72)
    train(model, answers | dict.fromkeys(HARMFUL, REFUSAL), 60, 3e-4)
    known, new = slice(0, 12), slice(12, None)
    for LAYER in range(4):
        direction = steering_vector(model, prompts_of(HARMFUL[known]), prompts_of(HARMLESS[known]), layer=LAYER)
        noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
        noise *= direction.norm() / noise.norm()
        for name, d in {"direction": direction, "random": noise}.items():
            add = InterventionSpec(Intervention(f"resid_post[{LAYER}]", "add", value=d))
            print(LAYER, name, refused(says(model, HARMFUL[new])), refused(says(model, HARMLESS[new])))
            with model.apply(without(d)):
                w = says(model, HARMFUL[new])
                print(
                    "  abl",
                    refused(w),
                    sum(a == answers[t] for a, t in zip(w, HARMFUL[new] * 3)) / len(w),
                    refused(says(model, HARMLESS[new])),
                )
            with model.apply(add):
                print("  add", refused(says(model, HARMLESS[new])), refused(says(model, HARMFUL[new])))


if __name__ == "__main__":
    run()
