"""Blocks: what runs in a confined process, a job on a skeleton, with the values that the worker shows it."""

from __future__ import annotations

import socket
from typing import Any, cast

import torch
from transformers.modeling_outputs import CausalLMOutput

from .. import errors
from .._core import INPUT, OUTPUT, RESULT, STEP, Visit, tensors_in
from ..errors import EditError, EngineError, NNsightError
from ..modeling import NNsight
from ..sandbox import Allowance, give_up
from ..trace import Given
from ._bridge import check_fits, check_only_input, versions_of
from ._engine import SAMPLES, Engine, guarding
from ._jobs import Job
from ._lane import Lane, LanePass
from ._messages import Reply
from ._served import ServedModel
from ._skeleton import DEVICE
from ._talk import (
    RESULT_PLACE,
    SAMPLES_PLACE,
    STEP_PLACE,
    Begin,
    Fail,
    GoOn,
    Progress,
    Sent,
    Show,
    State,
    Step,
    Told,
    receive_sent,
    write,
)
from ._tracer import LaneTracer

_LEFT_OUT = "\n… more was printed than a confined block may.\n"
_HEAD = "model.lm_head"
SPECIAL: dict[Any, int] = {STEP: STEP_PLACE, SAMPLES: SAMPLES_PLACE, RESULT: RESULT_PLACE}

# What a request may ask of vLLM; the worker takes no other from a confined block.
PARAMETERS = frozenset(
    {
        *("temperature", "max_tokens", "min_tokens", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids"),
        *("ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "logit_bias"),
        *("allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    }
)


class Lanes:
    """Stands for the engine: knows the requests, and computes nothing."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = root
        self.by_key: dict[str, Lane] = {}
        self.width: Any = None  # nothing is computed for all requests at once

    def add(self, lane: Lane) -> None:
        """Expect a lane's request."""
        self.by_key[lane.ask.key] = lane

    def forget(self, lane: Lane) -> None:
        """Let go of a lane."""
        self.by_key.pop(lane.ask.key, None)


class BlockJob(Job):
    """A job that may not ask the engine for everything."""

    def _new_lane(self, given: Given) -> Lane:
        wrong = sorted(set(given.kwargs) - PARAMETERS)
        if wrong:
            raise EngineError(f"{', '.join(wrong)}: a confined block may ask for {', '.join(sorted(PARAMETERS))} only.")
        return super()._new_lane(given)


class SkeletonModel(ServedModel):
    """The model of a worker that is elsewhere."""

    def __init__(self, root: torch.nn.Module, tokenizer: Any, config: Any, threads: int) -> None:
        self.lanes = Lanes(root)
        super().__init__(cast(Engine, self.lanes), lambda: tokenizer)
        self._threads = threads
        self._config = config

    @property
    def device(self) -> torch.device:
        """Where a block has its values."""
        return DEVICE

    def trace(self, *inputs: Any, strict_order: bool = False, **kwargs: Any) -> Any:
        """A trace whose edits, also those as data, act here."""
        given = Given(inputs, {}) if inputs else None
        return LaneTracer(self._tree, given, kwargs, self._edits, strict_order, None)

    generate = trace

    @property
    def config(self) -> Any:
        """The model's configuration."""
        if self._config is None:
            raise EngineError("This model's configuration could not be brought to a confined block.")
        return self._config


def run_block(descriptors: list[int], model: NNsight, allowance: Allowance) -> None:
    """In the forked process: give everything up, then run the job that comes."""
    assert isinstance(model, SkeletonModel)
    torch.set_num_threads(model._threads)  # as many as the worker has: sums are made in the same order
    torch.seed()
    end = socket.socket(fileno=descriptors[0])
    give_up(end, allowance)
    Blocks(end, model).serve()


class Blocks:
    """The blocks of one job."""

    def __init__(self, end: socket.socket, model: SkeletonModel) -> None:
        self._end = end
        self._model = model
        self._lanes = model.lanes
        self._places: list[Any] = list(self._lanes.root.modules())
        self._numbers = {place: number for number, place in enumerate(self._places)} | SPECIAL
        self._paths = {module: f"model.{name}".rstrip(".") for name, module in self._lanes.root.named_modules()}
        self._paths[SAMPLES] = "model.samples"
        self._by_number = {number: place for place, number in self._numbers.items()}
        self._held: dict[tuple[str, Any], Any] = {}  # the values as the blocks left them, at this step
        self._leaving: dict[str, list[torch.Tensor]] = {}  # logits, which the model's own output holds too
        self._told: dict[str, State] = {}
        self._job: BlockJob | None = None
        self._finished = b""
        self._printable = 0

    def serve(self) -> None:
        """Answer the worker until it is gone."""
        while True:
            try:
                sent, tensors = receive_sent(self._end)
            except EOFError:
                return
            told, value = self._answer(sent, tensors)
            told.states = self._changed_states()
            answer, self._finished = self._finished, b""
            self._end.sendall(write(told, [] if value is None else [value], answer))

    def _answer(self, sent: Sent, tensors: list[torch.Tensor]) -> tuple[Told, torch.Tensor | None]:
        told = Told(sent.turn, [])
        match sent.what:
            case Begin(number, frame, printed):
                self._printable = printed
                self._job = BlockJob(cast(Engine, self._lanes), self._model, number, frame)
                self._report(told, self._job.begin())
            case GoOn(progress, results):
                for key, one in progress.items():
                    self._follow(self._lanes.by_key[key], one)
                assert self._job is not None
                self._report(told, self._job.go_on(list(results)))
            case Step(key, progress):
                self._follow(self._lanes.by_key[key], progress)
            case Fail(key, progress, error, text):
                lane = self._lanes.by_key[key]
                self._follow(lane, progress)
                lane.fail(_error(error, text))
            case Show() as show:
                lane = self._lanes.by_key[show.lane]
                at_logits = self._paths[self._by_number[show.place]] in (_HEAD, "model")
                logits = self._leaving.pop(show.lane, None) if at_logits else None
                self._follow(lane, show.progress)
                if logits is not None:
                    self._leaving[show.lane] = logits
                if lane.lives:
                    return told, self._show(lane, show, tensors, told)
        return told, None

    def _report(self, told: Told, found: Reply) -> None:
        told.asks, told.answered, self._finished = found.asks, found.answer is not None, found.answer or b""
        for text in found.printed:
            if self._printable >= 0:
                told.printed.append(text if len(text) <= self._printable else text[: self._printable] + _LEFT_OUT)
            self._printable -= len(text)

    # --- what the model does -------------------------------------------------------------------------------------

    def _follow(self, lane: Lane, progress: Progress) -> None:
        """Let the pass of a lane know what was called."""
        if not lane.lives:
            return
        lane.leave(self._leaving.pop(lane.ask.key, ()), f"{_HEAD}.output")
        main = lane.main
        self._count(main, progress.before)
        if progress.steps:
            self._held = {known: value for known, value in self._held.items() if known[0] != lane.ask.key}
            main.running[:] = [self._by_number[number] for number in progress.stood]
            main.step += progress.steps - 1
            with lane.visiting():
                main._begin_step()
            if not lane.lives:
                return
        self._count(main, progress.since)
        main.running[:] = [self._by_number[number] for number in progress.running]

    def _count(self, main: LanePass, calls: dict[int, int]) -> None:
        for number, count in calls.items():
            place = self._by_number[number]
            main.counts[place] = main.counts.get(place, 0) + count

    # --- values --------------------------------------------------------------------------------------------------

    def _show(self, lane: Lane, show: Show, tensors: list[torch.Tensor], told: Told) -> torch.Tensor | None:
        place, result = self._by_number[show.place], None
        if show.held is None:
            value = _formed(show.form, tensors.pop(0) if tensors else None)
        else:
            value = _reformed(show.form, self._held[lane.ask.key, self._by_number[show.held]])
        with guarding(lane):
            if show.records:
                self._record(lane.main, show.kind, place, value)
            else:
                result = self._visit(lane, show, place, value, tensors, told)
        if not lane.lives:
            told.outcome, result = "", None
        return result

    def _record(self, main: LanePass, kind: str, place: Any, value: Any) -> None:
        index = main.counts[place] - 1
        if kind == INPUT:
            for recorder in main.input_recorders.get(place, ()):
                recorder.begin(value[0], value[1], index)
        else:
            for recorder in main.recorders.get(place, ()):
                recorder.end(value, (), {}, index, main.step)

    def _visit(
        self, lane: Lane, show: Show, place: Any, shown: Any, call: list[torch.Tensor], told: Told
    ) -> torch.Tensor | None:
        main, path = lane.main, self._paths[place]
        before = versions_of(shown)
        lane.leave(call, f"{path}.input")
        with lane.visiting():
            if place is SAMPLES:
                value = main.touch(SAMPLES, shown)
                written, skipped = value is not shown, None
            else:
                inputs = None if show.kind == INPUT else (tuple(call), {})
                visit: Visit = main._visit(place, show.kind, shown, main.counts[place] - 1, inputs)
                value, written, skipped = visit.value, visit.written, visit.skipped
        if skipped is not None:
            main._pass_by_inside(place)
            told.outcome = "skipped"
            self._held[lane.ask.key, place] = skipped[0]
            return _tensor(skipped[0], path)
        if not lane.lives:
            return None
        self._held[lane.ask.key, place] = value
        changed = any(tensor._version != version for tensor, version in before)
        result, logits = None, show.form == "causal" or (path == _HEAD and show.kind == OUTPUT)
        if written or changed:
            told.outcome = "written" if written else "changed"
            result = _fitted(value, shown, show.form, path, logits)
        if logits:
            self._leaving[lane.ask.key] = tensors_in(getattr(value, "logits", value))
        elif place is not SAMPLES:
            lane.leave([tensor for tensor, _ in before], f"{path}.{show.kind}")
        return result

    # --- what the blocks wait for --------------------------------------------------------------------------------

    def _changed_states(self) -> list[State]:
        states = {key: self._state(lane) for key, lane in self._lanes.by_key.items() if lane._main is not None}
        changed = [state for key, state in states.items() if self._told.get(key) != state]
        self._told = states
        return changed

    def _state(self, lane: Lane) -> State:
        main = lane.main
        if main.done:
            return State(lane.ask.key, True, [], [], [], [])
        kinds = (main.wanted_inputs, main.wanted_outputs, main.recorders, main.input_recorders)
        return State(lane.ask.key, False, *(sorted(self._numbers[place] for place in kind) for kind in kinds))


def _formed(form: str, tensor: torch.Tensor | None) -> Any:
    if form == "inputs":
        return (() if tensor is None else (tensor,)), {}
    return CausalLMOutput(logits=tensor) if form == "causal" else tensor


def _reformed(form: str, value: Any) -> Any:
    """A value that a block left at one place, as it is shown at another."""
    if form == "causal":
        return CausalLMOutput(logits=getattr(value, "logits", value))
    if form == "value" and isinstance(value, tuple):
        return check_only_input(value, "")
    return value


def _fitted(value: Any, shown: Any, form: str, path: str, logits: bool) -> torch.Tensor:
    """What a block left at a place, as the tensor that the worker takes there."""
    if form == "inputs":
        expected = check_only_input(shown, path)
        value = check_only_input(value, path)
        return _as(check_fits(expected.shape, value, path), expected)
    if form == "causal":
        value, shown = getattr(value, "logits", value), shown.logits
    if shown is None:
        raise EditError(f"{path}.output is no tensor, and can be read only.")
    if path == "model.samples" and isinstance(value, torch.Tensor) and value.numel() == shown.numel():
        value = value.reshape(shown.shape)
    if logits and isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1]:
        return _as(check_fits((1, value.shape[1], shown.shape[2]), value, path), shown)  # the last position counts
    return _as(check_fits(shown.shape, value, path), shown)


def _as(value: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    return value.detach().as_subclass(torch.Tensor).to(shown.dtype)


def _tensor(value: Any, path: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise EditError(f"{path} takes a tensor here, not a {type(value).__name__}.")
    return value.detach().as_subclass(torch.Tensor)


def _error(name: str, text: str) -> NNsightError:
    kind = getattr(errors, name, EngineError)
    return kind(text) if issubclass(kind, NNsightError) else EngineError(text)
