"""NNsight: any PyTorch module, wrapped so that it can be traced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch.nn import Module

from .. import _patches
from .._core import Call, Probe
from ..envoy import Envoy, Tree
from ..errors import InputError, NoInputError
from ..trace import Edit, Editing, Given, Prepared, Tracer, save
from ._batch import join_inputs, select_rows


class NNsight(Envoy):
    """Wraps a module; the module itself is used as it stands and is never changed.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 10), torch.nn.Linear(10, 2))
        >>> model = NNsight(net)
        >>> with model.trace(torch.rand(1, 5)):
        ...     hidden = model[0].output.save()
        ...     output = model.output.save()
        >>> hidden.shape, output.shape
        (torch.Size([1, 10]), torch.Size([1, 2]))

    Args:
        module: Any `torch.nn.Module`.

    Raises:
        InputError: `module` is something else.
    """

    def __init__(self, module: Module) -> None:
        if not isinstance(module, Module):
            raise InputError(f"NNsight wraps a torch.nn.Module, not a {type(module).__name__}.")
        _patches.mount(save)
        super().__init__(module, "model", Tree(module))
        self._edits: list[Edit] = []

    @property
    def _model(self) -> Module:
        return self._module

    @overload
    def trace(self, *inputs: Any, trace: Literal[True] = True, strict_order: bool = False, **kwargs: Any) -> Tracer: ...
    @overload
    def trace(self, *inputs: Any, trace: Literal[False], strict_order: bool = False, **kwargs: Any) -> Any: ...
    def trace(self, *inputs: Any, trace: bool = True, strict_order: bool = False, **kwargs: Any) -> Any:
        """Run the model once, with a block that reads and changes what happens inside.

        Example:
            >>> with model.trace(x):                      # doctest: +SKIP
            ...     model.layer1.output[:] = 0
            ...     logits = model.output.save()

        Args:
            *inputs: What the model is called with.
            trace: False calls the model plainly and returns its result.
            strict_order: Make reading a place that has passed an error; otherwise a second forward pass serves it.
            **kwargs: Keyword arguments of the forward.

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` what the model returns.

        Raises:
            NoInputError: Neither here nor in an invoke was the model given an input.
        """
        given = Given(inputs, {}) if inputs or self._gives_input(kwargs) else None
        if not trace:
            return self._prepare([given] if given else [], kwargs).call()
        return Tracer(
            self._tree,
            lambda givens: self._prepare(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
        )

    def _gives_input(self, kwargs: dict[str, Any]) -> bool:
        """Whether the keyword arguments of a trace are themselves an input."""
        return bool(kwargs)

    def _prepare(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        if not givens:
            raise NoInputError(NO_INPUT)
        args, named, sizes = join_inputs(givens)
        call = Call(
            self._module, args, {**named, **kwargs}, repeatable=True, probe=self._probe(args, {**named, **kwargs}, sizes)
        )
        return Prepared(call, sizes)

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sequence[int]) -> Probe | None:
        """Forwards on rows 0 and 1 of two different inputs, from which layouts are learnt."""
        if len(sizes) < 2:
            return None
        return lambda rows: Call(
            self._module, *select_rows((args, kwargs), rows, [0, sizes[0]], sum(sizes)), repeatable=False
        )

    # --- edits -----------------------------------------------------------------------------------------------

    def edit(self, *, inplace: bool = False) -> Editing:
        """Store a block that runs in every later trace, at every step of a generation.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))
            >>> x = torch.ones(1, 3)
            >>> def zeroed(model):
            ...     with model.edit() as edited:
            ...         model[0].output[:] = 0
            ...     return edited

        Args:
            inplace: Edit this model; otherwise the `as` name becomes a second model that shares the weights.

        Returns:
            A context whose `as` value is the edited model.
        """
        edited = self if inplace else self._copy()
        return Editing(edited, edited._edits.append)

    def clear_edits(self) -> None:
        """Drop every stored edit of this model; other models that share its weights keep theirs."""
        self._edits.clear()

    def _copy(self) -> NNsight:
        twin = copy.copy(self)
        twin._edits = list(self._edits)
        twin._children, twin._indexed = {}, {}
        return twin


NO_INPUT = """\
Cannot run the model: it was given no input. Give it one in either place:

    with model.trace(input):
        ...

    with model.trace() as tracer:
        with tracer.invoke(input):
            ...
"""
