"""NNsight: any PyTorch module, wrapped so that it can be traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, overload
from weakref import WeakSet

from torch import Tensor
from torch.nn import Module

from .. import _patches
from .._core import Call, Override, Probe
from ..envoy import Aliases, Classes, Envoy, Tree
from ..errors import InputError, NoInputError
from ..names import Name, Named, find_named
from ..trace import IN_A_TRACE, Edit, Editing, Given, InterventionEdit, Prepared, ScanTracer, Session, Tracer, save
from ._apply import Applied, Intervention, edit_of
from ._batch import join_inputs
from ._elsewhere import open_elsewhere
from ._offload import without_offload
from ._probe import choose_rows, select_rows
from ._steer import Steered, steer

Kind = TypeVar("Kind", bound="NNsight")


class NNsight(Named):
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
        rename: Other names for modules, beside their own. A dotted key is a path from the root, and its new name is
            found at the root: with `{"transformer.h": "layers", "attn": "attention"}`, `model.layers[3].attention` is
            `model.transformer.h[3].attn`.
        envoys: Classes of your own to stand for modules, subclasses of `Envoy`, by class of module, name or path:
            `{torch.nn.Linear: MyEnvoy, "attn": MyAttention, "transformer.h.0": MyBlock}`. A path goes before a name, a
            name before a class. See `View` for values of your own.

    Raises:
        InputError: `module` is something else, or a new name or a class cannot be used.
        UnknownPathError: `rename` or `envoys` names no module of this model.
    """

    def __init__(
        self,
        module: Module,
        *,
        rename: Mapping[str, str] | None = None,
        envoys: Mapping[type[Module] | str, type[Envoy]] | None = None,
    ) -> None:
        if not isinstance(module, Module):
            raise InputError(f"NNsight wraps a torch.nn.Module, not a {type(module).__name__}.")
        _patches.mount(save, IN_A_TRACE)
        tree = Tree(module)
        tree.find_named = find_named
        super().__init__(module, "model", tree)
        if envoys:
            tree.classes = Classes(module, envoys, Envoy)
        if rename:
            kinds = {type(self), Envoy, *(envoys or {}).values()}
            taken = {name for kind in kinds for name in dir(kind) if not isinstance(vars(Named).get(name), Name)}
            tree.aliases = Aliases(module, rename, taken)
        self._edits: list[Edit | InterventionEdit] = []
        self._twins: WeakSet[NNsight] = WeakSet([self])  # the models that share these modules
        self._rename = dict(rename) if rename else None

    dispatched = True  # whether the weights are loaded
    _engine = ""  # what computes it where it is served: transformers, or what is named here
    _is_served = False  # a server's own: what asks to run elsewhere has arrived there

    @property
    def _model(self) -> Module:
        return self._module

    @overload
    def trace(
        self,
        *inputs: Any,
        trace: Literal[True] = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Tracer: ...
    @overload
    def trace(self, *inputs: Any, trace: Literal[False], strict_order: bool = False, **kwargs: Any) -> Any: ...
    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        strict_order: bool = False,
        stop_after_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model once, with a block that reads and changes what happens inside.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
            >>> with model.trace(torch.ones(1, 3)):
            ...     model[0].output[:] = 0
            ...     output = model.output.save()

        Args:
            *inputs: What the model is called with.
            trace: False calls the model plainly and returns its result.
            strict_order: Make reading a place that has passed an error; otherwise a second forward pass serves it.
            stop_after_last: End the forward once the block's last request was served: what comes after is not run. The
                blocks of all invokes are waited for, and the modules named in `tracer.cache(modules=...)`; stored edits count
                up to there. A request for the result (`tracer.result`, `model.output`) is one for the whole forward.
            **kwargs: Keyword arguments of the forward; `remote=True`, `timeout=` (seconds), `blocking=False`, `solo=True` (in
                no forward that other jobs share) and `backend="local-process"` run the block elsewhere.

        Returns:
            A `Tracer` to use in a `with` statement, or with `trace=False` what the model returns.

        Raises:
            NoInputError: Neither here nor in an invoke was the model given an input.
        """
        elsewhere = open_elsewhere(self, "trace", inputs, kwargs, strict_order, stop_after_last)
        if elsewhere is not None:
            return elsewhere
        given = self._take_given(inputs, kwargs)
        if not trace:
            check_block(stop_after_last)
            return self._prepare([given] if given else [], kwargs).call()
        return Tracer(
            self._tree,
            lambda givens: self._prepare(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
            stop_after_last=stop_after_last,
        )

    def scan(self, *inputs: Any, strict_order: bool = False, stop_after_last: bool = False, **kwargs: Any) -> Any:
        """Trace shapes and dtypes only: nothing is computed, and weights need not be there.

        Values inside the block, and after it, are fake tensors, which know their shape, strides, dtype and
        device (a model that is not loaded counts as on the CPU); shapes are real.  Edits of a wrong shape fail as
        they would in `trace`.  What the block makes itself (`torch.ones(3)`) is real until it meets a fake one.
        The model is left as it was, and not loaded.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10), torch.nn.Linear(10, 2)))
            >>> with model.scan(torch.rand(1, 5)):
            ...     width = model[0].output.shape[-1]
            >>> width
            10

        Args:
            *inputs: As for `trace`.
            strict_order: As for `trace`.
            stop_after_last: As for `trace`.
            **kwargs: As for `trace`.

        Returns:
            A `Tracer` to use in a `with` statement.

        Raises:
            NoInputError: The model was given no input.
            ScanError: A shape depends on values; the message names the module.
        """
        elsewhere = open_elsewhere(self, "scan", inputs, kwargs, strict_order, stop_after_last)
        if elsewhere is not None:
            return elsewhere
        given = self._take_given(inputs, kwargs)
        tracer = ScanTracer(
            self._tree,
            lambda givens: self._prepare(givens, kwargs),
            given,
            edits=self._edits,
            strict_order=strict_order,
            stop_after_last=stop_after_last,
        )
        return tracer.with_overrides(self._scan_overrides())

    def _scan_overrides(self) -> dict[Module, Override]:
        """Forwards to use in a scan in place of those that cannot run without values."""
        return without_offload(self._module)

    def session(self, **options: Any) -> Any:
        """Group traces that belong together; values of one are ordinary variables in the next.

        With `remote=True` the whole block runs on the server, as one job.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.session() as session:
            ...     with model.trace("Hello"):
            ...         hidden = model.transformer.h[0].output[0].save()
            ...     with model.trace("World"):
            ...         model.transformer.h[0].output[0][:] = hidden

        Args:
            **options: `remote=True`, and with it `timeout=`, `blocking=` and `backend=`, as for `trace`.

        Returns:
            A context for a `with` statement.
        """
        elsewhere = open_elsewhere(self, "session", (), options)
        if options:
            raise InputError(f"model.session() takes no {', '.join(options)}.")
        return Session(self._tree) if elsewhere is None else elsewhere

    def _take_given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        """The input of the trace itself; what belongs to it is taken out of `kwargs`."""
        return Given(inputs, {}) if inputs or kwargs else None

    def _prepare(self, givens: list[Given], kwargs: dict[str, Any]) -> Prepared:
        if not givens:
            raise NoInputError(NO_INPUT)
        args, named, sizes = join_inputs(givens)
        call = Call(
            self._module,
            args,
            {**named, **kwargs},
            repeatable=True,
            probe=self._probe(args, {**named, **kwargs}, sizes),
        )
        return Prepared(call, sizes)

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sequence[int]) -> Probe | None:
        """Forwards on four different rows of the batch, from which layouts are learnt."""
        if len(sizes) < 2:
            return None
        places = choose_rows(sizes)

        def make(rows: list[int]) -> Call:
            chosen = select_rows((args, kwargs), [places[row] for row in rows], sum(sizes))
            return Call(self._module, *chosen, repeatable=False)

        return Probe(make)

    # --- edits -----------------------------------------------------------------------------------------------

    @overload
    def edit(self, intervention: None = None, *, inplace: bool = False) -> Editing: ...
    @overload
    def edit(self: Kind, intervention: Intervention, *, inplace: bool = False) -> Kind: ...
    def edit(self: Kind, intervention: Intervention | None = None, *, inplace: bool = False) -> Editing | Kind:
        """Store a block, or an intervention, that runs in every later trace, at every step of a generation.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))
            >>> with model.edit() as edited:
            ...     model[0].output[:] = 0
            >>> with edited.trace(torch.ones(1, 3)):
            ...     hidden = edited[0].output.save()
            >>> bool((hidden == 0).all())
            True

        Args:
            intervention: An intervention as data, such as `nnsight.experiments.InterventionSpec`; without it, the block of
                the `with` statement is stored.
            inplace: Edit this model; otherwise the `as` name becomes a second model that shares the weights.

        Returns:
            A context whose `as` value is the edited model; with an intervention, the edited model itself.
        """
        edited = self if inplace else self._copy()
        if intervention is not None:
            edited._edits.append(edit_of(self, intervention))
            return edited
        return Editing(edited, edited._edits.append)

    def apply(self, intervention: Intervention | Callable[[Module], None]) -> Any:
        """Put an intervention in force for the traces and generations inside a `with` statement.

        A function is applied to every submodule instead, as by `torch.nn.Module.apply`.

        Example:
            >>> from nnsight import LanguageModel
            >>> from nnsight.experiments import Intervention, InterventionSpec
            >>> model = LanguageModel("nnsight/landmarks")
            >>> spec = InterventionSpec(Intervention("mlp_out[3]", "zero"))
            >>> with model.apply(spec), model.trace("The Eiffel Tower is in"):
            ...     silent = model.mlp_out[3].save()
            >>> bool((silent == 0).all())
            True

        Args:
            intervention: An intervention as data, such as `nnsight.experiments.InterventionSpec`.

        Returns:
            A context whose `as` value is this model.

        Raises:
            InputError: The intervention does not fit this model, or a trace is open already.
        """
        if not hasattr(intervention, "prepare"):
            return self._bind(self._module.apply)(intervention)
        return Applied(self, [edit_of(self, cast("Intervention", intervention))], self._edits)

    def steer(
        self,
        vector: Tensor,
        layer: int,
        *,
        site: str = "resid_post",
        strength: float = 1.0,
        inplace: bool = False,
    ) -> Steered:
        """Add a vector at every position, in every trace and at every step of a generation (Turner et al. 2023).

        In a `with` statement this model is steered. `.model` of what is returned is a second model that shares the weights
        and stays steered.

        Example:
            >>> from nnsight import LanguageModel
            >>> from nnsight.experiments import steering_vector
            >>> model = LanguageModel("nnsight/landmarks")
            >>> paris, rome = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
            >>> vector = steering_vector(model, [rome], [paris], layer=8)
            >>> with model.steer(vector, 8):
            ...     with model.trace(paris):
            ...         logits = model.logits.save()
            >>> model.tokenizer.decode(logits[0, -1].argmax())
            ' Rome'

        Args:
            vector: In the shape of the value at one position: `[d_model]` for `resid_post`, `[head, d_head]` for `head_z`.
            layer: At which layer, from the last one where negative.
            site: The value of the vocabulary that it is added to.
            strength: How many times it is added.
            inplace: Steer this model until `clear_edits()`, without a `with` statement.

        Returns:
            A context whose `as` value is this model.

        Raises:
            InputError: The vector is none that can be added there.
            NamesError: The model has no such value.
        """
        return steer(self, vector, layer, site, strength, inplace)

    def clear_edits(self) -> None:
        """Drop every stored edit of this model; other models that share its weights keep theirs.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3)))
            >>> with model.edit(inplace=True):
            ...     model[0].output[:] = 0
            >>> model.clear_edits()
            >>> with model.trace(torch.ones(1, 3)):
            ...     output = model.output.save()
            >>> bool(output.any())
            True
        """
        self._edits.clear()

    def _copy(self: Kind) -> Kind:
        twin = copy.copy(self)
        twin._edits = list(self._edits)
        twin._children, twin._indexed = {}, {}
        self._twins.add(twin)
        return twin

    def _take(self, module: Module) -> None:
        """Use a loaded module in place of its empty shape, in all models that share it."""
        for twin in list(self._twins):
            twin._rebind(module)
            twin.dispatched = True
        self._tree.rebind(module)


def check_block(stop_after_last: bool) -> None:
    """Refuse what is about a block's requests where there is no block."""
    if stop_after_last:
        raise InputError("stop_after_last=True is about what a block asks for: leave it out with trace=False.")


NO_INPUT = """\
Cannot run the model: it was given no input. Give it one in either place:

    with model.trace(input):
        ...

    with model.trace() as tracer:
        with tracer.invoke(input):
            ...
"""
