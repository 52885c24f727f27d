"""What to say, and to do, when a request comes after its place has passed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ..errors import NeverRanError, OrderError, OutOfOrderError, OutOfOrderWarning
from ._frames import describe_line, user_frame, user_line
from ._visit import OperationPlace, Place, Request

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
        unseen = _unseen(run, request)
        reason = f"{unseen} makes it visible." if unseen else "It cannot be changed any more."
        return _out_of_order(run, request, reason)
    if run.strict:
        return _out_of_order(run, request, "Strict order is on, so no second pass serves it.")
    obstacle = run.edits.obstacle()
    if obstacle is not None:
        unseen = _unseen(run, request)
        reason = f"A second pass could not serve it: {obstacle}."
        return _out_of_order(run, request, f"{reason} {unseen} makes it visible." if unseen else reason)
    return None


def warn_late(run: Run, request: Request) -> None:
    """Say once a trace which line made a second pass necessary."""
    frame = user_frame()
    if frame is None:
        return
    advice = _unseen(run, request) or "Reading in the order the model runs (move this line up)"
    message = (
        f"{_name(request)} was asked for at {describe_line(user_line())} after {_whereabouts(run)}: a second forward "
        f"pass serves it. {advice} saves that pass."
    )
    warnings.warn_explicit(
        message, OutOfOrderWarning, frame.f_code.co_filename, frame.f_lineno, module=frame.f_globals.get("__name__")
    )


def never_ran(run: Run, request: Request) -> NeverRanError:
    """The error for a place that a whole forward did not reach."""
    return _never_ran(run, request)


def _never_runs(run: Run, request: Request) -> bool:
    main, profile = run.main, run.instruments.profile
    if main is None:
        return False
    if main.sight is not None and main.sight.was_skipped(request):
        return True
    if _is_past_the_end(run, request):
        return True
    if isinstance(request.place, OperationPlace):
        return main.see().never_comes(request)
    if main.counts.get(request.place):
        return False
    if isinstance(request.place, Module):
        shown = run.overrides and run.instruments.parent(request.place) in run.overrides
        return profile is not None and not profile.get(request.place) and not shown
    return main.done


def _is_past_the_end(run: Run, request: Request) -> bool:
    return run.main is not None and run.main.done and request.step is not None and request.step > run.main.step


def _unseen(run: Run, request: Request) -> str:
    """What to write where an operation was not seen because its function was running when it was asked for."""
    place, main = request.place, run.main
    if main is None or not isinstance(place, OperationPlace) or place.shown or not main.see().is_late(request):
        return ""
    source = request.path.rpartition(".")[0]
    return f"Naming {source} before {path_of(run, place.module)} starts (at the top of the block)"


def _never_ran(run: Run, request: Request) -> NeverRanError:
    which = "" if request.step is None else f" in step {request.step}"
    times = f" {request.call + 1} times" if request.call else ""
    if run.main is not None and run.main.sight is not None and run.main.sight.was_skipped(request):
        return NeverRanError(
            f"{_name(request)} was asked for at {describe_line(user_line())}, but it does not run{which}: it is inside a "
            "module that is skipped. Read it in another trace, or assign to the outer module's .output in place of .skip()."
        )
    if _is_past_the_end(run, request):
        return NeverRanError(
            f"{_name(request)} was asked for at {describe_line(user_line())} in step {request.step}, but the model has run "
            f"{run.main.step + 1} steps only, counted from 0. Ask inside `for step in tracer.iter[:]:`, which ends when the "  # type: ignore[union-attr]
            "generation does."
        )
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
    if isinstance(request.place, Place) and getattr(request.place, "shown", True):
        return request.path
    return f"{request.path}.{request.kind}"


def _whereabouts(run: Run) -> str:
    main = run.main
    if main is None or main.done:
        return "the forward pass had ended"
    step = f" in step {main.step}" if main.step > 0 else ""
    if main.here is not None:
        here = main.here
        kind = f".{here.kind}" if not getattr(here.place, "shown", here.place.__class__ is Place) else ""
        return f"the model had reached {path_of(run, here.place)}{kind}{step}"
    if main.running:
        return f"the model had gone on inside {path_of(run, main.running[-1])}{step}"
    return f"the model had gone on{step}"


def path_of(run: Run, place: Any) -> str:
    """The path of a place, for messages."""
    if isinstance(place, Module):
        names = [name for name, module in run.instruments.root.named_modules() if module is place]
        return f"model.{names[0]}".rstrip(".") if names else type(place).__name__
    if isinstance(place, OperationPlace) and not place.shown:
        return f"{path_of(run, place.owner)}.source.{place.name}"
    return str(place)
