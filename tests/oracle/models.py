"""Small random models in double precision, and the sites in them: found by plain hooks, not by nnsight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# How rows lie in a value.  ROWS [b, d]; SEQ [b, s, d]; TIME [s, b, d]; FLAT [b * s, d]; STATES [1, b, d].
ROWS, SEQ, TIME, FLAT, STATES = "rows", "seq", "time", "flat", "states"
BATCH_DIM = {ROWS: 0, SEQ: 0, TIME: 1, FLAT: 0, STATES: 1}

VOCABULARY = 19
_ROWS, _LENGTH = 3, 5  # of the run that finds the sites: sizes that no width has


# --- modules ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.Tanh()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class MLP(nn.Module):
    """Residual blocks, and one layer that is called twice."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Residual(width) for _ in range(2)])
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.shared(x))


class InPlace(nn.Module):
    """A model that changes its own values in place, and gives a dictionary."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ELU(inplace=True), nn.Dropout(0.0)
        )
        self.head = nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layers(x)
        out = self.head(hidden)
        hidden += 1
        return {"out": out, "hidden": hidden}


class Experts(nn.Module):
    """A router over flattened tokens `[b * s, d]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.gate(tokens).softmax(-1)
        mixed = sum(weights[:, i : i + 1] * expert(tokens) for i, expert in enumerate(self.experts))
        return mixed.reshape(x.shape)


class Router(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = Experts(width)
        self.middle = nn.Linear(width, width)
        self.second = Experts(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(self.norm(x))
        x = self.middle(x)
        return x + self.second(x)


class Split(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(x)


class Pairs(nn.Module):
    """Tuples between modules and at the end."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.split = nn.ModuleList([Split(width) for _ in range(2)])
        self.join = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for split, join in zip(self.split, self.join, strict=True):
            left, right = split(x)
            x = left + join(right)
        return x, right


class Recurrent(nn.Module):
    """Time comes first inside, and an LSTM's states have the batch in the middle."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.lstm = nn.LSTM(width, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps, (last, _) = self.lstm(self.embed(x.transpose(0, 1)))
        return self.head(self.norm(steps + last)).transpose(0, 1)


class Mixing(nn.Module):
    """The mean of the tokens so far, padding left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.to(x)[..., None]
        return self.out((self.value(x) * kept).cumsum(1) / kept.cumsum(1).clamp(min=1))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = Mixing(width)
        self.mlp = Residual(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.mixing(x, mask))


class Decoder(nn.Module):
    """A causal language model with a loop of its own in `generate`, and no cache."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 1,
        stopping_criteria: Any = (),
        pad_token_id: int | None = None,
    ) -> torch.Tensor:
        ids = input_ids
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        for _ in range(max_new_tokens):
            token = self(ids, attention_mask=mask)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            for criterion in stopping_criteria:
                criterion(ids, None)
        return ids


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


# --- sites -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A tensor at the first call of a module in a step: its output or first argument, or an item of a tuple there."""

    path: str
    kind: str
    item: tuple[int, ...]
    layout: str
    width: int
    order: int  # where in the forward
    safe: bool  # an in-place change does not break the gradients of what made it
    differentiable: bool  # something before it has parameters
    fresh: bool  # a module has just made this tensor, so that only what follows here has it
    memory: int  # places with the same number have the same tensor, or views of it
    made_of: frozenset[int]  # memories whose gradients come through this one

    @property
    def event(self) -> tuple[str, str]:
        return self.path, self.kind


@dataclass(frozen=True)
class Spec:
    """A kind of model.  `tokens` says that it reads token ids, `features` otherwise how wide its input is."""

    name: str
    make: Callable[[], nn.Module]
    sequences: bool
    tokens: bool = False
    cached: bool = False
    features: int = 4

    def build(self) -> nn.Module:
        """The same weights each time."""
        return _build(self.name)

    @property
    def sites(self) -> tuple[Site, ...]:
        return _sites(self.name)

    @property
    def events(self) -> dict[tuple[str, str], int]:
        """Where in the forward each module's first call begins and ends."""
        return _events(self.name)

    def inputs(self, seed: int, rows: int, length: int) -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return (torch.randint(1, VOCABULARY, (rows, length), generator=generator),)
        shape = (rows, length, self.features) if self.sequences else (rows, self.features)
        return (torch.randn(shape, generator=generator, dtype=torch.float64),)


SPECS = {
    spec.name: spec
    for spec in (
        Spec("mlp", MLP, sequences=False),
        Spec("in_place", InPlace, sequences=False),
        Spec("router", Router, sequences=True),
        Spec("pairs", Pairs, sequences=False),
        Spec("recurrent", Recurrent, sequences=True),
        Spec("decoder", Decoder, sequences=True, tokens=True),
        Spec("gpt2", gpt2, sequences=True, tokens=True, cached=True),
        Spec("llama", llama, sequences=True, tokens=True, cached=True),
    )
}


@functools.cache
def _build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        module = SPECS[name].make().double().eval()
        for parameter in module.parameters():  # nothing is zero, and no two words are alike
            nn.init.normal_(parameter, std=0.6)
    return module


@functools.cache
def _events(name: str) -> dict[tuple[str, str], int]:
    return {event: order for order, event in enumerate(_observe(name))}


@functools.cache
def _sites(name: str) -> tuple[Site, ...]:
    found, met = [], []
    numbers: dict[int, int] = {}
    nodes: list[tuple[int, Any]] = []
    for order, ((path, kind), value) in enumerate(_observe(name).items()):
        tensors = _items(value)
        storages = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
        fresh = kind == "output" and not storages & set(met)
        met += storages
        safe = kind == "output" and type(SPECS[name].build().get_submodule(path)) is not nn.Tanh
        for item, tensor in tensors:
            layout = _layout_of(tensor)
            if layout is not None:
                memory = numbers.setdefault(tensor.untyped_storage().data_ptr(), len(numbers))
                needs_grad = tensor.requires_grad
                made_of = frozenset(m for m, node in nodes if needs_grad and node in ancestors(tensor.grad_fn))
                nodes.append((memory, tensor.grad_fn))
                found.append(
                    Site(path, kind, item, layout, tensor.shape[-1], order, safe, needs_grad, fresh, memory, made_of)
                )
    return tuple(found)


def _observe(name: str) -> dict[tuple[str, str], Any]:
    """The first value of each event of one plain forward, in order."""
    spec, values, handles = SPECS[name], {}, []
    module = spec.build()
    for path, inner in module.named_modules():

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            values.setdefault((path, "input"), args[0] if args else next(iter(kwargs.values()), None))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
            values.setdefault((path, "output"), output)

        handles.append(inner.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(inner.register_forward_hook(after))
    module(*spec.inputs(0, _ROWS, _LENGTH))
    for handle in handles:
        handle.remove()
    return values


def ancestors(node: Any) -> set[Any]:
    """The nodes of autograd's graph that backward comes to from `node`, itself among them."""
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def _items(value: Any) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """The tensors in nested tuples, with their indices; what is in a dictionary is not edited here."""
    if isinstance(value, torch.Tensor):
        return [((), value)]
    if type(value) is tuple:
        return [((i, *item), tensor) for i, inner in enumerate(value) for item, tensor in _items(inner)]
    return []


def _layout_of(tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point():
        return None
    leading = tuple(tensor.shape[:-1])
    shapes = {
        (_ROWS,): ROWS,
        (_ROWS, _LENGTH): SEQ,
        (_LENGTH, _ROWS): TIME,
        (_ROWS * _LENGTH,): FLAT,
        (1, _ROWS): STATES,
    }
    return shapes.get(leading)
