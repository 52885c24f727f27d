"""Edits: what the blocks of a run changed and were given, so that a second pass can repeat the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import EditError, NNsightError, OutOfOrderError
from ._frames import Line, describe_line, user_line
from ._leaves import leaves_of, objects_in
from ._tensors import Snapshot, has_changed, holds_others, snapshot, tensors_in

if TYPE_CHECKING:
    from ._call import Call
    from ._instrument import Instruments
    from ._visit import Visit


Versions = dict[str, tuple[int, int]]  # which tensor, in which version


class Edit(NamedTuple):
    """What was done at one visit, and the versions the tensors had then.

    `changed` is the model's own value where it was changed in place: whatever else of the model holds its tensors has
    the change too.  `value` is what was put in its place, or with `skipped`, what stands for the call.
    """

    changed: Any
    value: Any
    replaced: bool
    skipped: bool
    versions: Snapshot


class LateRead(NamedTuple):
    """A tensor that a second pass gave: changing it in place would change nothing in the model."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    path: str
    line: str

    def has_changed(self) -> bool:
        tensor = self.tensor()
        return tensor is not None and tensor._version != self.version

    def error(self) -> NNsightError:
        return OutOfOrderError(
            f"Value was missed: {self.path} had already passed when it was read at {self.line}, so changing "
            "it in place changes nothing in the model. Move that line up to where the model reaches it, "
            "or work on a copy: value.clone()."
        )


class Copied(LateRead):
    """A tensor made from a value of the model, in memory of its own."""

    def error(self) -> NNsightError:
        return EditError(
            f"{self.path}, read at {self.line}, is a copy of the model's value, so changing it in place changes "
            f"nothing in the model. Assign the changed value instead ({self.path} = ...), or work on value.clone()."
        )


class Passed(LateRead):
    """Rows of a batch that do not lie together in memory, after the model has gone on."""

    def error(self) -> NNsightError:
        return OutOfOrderError(
            f"Value was missed: {self.path} is a copy of this invoke's rows, which do not lie together in memory, and it "
            "was changed in place after the model had gone on from there, so that nothing in the model changed. Move the "
            "change up to where the value is read, or work on value.clone()."
        )


class Edits:
    """A record of one run, by place, kind and occurrence."""

    def __init__(self) -> None:
        self.by_visit: dict[tuple[Any, str, int], Edit] = {}
        self.random_state: torch.Tensor | None = None
        self.late_reads: list[LateRead] = []
        self.keeping = False
        self._fresh: list[torch.Tensor] = []  # tensors given since the last check, which may have been dropped
        self._untracked = self._tangled = False
        self._objects: list[tuple[Any, dict[str, torch.Tensor], Versions]] = []  # given since the model went on last
        self._inputs: Snapshot = []
        self._instruments: Instruments | None = None
        self._parameter_versions = 0
        self._reads: list[tuple[weakref.ref[torch.Tensor], int, str]] = []
        self._lines: list[tuple[CodeType, int, str]] = []

    def begin(self, call: Call) -> None:
        """Remember the state the forward starts from."""
        self.keeping = call.repeatable
        if call.repeatable:
            self.random_state = torch.default_generator.get_state()
            inputs = snapshot((call.args, call.kwargs))
            self._untracked = inputs is None
            self._inputs = inputs or []

    def note_parameters(self, instruments: Instruments) -> None:
        """Remember the state of the parameters, before a block can change them."""
        self._instruments = instruments
        self._parameter_versions = instruments.parameter_versions()

    def give(self, visit: Visit, value: Any, path: str) -> None:
        """A block is given `value` at `visit`."""
        if type(value) is torch.Tensor and visit.lent is None and not value.is_inference():
            visit.lent = (value, value._version, path)
            return
        self._note_objects(value)
        versions = snapshot(value)
        if versions is None:
            self._untracked = True
        elif visit.given is None:
            visit.given = [(value, versions, path)]
        else:
            visit.given.append((value, versions, path))

    def leave(self, visit: Visit) -> None:
        """The model goes on from `visit`: record what was done to the value."""
        changed = visit.written
        exchanged = False  # an item of a list or mapping was
        touched: list[torch.Tensor] = []
        if visit.lent is not None:
            tensor, version, path = visit.lent
            now = tensor._version
            if now != version:
                changed = True
                touched.append(tensor)
            self._reads.append((weakref.ref(tensor), now, path))
            visit.lent = None
        for value, versions, path in visit.given or ():
            for tensor, version in versions:
                now = tensor._version
                if now != version:
                    changed = True
                    touched.append(tensor)
                self._reads.append((weakref.ref(tensor), now, path))
            if type(value) is not torch.Tensor and holds_others(value, versions):
                exchanged = True
        visit.given = None
        if self._objects:
            self._check_objects()
        if (changed or exchanged) and self.keeping:
            self._record(visit, touched, visit.written or exchanged)

    def _note_objects(self, value: Any) -> None:
        for found in objects_in(value):
            leaves = leaves_of(found)
            if leaves:
                self._objects.append((found, leaves, _versions(leaves)))

    def _check_objects(self) -> None:
        # What a block changed inside a cache or the like is not repeated by a second pass.
        self._tangled |= any(_versions(leaves_of(found)) != before for found, _, before in self._objects)
        self._objects.clear()

    def _record(self, visit: Visit, touched: list[torch.Tensor], replaced: bool) -> None:
        if visit.written and not touched and type(visit.value) is torch.Tensor and not visit.value.is_inference():
            edit = Edit(None, visit.value, True, visit.skipped is not None, [(visit.value, visit.value._version)])
            self.by_visit[visit.place, visit.kind, visit.index] = edit
            return
        own = visit.before if visit.written and visit.skipped is None else visit.value
        value = None
        if replaced:
            value = visit.value if visit.skipped is None else visit.skipped[0]
        changed = own if touched and _shares(touched, tensors_in(own)) else None
        versions = snapshot((changed, value))
        if versions is None:
            self._untracked = True
            return
        if touched:
            scoped = (visit.scoped or {}).get(visit.kind)
            known = [*tensors_in(own), *tensors_in(value), *(scoped.sources() if scoped is not None else ())]
            self._tangled |= not all(_shares([tensor], known) for tensor in touched)
        edit = Edit(changed, value, replaced, visit.skipped is not None, versions)
        self.by_visit[visit.place, visit.kind, visit.index] = edit

    def note_write(self, path: str, frame: FrameType | None) -> None:
        """Remember which line assigned to `path`, for the error that may follow from it."""
        if frame is not None:
            self._lines.append((frame.f_code, frame.f_lasti, path))

    def annotate(self, error: BaseException) -> None:
        """Add to an error of the model which edits preceded it."""
        if self._lines and hasattr(error, "add_note"):
            latest = "; ".join(f"{_line_of(code, at)} assigned {path}" for code, at, path in self._lines[-3:])
            error.add_note(f"Before this error, your trace edited the model: {latest}.")  # pyright: ignore[reportAttributeAccessIssue]

    def obstacle(self) -> str | None:
        """Why a second pass could not repeat the first exactly, or None."""
        if not self.keeping:
            return "a generation is not run a second time, and each place comes by once a step"
        if self._untracked:
            return "under inference mode PyTorch does not record which values were changed"
        if self._tangled:
            return "a value was changed beside the one at its place, or inside an object"
        if any(tensor._version != version for tensor, version in self._inputs):
            return "an input tensor was changed in place since the forward started"
        if self._instruments and self._instruments.parameter_versions() != self._parameter_versions:
            return "a parameter of the model was changed since the forward started"
        for edit in self.by_visit.values():
            if has_changed((edit.changed, edit.value), edit.versions):
                return "an edited value was changed in place since"
        for reference, version, path in self._reads:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                return f"the value read at {path} was changed in place since"
        return None

    def note_late_read(self, path: str, value: Any) -> None:
        """Remember a value that a second pass served."""
        line = describe_line(user_line())
        tensors = [tensor for tensor in tensors_in(value) if not tensor.is_inference()]
        self.late_reads += [LateRead(weakref.ref(tensor), tensor._version, path, line) for tensor in tensors]
        self._fresh += tensors

    def note_copy(self, path: str, shown: Any, value: Any) -> None:
        """Remember tensors in `shown`, made from `value`, that do not share its memory."""
        shared = {tensor.untyped_storage()._cdata for tensor in tensors_in(value)}
        copies = [tensor for tensor in tensors_in(shown) if tensor.untyped_storage()._cdata not in shared]
        line = describe_line(user_line()) if copies else ""
        self.late_reads += [
            Copied(weakref.ref(tensor), tensor._version, path, line) for tensor in copies if not tensor.is_inference()
        ]
        self._fresh += copies

    def note_passed(self, copies: Iterable[tuple[torch.Tensor, str]]) -> None:
        """Remember copies that blocks were given of a value that the model leaves now."""
        known = [(tensor, path) for tensor, path in copies if not tensor.is_inference()]
        self.late_reads += [Passed(weakref.ref(tensor), tensor._version, path, "") for tensor, path in known]

    def check_late_reads(self) -> None:
        """Refuse in-place changes of values whose place had passed: they reach nothing."""
        for read in self.late_reads:
            if read.has_changed():
                self.late_reads.clear()
                raise read.error()
        self._fresh.clear()
        self.late_reads = [read for read in self.late_reads if read.tensor() is not None]

    def clear(self) -> None:
        """Let go of every value."""
        self.by_visit.clear()
        self.late_reads.clear()
        self._fresh.clear()
        self._objects.clear()
        self._inputs = []
        self._reads.clear()


def _line_of(code: CodeType, offset: int) -> str:
    number = next((line for start, end, line in code.co_lines() if start <= offset < end), None)
    return describe_line(Line(code.co_filename, number or code.co_firstlineno))


def _versions(leaves: dict[str, torch.Tensor]) -> Versions:
    return {at: (id(leaf), 0 if leaf.is_inference() else leaf._version) for at, leaf in leaves.items()}


def _shares(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether any of `tensors` is one of `others`, or a view of the same memory."""
    memory = {other.untyped_storage()._cdata for other in others}
    return any(tensor.untyped_storage()._cdata in memory for tensor in tensors)
