"""NNsight: any PyTorch module, wrapped so that it can be traced."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch.nn import Module

from .. import _patches
from .._core import Call
from ..envoy import Envoy, Tree
from ..errors import InputError, NoInputError
from ..trace import Tracer, save


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
        if not trace:
            return self._prepare_call(inputs, kwargs)()
        return Tracer(self._tree, lambda: self._prepare_call(inputs, kwargs), strict_order=strict_order)

    def _prepare_call(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if not inputs and not kwargs:
            raise NoInputError(NO_INPUT)
        args, kwargs = self._prepare_inputs(inputs, kwargs)
        return Call(self._module, args, kwargs, repeatable=True)

    def _prepare_inputs(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the forward gets for these inputs; a subclass may tokenise, batch, or move them."""
        return inputs, kwargs


NO_INPUT = """\
Cannot run the model: it was given no input. Give it one in either place:

    with model.trace(input):
        ...

    with model.trace() as tracer:
        with tracer.invoke(input):
            ...
"""
