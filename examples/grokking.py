"""Grokking: long after it knows its examples by heart, a model finds the rule (Power et al. 2022, Nanda et al. 2023).

A small transformer learns a + b mod 59 from some of all pairs. First it knows these and no others; then, under weight decay,
it finds out how to add: with waves. The embedding holds the numbers as sines and cosines of a few frequencies. Without
these five the model knows nothing; without any five others, all. A model that learns random answers has no such frequencies.

    python examples/grokking.py    # prints the figures, draws grokking.png
"""

import math

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from nnsight import NNsight

P, WIDTH, HEADS, KEYS = 59, 64, 4, 5
PAIRS = torch.cartesian_prod(torch.arange(P), torch.arange(P))
SUMS = PAIRS.sum(1) % P


class Adder(nn.Module):
    """One layer: attention from the end to both numbers, and an MLP."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(P, WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.places = nn.Parameter(torch.randn(2, WIDTH) * WIDTH**-0.5)
        self.query = nn.Parameter(torch.randn(HEADS, WIDTH // HEADS) * WIDTH**-0.5)
        self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.unembed = nn.Linear(WIDTH, P, bias=False)

    def forward(self, pairs):
        hidden = self.embed(pairs) + self.places
        keys, values = (part(hidden).unflatten(-1, (HEADS, -1)) for part in (self.key, self.value))
        pattern = (keys * self.query).sum(-1, keepdim=True).softmax(1)
        mixed = self.mix((pattern * values).sum(1).flatten(1))
        return self.unembed(mixed + self.mlp(mixed))


def train(answers, steps=1400):
    """The model, and its accuracy on the pairs it was shown and on the others, `[step, 2]`."""
    torch.manual_seed(0)
    shown = torch.rand(len(PAIRS)) < 0.4
    module = Adder()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=1.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, (steps - step) / 200, 1))
    curve = []
    for step in range(steps):
        loss = cross_entropy(module(PAIRS[shown]), answers[shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            with torch.no_grad():
                right = (module(PAIRS).argmax(-1) == answers).float()
            curve.append([right[shown].mean().item(), right[~shown].mean().item()])
    return NNsight(module), curve


def waves():
    """An orthonormal basis of functions of a number: `[frequency, 2, P]`, and the constant left out."""
    angles = 2 * math.pi * torch.arange(1, P // 2 + 1)[:, None] * torch.arange(P) / P
    return torch.stack([angles.cos(), angles.sin()], 1) * (2 / P) ** 0.5


def power(model):
    """The share of each frequency in the embedding, without the mean."""
    table = model.embed.weight.detach()
    found = (waves() @ (table - table.mean(0))).square().sum((1, 2))
    return found / found.sum()


@torch.no_grad()
def accuracy_without(model, frequencies):
    """On all pairs, with these frequencies taken out of the embedding."""
    chosen = waves()[frequencies].flatten(0, 1)
    table = model.embed.weight
    rest = table - chosen.T @ (chosen @ table)
    with model.trace(PAIRS):
        model.embed.output = rest[PAIRS]
        right = (model.output.argmax(-1) == SUMS).save()
    return right.float().mean().item()


def run():
    model, curve = train(SUMS)
    shares = power(model)
    order = shares.argsort(descending=True)
    memorizer, learnt = train(SUMS[torch.randperm(len(SUMS))], steps=400)
    return {
        "curve": curve,
        "shares": shares,
        "top": shares[order[:KEYS]].sum().item(),
        "excluded": accuracy_without(model, order[:KEYS]),
        "others excluded": accuracy_without(model, order[KEYS : 2 * KEYS]),
        "random answers": [*learnt[-1], power(memorizer).topk(KEYS).values.sum().item()],
    }


def draw(found):
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(20, 20 * len(found["curve"]) + 1, 20)
    for column, name, colour in zip(
        zip(*found["curve"], strict=True), ("shown", "not shown"), ("#0072b2", "#d55e00"), strict=True
    ):
        left.plot(steps, column, color=colour, label=f"pairs {name}")
    left.set(title="accuracy", xlabel="steps of training")
    left.legend(frameon=False)
    right.bar(range(1, len(found["shares"]) + 1), found["shares"].tolist(), color="#0072b2")
    right.set(title="power of the embedding", xlabel="frequency")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    found = run()
    print(f"accuracy: pairs shown {found['curve'][-1][0]:.3f}, pairs not shown {found['curve'][-1][1]:.3f}")
    print(f"the five largest frequencies: {found['top']:.2f} of the embedding's power")
    print(f"accuracy without them {found['excluded']:.3f}, without the next five {found['others excluded']:.3f}")
    print("random answers: shown {:.3f}, not shown {:.3f}, five largest {:.2f}".format(*found["random answers"]))
    draw(found).savefig("grokking.png", dpi=100)
