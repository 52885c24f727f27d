"""Named: the vocabulary as attributes of a model."""

from __future__ import annotations

import functools
from typing import Any

from torch.nn import Module

from ..envoy import Envoy
from ..errors import EditError
from ._hooks import find_hook, is_hook
from ._site import Site, find_site
from ._terms import IN_LAYERS, IN_MLP, MODULES
from ._vocabulary import Vocabulary, knows_family


class Name:
    """An attribute that the vocabulary gives, unless the model has one of that name itself."""

    def __init__(self, text: str, *, assignable: bool = False) -> None:
        self.__doc__ = text
        self._assignable = assignable
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        name = self._name
        if _is_own(model, name) or not knows_family(model._tree):
            return model._child(name) or model._renamed(name) or model._of_module(name)
        return getattr(model.names, name)

    def __set__(self, model: Any, value: Any) -> None:
        if not self._assignable or _is_own(model, self._name):
            raise EditError(f"model.{self._name} cannot be assigned; its values can: model.{self._name}[3] = v")
        setattr(model.names, self._name, value)


def _is_own(model: Any, name: str) -> bool:
    module: Module = model._module
    if name in module._modules or name in module.__dict__ or _has(type(module), name):
        return True
    aliases = model._tree.aliases
    return aliases is not None and aliases.find(module._modules, name, True) is not None


@functools.cache
def _has(kind: type, name: str) -> bool:
    return hasattr(kind, name)


def find_named(envoy: Envoy, name: str) -> Envoy | None:
    """What a name of the vocabulary (`attn`, `router`) stands for below an envoy, None where it is none."""
    tree = envoy._tree
    at_root = envoy._module is tree.root
    if name not in (MODULES if at_root else (*IN_LAYERS, *IN_MLP)) or not knows_family(tree):
        return None
    if tree.vocabulary is None:
        tree.vocabulary = Vocabulary(tree)
    if at_root:
        return getattr(tree.vocabulary.of(envoy), name)
    return tree.vocabulary.find(envoy, name)


class Named(Envoy):
    """A model whose layers, stream, heads and neurons have the same names in every architecture.

    See `docs/names.md` for all names, their shapes, and the families.
    """

    layers = Name("The blocks, as envoys: `model.layers[3].attn`, `.mlp`.")
    embed = Name("The embedding of tokens, an envoy.")
    unembed = Name("The projection to the vocabulary, an envoy.")
    final_norm = Name("The norm behind the last layer, an envoy.")
    resid_pre = Name("The residual stream that enters each layer `[batch, pos, d_model]`.")
    resid_mid = Name("The residual stream between attention and MLP `[batch, pos, d_model]`.")
    resid_post = Name("The residual stream that leaves each layer `[batch, pos, d_model]`.")
    attn_out = Name("What each attention adds to the stream `[batch, pos, d_model]`.")
    mixer_out = Name("What each state-space mixer adds to the stream `[batch, pos, d_model]`.")
    cross_out = Name("What each attention to an encoder adds to the stream `[batch, pos, d_model]`.")
    mlp_out = Name("What each MLP adds to the stream `[batch, pos, d_model]`.")
    neurons = Name("What goes into each MLP's last projection `[batch, pos, d_mlp]`.")
    heads = Name("The attention heads of each layer: `model.heads[3].z`.")
    cross_heads = Name("The heads of each layer's attention to an encoder.")
    logits = Name("The model's logits `[batch, pos, vocab]`.", assignable=True)

    @property
    def names(self) -> Vocabulary:
        """The vocabulary itself, for names that the model's own attributes, or `rename`, take.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace("The capital of France is"):
            ...     stream = model.names.resid_post[5].save()
            >>> stream.shape
            torch.Size([1, 5, 128])

        Raises:
            NamesError: The family of this model is unknown.
        """
        tree = self._tree
        found = tree.vocabulary
        if found is None:
            found = tree.vocabulary = Vocabulary(tree)
        return found.of(self)

    def site(self, name: str, layer: int | None = None, *, stack: str | None = None) -> Site:
        """A value of the vocabulary as an object, which can be named, sorted, read and written.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> site = model.site("head_z", 3)
            >>> site.axes
            ('batch', 'pos', 'head', 'd_head')
            >>> with model.trace("The Eiffel Tower is in"):
            ...     z = site.read().save()
            ...     site.write(z * 2)

        Args:
            name: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `neurons`, `head_q`, `head_k`, `head_v`,
                `head_q_rot`, `head_k_rot`, `head_pattern`, `head_z`, `head_result`, `mixer_out`, `cross_out`,
                `cross_head_q`, …, `embed`, `final_norm`, `logits`.
            layer: Which layer, counted from the last one where negative; none for the last three.
            stack: `"encoder"` or `"decoder"` where there are two.

        Raises:
            NamesError: The model has no such value.
        """
        return find_site(self.names, name, layer, stack)

    def get(self, path: str) -> Any:
        """The submodule at a dotted path, or the value that TransformerLens calls by a hook's name.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> model.get("transformer.h.3.attn").path
            'model.transformer.h.3.attn'
            >>> model.get("blocks.3.hook_resid_pre")
            Site('resid_pre', 3)

        Args:
            path: A path, with or without the leading `model.`, or the name of a hook.

        Returns:
            An envoy, or a `Site`.

        Raises:
            UnknownPathError: There is no such module; the message names the nearest.
            NamesError: The hook's value is none that this model has.
        """
        return find_hook(self.names, path) if is_hook(path) else super().get(path)
