"""Sparse autoencoders: features in superposition, taken apart again (Cunningham et al. 2023, Bricken et al. 2023).

Each word that a small model reads adds a direction to a state of too few dimensions for all of them, and the model learns to
tell from the state which words there were. A sparse autoencoder, which sees nothing but states, finds these directions;
without one of them the model forgets that word and no other. States of the same covariance that are no sums
of a few features have none to be found: they are the control.

    python examples/sparse_autoencoder.py    # prints the figures, draws sparse_autoencoder.png
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from nnsight import NNsight, plots
from nnsight.experiments import collect_activations

WORDS, WIDTH, SAID, LATENTS = 40, 24, 3, 60


class Listener(nn.Module):
    """Adds up its words, and says which there were."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.embed.weight = nn.Parameter(normalize(torch.randn(WORDS, WIDTH), dim=-1), requires_grad=False)
        self.state = nn.Identity()
        self.recall = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, WORDS))

    def forward(self, words):
        return self.recall(self.state(self.embed(words).cumsum(1)))


class SparseAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.directions = nn.Parameter(normalize(torch.randn(LATENTS, WIDTH), dim=-1))
        self.encoder = nn.Linear(WIDTH, LATENTS)
        self.encoder.weight.data = self.directions.data.clone()
        self.middle = nn.Parameter(torch.zeros(WIDTH))

    def encode(self, states):
        return self.encoder(states - self.middle).relu()

    def decode(self, latents):
        return latents @ normalize(self.directions, dim=-1) + self.middle


def sentences(count):
    """Different random words, `[count, SAID]`."""
    return torch.rand(count, WORDS).argsort(-1)[:, :SAID]


def train(module, loss_of, steps=1500, rate=3e-3):
    optimizer = torch.optim.Adam([one for one in module.parameters() if one.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


def train_listener():
    module = Listener()

    def loss_of(step):
        words = sentences(256)
        said = torch.zeros(256, WORDS).scatter(1, words, 1.0)
        return binary_cross_entropy_with_logits(module(words)[:, -1], said)

    return NNsight(train(module, loss_of))


def train_autoencoder(states, sparsity=0.3):
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder()

    def loss_of(step):
        batch = states[torch.randint(len(states), (1024,))]
        latents = autoencoder.encode(batch)
        lost = ((autoencoder.decode(latents) - batch) ** 2).sum(-1).mean()
        return lost + sparsity * min(1, step / 500) * latents.sum(-1).mean()

    return train(autoencoder, loss_of, rate=1e-2)


def cosines(model, autoencoder):
    """Of the words' directions and those found, `[word, latent]`."""
    return (model.embed.weight @ normalize(autoencoder.directions, dim=-1).T).detach()


@torch.no_grad()
def recalled(model, words, autoencoder, latents=None):
    """How often the model has heard the first word of each sentence, and the others; without one latent of each."""
    with model.trace(words):
        if latents is not None:
            state = model.state.output
            found = autoencoder.encode(state)
            kept = found.scatter(-1, latents[:, None, None].expand(-1, SAID, 1), 0.0)
            model.state.output = state + autoencoder.decode(kept) - autoencoder.decode(found)
        heard = (model.output[:, -1] > 0).save()
    heard = heard.gather(1, words).float()
    return heard[:, 0].mean().item(), heard[:, 1:].mean().item()


def run():
    """Cosines `[word, latent]`, of the autoencoder and of the control, and what the model recalls."""
    torch.manual_seed(0)
    model = train_listener()
    with tempfile.TemporaryDirectory() as folder:
        prompts = sentences(20_000).tolist()
        store = collect_activations(model, prompts, "state.output", to=folder, positions="last", progress=False)
        states = store["state.output"].clone()
    smooth = torch.distributions.MultivariateNormal(states.mean(0), states.T.cov()).sample((len(states),))
    autoencoder, control = train_autoencoder(states), train_autoencoder(smooth)
    found, words = cosines(model, autoencoder), sentences(2000)
    latents = found.argmax(-1)[words]
    return {
        "cosines": found,
        "control": cosines(model, control),
        "recalled": recalled(model, words, autoencoder),
        "without its latent": recalled(model, words, autoencoder, latents[:, 0]),
    }


if __name__ == "__main__":
    found = run()
    for name in ("cosines", "control"):
        best = found[name].max(-1).values
        print(f"{name:8} of the best latent for each word: mean {best.mean():.2f}, least {best.min():.2f}")
    for name in ("recalled", "without its latent"):
        print(f"{name:19} one word {found[name][0]:.2f}, the others {found[name][1]:.2f}")
    order = found["cosines"].argmax(-1).tolist()
    order += [latent for latent in range(LATENTS) if latent not in order]
    plots.heatmap(
        found["cosines"][:, order],
        rows=[str(word) for word in range(WORDS)],
        columns=[str(latent) for latent in order],
        title="Words (down) and latents (across), each word's best first",
        value_label="cosine",
    ).savefig("sparse_autoencoder.png", dpi=60)
