"""Superposition: the sparser its features, the more of them share a space (Elhage et al. 2022, Toy Models of Superposition).

Five features pass through two dimensions and are to come out again. Dense ones get a dimension each, and three are dropped;
sparse ones rarely meet, so four, then five stand in the plane at once. Without the ReLU, which cleans up where they
disturb each other, two is all there ever are.

    python examples/superposition.py    # prints the counts, draws superposition.png
"""

import torch
from matplotlib.figure import Figure

from nnsight import NNsight

FEATURES, WIDTH = 5, 2
SPARSITIES = (0.0, 0.7, 0.9)


class Toy(torch.nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.down = torch.nn.Linear(FEATURES, WIDTH, bias=False)
        self.bias = torch.nn.Parameter(torch.zeros(FEATURES))
        self.clean = torch.nn.ReLU() if relu else torch.nn.Identity()

    def forward(self, features):
        return self.clean(self.down(features) @ self.down.weight + self.bias)


def train(sparsity, relu, steps=2000):
    torch.manual_seed(0)
    toy = Toy(relu)
    torch.nn.init.xavier_normal_(toy.down.weight)
    importance = 0.9 ** torch.arange(FEATURES)
    optimizer = torch.optim.Adam(toy.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        features = torch.rand(1024, FEATURES) * (torch.rand(1024, FEATURES) > sparsity)
        loss = (importance * (toy(features) - features) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return NNsight(toy)


def directions(model):
    """Where each feature alone is put, `[feature, 2]`."""
    with model.trace(torch.eye(FEATURES)):
        hidden = model.down.output.save()
    return hidden.detach()


def run():
    """The features' directions by sparsity, `[sparsity, feature, 2]`, with the ReLU and without."""
    return {
        name: torch.stack([directions(train(sparsity, relu)) for sparsity in SPARSITIES])
        for name, relu in {"relu": True, "linear": False}.items()
    }


def represented(found):
    """How many features have a direction, of each sparsity."""
    return (found.norm(dim=-1) > 0.5).sum(-1).tolist()


def draw(found):
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    for axes, sparsity, features, count in zip(
        figure.subplots(1, len(SPARSITIES)), SPARSITIES, found, represented(found), strict=True
    ):
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("#d8dde3")
        axes.set_title(f"absent {sparsity:.0%} of the time: {count}", fontsize=9, loc="left")
        for (x, y), colour in zip(
            features.tolist(), ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4d3a00"), strict=True
        ):
            axes.plot([0, x], [0, y], color=colour, linewidth=2, marker="o", markevery=[1])
    return figure


if __name__ == "__main__":
    found = run()
    for name, features in found.items():
        print(f"{name:6} features represented: {represented(features)}, where each is absent {SPARSITIES} of the time")
    draw(found["relu"]).savefig("superposition.png", dpi=120)
