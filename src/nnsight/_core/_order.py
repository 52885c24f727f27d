"""What to say, and to do, when a request comes after its place has passed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..errors import NeverRanError, OrderError, OutOfOrderError, OutOfOrderWarning
from ._frames import describe_line, user_frame, user_line
from ._visit import Place, Request

if TYPE_CHECKING:
    from ._run import Run
    from ._worker import Worker


def explain_late(run: Run, worker: Worker, request: Request, write: bool) -> OrderError | None:
    """The error for a late request, or None where a second pass may serve it."""
    if _never_runs(run, request):
        return _never_ran(run, request)
    if worker.waited:
        names = ", ".join(repr(name) for name in worker.waited[-3:])
        return _out_of_order(run, request, f"It had passed while {worker.label} waited for {names}.")
    if write:
        return _out_of_order(run, request, "It cannot be changed any more.")
    if run.strict:
        return _out_of_order(run, request, "Strict order is on, so no second pass serves it.")
    obstacle = run.edits.obstacle()
    if obstacle is not None:
        return _out_of_order(run, request, f"A second pass could not serve it: {obstacle}.")
    return None


def warn_late(run: Run, request: Request) -> None:
    """Say once a trace which line made a second pass necessary."""
    frame = user_frame()
    if frame is None:
        return
    message = (
        f"{_name(request)} was asked for at {describe_line(user_line())} after {_whereabouts(run)}: a second forward "
        "pass serves it. Reading in the order the model runs (move this line up) saves that pass."
    )
    warnings.warn_explicit(
        message, OutOfOrderWarning, frame.f_code.co_filename, frame.f_lineno, module=frame.f_globals.get("__name__")
    )


def never_ran(run: Run, request: Request) -> NeverRanError:
    """The error for a place that a whole forward did not reach."""
    return _never_ran(run, request)


def _never_runs(run: Run, request: Request) -> bool:
    main, profile = run.main, run.instruments.profile
    if main is None or main.counts.get(request.place):
        return False
    if isinstance(request.place, Module):
        return profile is not None and not profile.get(request.place)
    return main.done


def _never_ran(run: Run, request: Request) -> NeverRanError:
    which = "" if request.step is None else f" in step {request.step}"
    times = f" {request.call + 1} times" if request.call else ""
    return NeverRanError(
        f"{_name(request)} was asked for at {describe_line(user_line())}, but it does not run{times}{which} in this "
        "forward pass: the model never calls it with these inputs and settings. Print the model, or "
        "`.source` of the module around it, to see what is called."
    )


def _out_of_order(run: Run, request: Request, reason: str) -> OutOfOrderError:
    return OutOfOrderError(
        f"Value was missed: {_name(request)} was asked for at {describe_line(user_line())}, after "
        f"{_whereabouts(run)}. {reason} Move that line up, before the line that waits for what runs later."
    )


def _name(request: Request) -> str:
    if isinstance(request.place, Place):
        return request.path
    return f"{request.path}.{request.kind}"


def _whereabouts(run: Run) -> str:
    main = run.main
    if main is None or main.done:
        return "the forward pass had ended"
    step = f" in step {main.step}" if main.step > 0 else ""
    if main.here is not None:
        return f"the model had reached {path_of(run, main.here.place)}.{main.here.kind}{step}"
    if main.running:
        return f"the model had gone on inside {path_of(run, main.running[-1])}{step}"
    return f"the model had gone on{step}"


def path_of(run: Run, place: Any) -> str:
    """The path of a place, for messages."""
    if isinstance(place, Module):
        names = [name for name, module in run.instruments.root.named_modules() if module is place]
        return f"model.{names[0]}".rstrip(".") if names else type(place).__name__
    return str(place)
