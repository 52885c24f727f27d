"""Served: a worker's model as blocks see it, with the names of the Hugging Face model and the standard vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from .._core import OUTPUT, StillInstruments
from ..errors import EditError, NamesError
from ..modeling import NNsight, open_elsewhere, show_block_output, take_block_output
from ..trace import Given
from ._compiled import compile_edits
from ._engine import SAMPLES, Engine
from ._tracer import LaneTracer

# Class of vLLM's -> list of layers, and in each: attention, MLP, the norm between them; and around: embedding, last norm.
_LLAMA = ("model.layers", "self_attn", "mlp", "post_attention_layernorm", "model.embed_tokens", "model.norm")
FAMILIES = {
    "GPT2LMHeadModel": ("transformer.h", "attn", "mlp", "ln_2", "transformer.wte", "transformer.ln_f"),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "MixtralForCausalLM": (*_LLAMA[:2], "block_sparse_moe", *_LLAMA[3:]),
}


_IN_LAYERS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class Values:
    """A value of each layer: `model.resid_post[3]`, read and assigned."""

    def __init__(self, layers: Any, part: str, kind: str) -> None:
        self._layers = layers
        self._part = part
        self._kind = kind

    def _envoy(self, layer: int) -> Any:
        envoy = self._layers[layer]
        return getattr(envoy, self._part) if self._part else envoy

    def __len__(self) -> int:
        return len(self._layers)

    def place(self, layer: int) -> tuple[Module, str] | None:
        """The module and the kind, where this can be changed."""
        return None if self._part and self._kind == "input" else (self._envoy(layer)._module, self._kind)

    def __getitem__(self, layer: int) -> torch.Tensor:
        value = getattr(self._envoy(layer), self._kind)
        is_plain = self._kind == "input" or type(value) is torch.Tensor  # else a block's: [0] is its hidden states
        return value if is_plain else value[0]

    def __setitem__(self, layer: int, value: torch.Tensor) -> None:
        if self._part and self._kind == "input":
            raise EditError("resid_mid can be read on vLLM, not changed: change attn_out, which goes into it.")
        setattr(self._envoy(layer), self._kind, value)


class Site(NamedTuple):
    """One value of the vocabulary, as interventions as data name it."""

    name: str
    layer: int | None
    values: Any
    stack: str = ""
    axes: tuple[str, ...] = ("batch", "pos", "d_model")

    def place(self) -> tuple[Module, str] | None:
        """The module and the kind, where this is a value of all tokens that can be exchanged."""
        return None if self.name == "logits" else self.values.place(self.layer)

    def read(self) -> torch.Tensor:
        """The value, in a trace."""
        return self.values.read() if self.layer is None else self.values[self.layer]

    def write(self, value: torch.Tensor) -> None:
        """Put a value in its place, in a trace."""
        if self.layer is None:
            self.values.write(value)
        else:
            self.values[self.layer] = value


class Once:
    """A value that a model has once."""

    def __init__(self, envoy: Any) -> None:
        self._envoy = envoy

    def read(self) -> torch.Tensor:
        """What the module returns."""
        return self._envoy.output

    def write(self, value: torch.Tensor) -> None:
        """Put a value in its place."""
        self._envoy.output = value

    def place(self, _layer: None) -> tuple[Module, str]:
        """The module and the kind."""
        return self._envoy._module, OUTPUT


class Logits(torch.Tensor):
    """Logits `[1, pos, vocab]` that also answer `.output`, as those of a module do."""

    _put: Callable[[Any], None]

    @property
    def output(self) -> torch.Tensor:
        """The logits themselves."""
        return self.as_subclass(torch.Tensor)

    @output.setter
    def output(self, value: Any) -> None:
        self._put(value)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class ServedModel(NNsight):
    """The model of one worker; each input of a trace is a request of the engine."""

    def __init__(self, engine: Engine, load_tokenizer: Callable[[], Any]) -> None:
        super().__init__(engine.root)
        self._width = engine.width
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None
        tree = self._tree
        tree.instruments = StillInstruments(engine.root)
        tree.plain_tensors = False
        tree.hides_operations = (
            "On vLLM the operations inside a forward are those of all requests, and of kernels: read the modules' values, "
            "or use LanguageModel."
        )
        tree.present = self._present
        tree.accept = self._accept
        self._shown = {m for name, m in engine.root.named_modules() if self._is_block(name)}
        self._is_served = True

    def _is_block(self, name: str) -> bool:
        layers, attention = self._family()[:2]
        parts = name.removeprefix(f"{layers}.").split(".") if name.startswith(f"{layers}.") else []
        return bool(parts) and parts[1:] in ([], [attention])

    def _family(self) -> tuple[str, ...]:
        return FAMILIES.get(type(self._module).__name__, _LLAMA)

    def _present(self, module: Module, value: Any, write: Callable[[Any], None]) -> Any:
        return show_block_output(value, write) if module in self._shown else value

    def _accept(self, module: Module, current: Any, assigned: Any) -> Any:
        return take_block_output(current, assigned) if module in self._shown else assigned

    @property
    def tokenizer(self) -> Any:
        """The engine's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    # --- names ---------------------------------------------------------------------------------------------------

    def _part(self, number: int) -> Any:
        kind = type(self._module).__name__
        if kind not in FAMILIES:
            raise NamesError(
                f"The standard names are not known for vLLM's {kind}, only for {', '.join(FAMILIES)}: use its modules' own."
            )
        name = FAMILIES[kind][number]
        return name if 0 < number < 4 else self.get(name)

    layers = property(lambda self: self._part(0))
    embed = property(lambda self: self._part(4))
    final_norm = property(lambda self: self._part(5))
    unembed = property(lambda self: self.lm_head)
    resid_pre = property(lambda self: Values(self.layers, "", "input"))
    resid_mid = property(lambda self: Values(self.layers, self._part(3), "input"))
    resid_post = property(lambda self: Values(self.layers, "", "output"))
    attn_out = property(lambda self: Values(self.layers, self._part(1), "output"))
    mlp_out = property(lambda self: Values(self.layers, self._part(2), "output"))

    def site(self, name: str, layer: int | None = None, *, stack: str | None = None) -> Any:
        """A value of the vocabulary as an object.

        Raises:
            NamesError: There is none of that name or layer here.
        """
        if name in ("embed", "final_norm", "logits") and layer is None:
            return Site(name, None, Once(self.lm_head if name == "logits" else getattr(self, name)))
        if name not in _IN_LAYERS or stack:
            return self.names
        if layer is None or not -len(self.layers) <= layer < len(self.layers):
            raise NamesError(f"{name} is a value of each of {len(self.layers)} layers; there is no layer {layer}.")
        return Site(name, layer % len(self.layers), getattr(self, name))

    @property
    def names(self) -> Any:
        """Not served here: one by one, the values that this class has."""
        raise NamesError(
            "On vLLM there are resid_pre, resid_mid, resid_post, attn_out, mlp_out, layers, embed, unembed, final_norm and "
            "logits; heads and neurons are inside vLLM's kernels. LanguageModel has them all."
        )

    heads = neurons = cross_heads = cross_out = mixer_out = property(lambda self: self.names)

    @property
    def logits(self) -> Any:
        """The logits `[1, pos, vocab]` of the tokens of this step; the last one is sampled from."""
        shown = self.lm_head.output.as_subclass(Logits)
        shown._put = lambda value: setattr(self.lm_head, "output", value)
        return shown

    @logits.setter
    def logits(self, value: Any) -> None:
        self.lm_head.output = value

    @property
    def samples(self) -> torch.Tensor:
        """The sampled token `[1]` of this step."""
        worker = self._tree.worker("model.samples", OUTPUT)
        return worker.run.read(worker, SAMPLES, OUTPUT, "model.samples")[1]

    @samples.setter
    def samples(self, value: torch.Tensor) -> None:
        worker = self._tree.worker("model.samples", OUTPUT)
        visit = worker.run.reach(worker, SAMPLES, OUTPUT, "model.samples", write=True)
        worker.run.change(worker, visit, value, "model.samples")

    # --- traces --------------------------------------------------------------------------------------------------

    def trace(self, *inputs: Any, strict_order: bool = False, **kwargs: Any) -> Any:
        """A trace whose inputs are requests of the engine."""
        open_elsewhere(self, "trace", inputs, kwargs)  # takes out what has brought it here
        given = Given(inputs, {}) if inputs else None
        spec = compile_edits(self._edits, self._place_of, self._width)
        return LaneTracer(self._tree, given, kwargs, self._edits, strict_order, spec)

    def _place_of(self, target: Any, kind: str) -> tuple[Module, str] | None:
        """The module and the kind of a value `[pos, d_model]` that can be changed in all requests at once."""
        if isinstance(target, Site):
            return target.place()
        if type(self._module).__name__ not in FAMILIES:
            return None
        module = getattr(target, "_module", None)
        for name in (*_IN_LAYERS, "embed", "final_norm"):
            for layer in range(len(self.layers)) if name in _IN_LAYERS else (None,):
                place = self.site(name, layer).place()
                if place == (module, kind):
                    return place
        return None

    generate = trace
