"""The variables of one frame, as cells that the blocks of a trace share."""

import ctypes
import dis
import sys
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from ._block import Block

SCOPE = ".scope"  # the parameter of a block's function that says which scope it runs in
OPTIMIZED = 0x1  # the flag of code whose local variables are not in a dictionary


class Scope:
    """The variables of a frame for all blocks taken from it.

    A block of a module uses the module's globals themselves. For any other frame there is a cell per
    variable, filled from the frame when it is first asked for; `write_back` takes values the other way. The
    frame of a block's own function has the variables of the scope that the block runs in.
    """

    def __init__(self, frame: FrameType) -> None:
        self.globals: dict[str, Any] = frame.f_globals
        self._frame: FrameType | None = None
        self._outer: Scope | None = None
        self._cells: dict[str, CellType] = {}
        self._known: frozenset[str] | None = frozenset()  # None: each name that is bound is a variable
        if _is_block(frame.f_code):
            self._outer = frame.f_locals[SCOPE]
        elif frame.f_code.co_flags & OPTIMIZED:
            self._frame, self._known = frame, _variables(frame.f_code)
        elif frame.f_locals is not frame.f_globals:
            self._frame, self._known = frame, None

    @classmethod
    def of(cls, globals_: dict[str, Any], names: Iterable[str], values: Mapping[str, Any]) -> "Scope":
        """A scope without a frame: global names, and variables of which some have a value."""
        scope = object.__new__(cls)
        scope.globals, scope._frame, scope._outer = globals_, None, None
        scope._cells = {name: _cell(values, name) for name in names}
        scope._known = frozenset(scope._cells)
        return scope

    def variables(self, block: Block) -> frozenset[str]:
        """Those of the block's names that have cells here; the others are global or built in."""
        names = (block.names_read | block.names_bound) - block.names_global
        own = names.intersection(self._cells)
        if self._outer is not None:
            return own | self._outer.variables(block)
        if self._known is not None:
            return names & self._known
        return own | names.intersection(block.names_bound) | names.intersection(self._locals())

    def cell(self, name: str) -> CellType:
        """The cell of a variable."""
        if name not in self._cells:
            if self._outer is not None:
                return self._outer.cell(name)
            self._cells[name] = self._shared_cell(name) or _cell(self._locals(), name)
        return self._cells[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value that blocks see for a name, or `default` where it is not bound."""
        if self._is_variable(name):
            return _value(self.cell(name), default)
        return self.globals.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """Give a name the value that blocks are to see."""
        if self._is_variable(name):
            self.cell(name).cell_contents = value
        else:
            self.globals[name] = value

    def fork(self, block: Block, shared: Collection[str] = ()) -> "Scope":
        """A scope for one block, whose names have cells of their own, with the values of this moment.

        A block that runs later, or by turns with others, then has the loop variables and the like of the
        place where it was written. Names in `shared` stay common. Its `write_back` writes to this scope too.
        """
        fork = object.__new__(Scope)
        fork.globals, fork._frame, fork._outer = self.globals, None, self
        fork._cells, fork._known = {}, frozenset()
        for name in (block.names_read | block.names_bound).difference(shared, block.names_global):
            value = self._now(name)
            if self._root()._can_have(name) and (value is not NOTHING or name in block.names_bound):
                fork._cells[name] = CellType() if value is NOTHING else CellType(value)
        return fork

    def share(self, name: str, other: "Scope") -> None:
        """Use the very cell that another scope has for a name."""
        self._cells[name] = other.cell(name)

    def detach(self) -> None:
        """Let go of the frame, and keep the variables."""
        self._known, self._frame, self._outer = frozenset(self._cells), None, None

    def refresh(self) -> None:
        """Take the values that the frame has now."""
        if self._frame is not None:
            present = self._locals()
            for name, cell in self._cells.items():
                _fill(cell, present.get(name, NOTHING))

    def write_back(self, names: Iterable[str]) -> None:
        """Bind these names in the frame as they are bound here; those that are not bound here are unbound.

        From Python 3.12 on, a local variable of a function cannot be unbound from outside: it keeps its
        value.
        """
        values = {name: _value(self._cells[name], NOTHING) for name in names if name in self._cells}
        if self._frame is not None:
            _write(self._frame, values)
        elif self._outer is not None:
            for name, value in values.items():
                self._outer._put(name, value)
            self._outer.write_back(values)

    def close(self) -> None:
        """Let go of the frame and the cells."""
        frame, self._frame = self._frame, None
        self._cells, self._outer = {}, None
        if frame is not None:
            _forget_locals(frame)

    def _root(self) -> "Scope":
        return self if self._outer is None else self._outer._root()

    def _is_variable(self, name: str) -> bool:
        if name in self._cells:
            return True
        if self._outer is not None:
            return self._outer._is_variable(name)
        return name in (self._locals() if self._known is None else self._known)

    def _can_have(self, name: str) -> bool:
        """Whether a fork may have a cell for the name: not for the globals that a function uses."""
        return not self._known or name in self._known

    def _now(self, name: str) -> Any:
        if self._frame is not None:
            return self._locals().get(name, NOTHING)
        return self.get(name, NOTHING)

    def _put(self, name: str, value: Any) -> None:
        if self._is_variable(name) or self._known is None:
            _fill(self.cell(name), value)
        else:
            _update(self.globals, {name: value})

    def _locals(self) -> Mapping[str, Any]:
        if self._frame is None:
            return {}
        values, code = self._frame.f_locals, self._frame.f_code
        if code.co_flags & OPTIMIZED or not code.co_freevars or self._frame.f_back is None:
            return values
        outer = self._frame.f_back.f_locals  # a class body runs where it stands; it shows free variables nowhere
        return {**{name: outer[name] for name in code.co_freevars if name in outer}, **values}

    def _shared_cell(self, name: str) -> CellType | None:
        """The frame's own cell of a variable that it shares with a function among its values."""
        frame = self._frame
        if frame is None or name not in frame.f_code.co_cellvars + frame.f_code.co_freevars:
            return None
        for value in list(frame.f_locals.values()):
            if isinstance(value, FunctionType) and name in value.__code__.co_freevars:
                cell = (value.__closure__ or ())[value.__code__.co_freevars.index(name)]
                if _is_of(cell, frame, name):
                    return cell
        return None


NOTHING = object()


def _is_block(code: CodeType) -> bool:
    return code.co_argcount > 0 and code.co_varnames[0] == SCOPE


def _variables(code: CodeType) -> frozenset[str]:
    names = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    if names & set(code.co_names):  # from 3.12 on, variables of comprehensions are listed too
        names -= {item.argval for item in dis.get_instructions(code) if item.opname.endswith("_GLOBAL")}
    return frozenset(names)


def _cell(values: Mapping[str, Any], name: str) -> CellType:
    return CellType(values[name]) if name in values else CellType()


def _value(cell: CellType, default: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return default


def _fill(cell: CellType, value: Any) -> None:
    if value is not NOTHING:
        cell.cell_contents = value
    elif _value(cell, NOTHING) is not NOTHING:
        del cell.cell_contents


def _update(target: MutableMapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not NOTHING:
            target[name] = value
        elif name in target:
            del target[name]


def _is_of(cell: CellType, frame: FrameType, name: str) -> bool:
    """Whether a cell is the one that the frame uses, and not that of another call of the same function."""
    before = _value(cell, NOTHING)
    if before is NOTHING or before is not frame.f_locals.get(name, NOTHING):
        return False
    mark = object()
    _write(frame, {name: mark})
    is_of = _value(cell, None) is mark
    _write(frame, {name: before})
    return is_of


def _writable(code: CodeType, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values less the unbound ones that the frame cannot have.

    From 3.12 on, the compiler relies on what it knows of local variables, and CPython refuses to unbind them.
    """
    if sys.version_info < (3, 12) or not code.co_flags & OPTIMIZED:
        return values
    shared = () if sys.version_info >= (3, 13) else (*code.co_cellvars, *code.co_freevars)
    return {name: value for name, value in values.items() if value is not NOTHING or name in shared}


if sys.version_info >= (3, 13):

    def _write(frame: FrameType, values: Mapping[str, Any]) -> None:
        _update(frame.f_locals, _writable(frame.f_code, values))

    def _forget_locals(frame: FrameType) -> None:
        """Nothing to do: reading `f_locals` made no copies."""

else:
    _locals_to_fast = ctypes.pythonapi.PyFrame_LocalsToFast
    _locals_to_fast.argtypes = (ctypes.py_object, ctypes.c_int)
    _locals_to_fast.restype = None

    def _write(frame: FrameType, values: Mapping[str, Any]) -> None:
        _update(frame.f_locals, _writable(frame.f_code, values))
        _locals_to_fast(frame, 1)

    def _forget_locals(frame: FrameType) -> None:
        """Empty the copies that reading `f_locals` left in the frame, unless someone else holds them."""
        if frame.f_code.co_flags & OPTIMIZED:
            values = frame.f_locals
            if sys.getrefcount(values) <= 3:  # the frame, the name, the argument
                values.clear()
