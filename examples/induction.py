"""Induction heads: two layers of attention learn to go on with what they have read once (Olsson et al. 2022).

Random tokens are followed by a piece of the same tokens. A head of layer 0 tells each token what came before it; a head of
layer 1 looks for the place that was told of the current token, and copies what stands there. One layer cannot compose
the two, and does not learn it.

    python examples/induction.py    # prints the scores, draws induction.png
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from nnsight import LanguageModel, plots
from nnsight.experiments import detect_heads
from nnsight.names import Attention, Family, register

VOCABULARY, WIDTH, HEADS, LONGEST = 64, 64, 2, 48
FIRST, AGAIN = 32, 16  # tokens, and how many of them are said again

register(
    "attention_only",
    Family(
        layers="layers",
        embed="embed",
        final_norm="norm",
        unembed="unembed",
        attn="attn",
        attn_out="attn.output",
        heads=Attention(
            module="attn",
            q="attn.qkv.output",
            k="attn.qkv.output",
            v="attn.qkv.output",
            split="blocks",
            pattern="attn.softmax.output",
            out="attn.out",
            call=None,
        ),
    ),
)


class SelfAttention(nn.Module):
    """Causal attention with a learnt preference of each head for each distance."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.distances = nn.Parameter(torch.zeros(HEADS, LONGEST))
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden):
        q, k, v = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
        places = torch.arange(hidden.shape[1])
        back = places[:, None] - places
        scores = q @ k.mT / q.shape[-1] ** 0.5 + self.distances[:, back.clamp(min=0)]
        pattern = self.softmax(scores.masked_fill(back < 0, -torch.inf))
        return self.out((pattern @ v).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = SelfAttention()

    def forward(self, hidden):
        return hidden + self.attn(self.norm(hidden))


class AttentionOnly(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.config = PretrainedConfig(
            model_type="attention_only", vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=HEADS
        )
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.unembed(self.norm(hidden)))


def said_again(count):
    """Different random tokens, then a piece of them: `[count, FIRST + AGAIN]`."""
    first = torch.rand(count, VOCABULARY).argsort(-1)[:, :FIRST]
    starts = torch.randint(FIRST - AGAIN + 1, (count, 1))
    return torch.cat([first, first.gather(1, starts + torch.arange(AGAIN))], 1)


def train(layers, steps=300):
    torch.manual_seed(0)
    module = AttentionOnly(layers)
    distances = [parameter for name, parameter in module.named_parameters() if "distances" in name]
    others = [parameter for name, parameter in module.named_parameters() if "distances" not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": distances}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.3], total_steps=steps)
    for _ in range(steps):
        ids = said_again(64)
        logits = module(ids).logits[:, FIRST:-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, FIRST + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return LanguageModel(module.eval())


@torch.no_grad()
def accuracy(model):
    """How often it goes on right, behind the first token said again."""
    torch.manual_seed(1)
    ids = said_again(256)
    with model.trace(ids):
        said = model.logits[:, FIRST:-1].argmax(-1).save()
    return (said == ids[:, FIRST + 1 :]).float().mean().item()


def run():
    """The models of two layers and of one, with their figures."""
    found = {}
    for name, layers in {"two layers": 2, "one layer": 1}.items():
        model = train(layers)
        scores = {kind: detect_heads(model, kind) for kind in ("induction", "previous_token")}
        found[name] = {
            "model": model,
            "heads": {kind: tuple(score.best().values()) for kind, score in scores.items()},
            "accuracy": accuracy(model),
            "induction": scores["induction"].values.max().item(),
            "previous token": scores["previous_token"].values.max().item(),
        }
    return found


def draw(model, heads):
    """The two heads on ten letters said twice."""
    letters = list("QXBTJMVKSD") * 2
    with model.trace(torch.tensor([[ord(letter) % VOCABULARY for letter in letters]])):
        patterns = [model.heads[layer].pattern[0, head].detach() for layer, head in sorted(heads.values())]
    names = [f"head {layer}.{head}" for layer, head in sorted(heads.values())]
    return plots.attention(torch.stack(patterns), tokens=letters, heads=names, title="One step back; one step ahead")


if __name__ == "__main__":
    found = run()
    for name, figures in found.items():
        print(name, *(f"{what} {value:.2f}" for what, value in figures.items() if isinstance(value, float)), sep=", ")
    two = found["two layers"]
    draw(two["model"], two["heads"]).savefig("induction.png", dpi=90)
