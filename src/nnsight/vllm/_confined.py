"""Confined jobs: blocks in a process of their own, which is shown what the model comes by and is not believed anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch
from torch.nn import Module
from transformers.modeling_outputs import CausalLMOutput

from .._core import INPUT, OUTPUT, RESULT, STEP
from ..errors import EditError, EngineError, NNsightError, ProtocolError
from ..protocol import write_frame
from ..sandbox import describe_failure
from ._blocks import PARAMETERS, SPECIAL
from ._engine import SAMPLES, Engine
from ._lane import Lane
from ._messages import Ask, Reply
from ._runners import LIED, DiedError, Limits, Runner, Runners
from ._skeleton import describe
from ._talk import Begin, Fail, GoOn, Progress, Show, State, Step, Told
from ._zygote import Setup

if TYPE_CHECKING:
    from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]

_NOTE = 100  # characters that say that some were left out


def runners_for(engine: Engine, config: VllmConfig, limits: Limits) -> Runners:
    """What makes the processes of confined blocks for a worker; started."""
    model = config.model_config
    if config.parallel_config.world_size > 1:
        raise EngineError(
            "Confined blocks are for engines of one worker: tensor_parallel_size= other than 1 is refused."
        )
    modules = describe(engine.root)
    known = model.hf_config.to_dict() if hasattr(model.hf_config, "to_dict") else None
    setup = Setup(
        modules, model.tokenizer, model.tokenizer_revision, bool(model.trust_remote_code), None, torch.get_num_threads()
    )
    try:
        data = msgspec.json.encode(msgspec.structs.replace(setup, config=known))
    except TypeError:  # a configuration with more than plain values
        data = msgspec.json.encode(setup)
    runners = Runners(data, limits)
    runners.start()
    return runners


class ConfinedJob:
    """A job whose block runs in a confined process; begun, gone on with and closed like any other."""

    def __init__(self, engine: Engine, runners: Runners, number: str, frame: bytes) -> None:
        self.engine = engine
        self.limits = runners.limits
        self.places: list[Any] = list(engine.root.modules())
        self.numbers: dict[Any, int] = {place: number for number, place in enumerate(self.places)} | SPECIAL
        self._runners = runners
        self._runner: Runner | None = None
        self._number = number
        self._frame = frame
        self._lanes: list[ConfinedLane] = []
        self._by_key: dict[str, ConfinedLane] = {}
        self._count = self._printed = 0
        self._failure: bytes | None = None

    @property
    def lives(self) -> bool:
        """Whether its process does."""
        return self._runner is not None

    def begin(self) -> Reply:
        """Run the block until it needs requests, or ends."""
        try:
            self._runner = self._runners.take()
        except EngineError as error:
            self._end(error)
        return self._report(self.ask(Begin(self._number, self._frame, self.limits.printed)))

    def go_on(self, results: list[Any]) -> Reply:
        """The requests are over, each with `[prompt, tokens]` or a text that says why not."""
        lanes, self._lanes = self._lanes, []
        progress = {lane.ask.key: lane.main.progress() for lane in lanes if lane.lives}
        for lane in lanes:
            self.engine.forget(lane)
        given = [result if isinstance(result, str) else (list(result[0]), list(result[1])) for result in results]
        return self._report(self.ask(GoOn(progress, given)))

    def close(self) -> None:
        """End it, wherever it stands."""
        for lane in self._lanes:
            self.engine.forget(lane)
        self._lanes = []
        if self._runner is not None:
            self._let_go()

    def _let_go(self) -> None:
        runner, self._runner = self._runner, None
        assert runner is not None
        self._runners.end(runner)
        with suppress(EngineError):  # the next job starts it again, or says why not
            self._runners.prepare()

    # --- what it says to its process, and is told ----------------------------------------------------------------

    def ask(self, what: Begin | GoOn | Step | Show | Fail, tensors: Sequence[torch.Tensor] = (), most: int = 0) -> Any:
        """The reply to a message, with its value; None once the process has ended, which ends the job."""
        if self._runner is None:
            return None
        try:
            told, value = self._runner.ask(what, tensors, most)
            if isinstance(what, (Begin, GoOn)):
                self._take_asks(told)
                self._printed += sum(map(len, told.printed))
                if self._printed > self.limits.printed + _NOTE:
                    raise ProtocolError("it prints more than it may")
            elif told.asks or told.answered or told.printed:
                raise DiedError("The process of a confined block answered before its time, and was ended.")
            for state in told.states:
                self._lane(state.lane).main.take(state)
            return told, value
        except ProtocolError as error:
            self.disbelieve(str(error))
        except DiedError as error:
            self._end(error)
        return None

    def disbelieve(self, text: str) -> None:
        """The process has said what it cannot mean."""
        self._end(DiedError(LIED.format(what=text)))

    def _end(self, error: NNsightError) -> None:
        self._failure = write_frame(describe_failure(EngineError(str(error)), lambda _: False))
        if self._runner is not None:
            self._let_go()

    def _lane(self, key: str) -> ConfinedLane:
        if key not in self._by_key:
            raise ProtocolError("it tells of a request that is not its own")
        return self._by_key[key]

    def _take_asks(self, told: Told) -> None:
        for ask in told.asks:
            self._count += 1
            self._check(ask)
            lane = ConfinedLane(self, ask)
            self._by_key[ask.key] = lane
            self._lanes.append(lane)
            self.engine.add(lane)

    def _check(self, ask: Ask) -> None:
        if not ask.key.startswith(f"{self._number}:") or ask.key in self._by_key or len(ask.key) > 100:
            raise ProtocolError("a request has another's key")
        if self._count > self.limits.requests:
            raise DiedError(f"A confined block asked for more than {self.limits.requests} requests, and was ended.")
        prompt = ask.prompt
        of_one_kind = isinstance(prompt, list) and prompt and len({type(one) for one in prompt}) == 1
        if not (isinstance(prompt, str) or (of_one_kind and type(prompt[0]) in (int, dict))):
            raise ProtocolError("a prompt is a text, token ids or chat messages")
        if not ask.attended or ask.salt or ask.by_length:
            raise ProtocolError("a request would share the tokens of others")
        if not set(ask.params) <= PARAMETERS:
            raise ProtocolError("a request has a parameter that a block may not set")

    def _report(self, reply: Any) -> Reply:
        if reply is None:
            return Reply([], self._failure, [])
        told: Told = reply[0]
        return Reply(told.asks, reply[1] if told.answered else None, told.printed)


class ConfinedLane(Lane):
    """One request of a confined job, as the engine sees it."""

    def __init__(self, job: ConfinedJob, ask: Ask) -> None:
        super().__init__(ask, lambda _: None, lambda: None)
        self.job = job
        self._stand_in = StandIn(self)

    @property
    def lives(self) -> bool:
        return self.job.lives and not self._stand_in.done

    @property
    def main(self) -> Any:
        return self._stand_in

    def fail(self, error: NNsightError) -> None:
        if self.lives:
            progress, self._stand_in.done = self._stand_in.progress(), True
            self.job.ask(Fail(self.ask.key, progress, type(error).__name__, str(error)))


class Seen:
    """A visit as the engine sees it."""

    def __init__(self, value: Any, *, written: bool = False, skipped: tuple[Any] | None = None) -> None:
        self.value = value
        self.written = written
        self.skipped = skipped


class StandIn:
    """Stands for the pass of a block that is elsewhere: notes what is called, and shows what is wanted."""

    def __init__(self, lane: ConfinedLane) -> None:
        self.done = True  # until the block has begun
        self.step = -1
        self.counts: Counter[Any] = Counter()  # calls since the last message, or since the last step began
        self.running: list[Any] = []
        self.wanted_inputs: frozenset[Any] = frozenset()
        self.wanted_outputs: frozenset[Any] = frozenset()
        self.recorders: dict[Any, list[_Recorder]] = {}
        self.input_recorders: dict[Any, list[_Recorder]] = {}
        self._lane = lane
        self._begun = False
        self._before: Counter[Any] = Counter()
        self._steps = 0
        self._stood: list[Any] = []
        self._left: dict[int, torch.Tensor] = {}  # by place: what the block left there, at this step
        self._places: dict[int, int] = {}  # of these tensors, by their id

    # --- what the engine does ------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self.step += 1
        self._steps += 1
        self._before.update(self.counts)
        self.counts.clear()
        self._stood = list(self.running)
        self._left.clear()
        self._places.clear()
        if self.wanted_inputs or self.wanted_outputs - {RESULT}:
            self._lane.job.ask(Step(self._lane.ask.key, self.progress()))

    def _pass_by_inside(self, _module: Module) -> None:
        """The process has counted the calls that are skipped."""

    def progress(self) -> Progress:
        """How the model went on since the last message."""
        numbers = self._lane.job.numbers
        counted = [{numbers[place]: n for place, n in calls.items()} for calls in (self._before, self.counts)]
        stood, running = ([numbers[place] for place in places] for places in (self._stood, self.running))
        found = Progress(counted[0], self._steps, stood, counted[1], running)
        self._before.clear()
        self.counts.clear()
        self._steps = 0
        return found

    def touch(self, place: Any, shown: torch.Tensor) -> torch.Tensor:
        """The sampled token, as the block leaves it."""
        return self._visit(place, OUTPUT, shown, 0).value

    def _visit(self, place: Any, kind: str, shown: Any, _index: int, inputs: Any = None) -> Seen:
        """Show the block a value, and take what it makes of it."""
        tensor, form = _taken(shown, kind)
        call = [*inputs[0]] if inputs else []
        most = max(_bytes(tensor), self._lane.job.limits.value if kind == INPUT else 0)
        reply = self._show(place, kind, tensor, form, call, most)
        if reply is None:
            return Seen(shown)
        told, value = reply
        if told.outcome == "skipped" and value is not None:
            return self._skipped(place, kind, tensor, value, shown)
        if value is not None:
            problem = _problem(told.outcome, value, tensor, self._is_last(place))
            if problem is not None:
                self._lane.job.disbelieve(problem)
                return Seen(shown)
            assert tensor is not None
            self._check_whole_numbers(place, value)
            if told.outcome == "changed":
                tensor.copy_(value)
                value = None
            else:
                value = value.to(tensor.device)
        left = tensor if value is None else value
        if left is not None:
            self._leave(place, left)
        return Seen(shown) if value is None else Seen(_formed(form, value), written=True)

    def _skipped(self, place: Any, kind: str, tensor: torch.Tensor | None, value: torch.Tensor, shown: Any) -> Seen:
        if kind != INPUT or not isinstance(place, Module):
            self._lane.job.disbelieve("it skips what is over")
            return Seen(shown)
        value = value.to(tensor.device) if tensor is not None else value
        self._leave(place, value)
        return Seen(shown, written=True, skipped=(value,))

    def _is_last(self, place: Any) -> bool:
        root = self._lane.job.engine.root
        return place is root or place is root.lm_head

    def _check_whole_numbers(self, place: Any, value: torch.Tensor) -> None:
        """Whole numbers are looked up with: one too great would end the engine."""
        if value.is_floating_point() or not value.numel():
            return
        sizes = self._lane.job.engine.runner.model_config.get_vocab_size()
        most = sizes if place is SAMPLES else getattr(place, "num_embeddings", None)
        name = "model.samples" if place is SAMPLES else f"The input of {type(place).__name__}"
        if most is None:
            raise EditError(f"{name} has whole numbers, which a confined block can change at embeddings only.")
        if value.dtype is torch.bool or not 0 <= int(value.min()) <= int(value.max()) < most:
            raise EditError(f"{name} takes whole numbers from 0 to {most - 1}.")

    def record(self, place: Any, kind: str, value: Any) -> None:
        """Show a value to the block's caches."""
        tensor, form = _taken(value, kind)
        self._show(place, kind, tensor, form, [], 0, records=True)

    def _show(
        self,
        place: Any,
        kind: Any,
        tensor: torch.Tensor | None,
        form: Any,
        call: list[torch.Tensor],
        most: int,
        *,
        records: bool = False,
    ) -> tuple[Told, torch.Tensor | None] | None:
        lane, number = self._lane, self._lane.job.numbers[place]
        held = self._places.get(id(tensor)) if tensor is not None else None
        sent = [] if held is not None or tensor is None else [tensor]
        show = Show(lane.ask.key, self.progress(), number, kind, form, held, records)
        return lane.job.ask(show, [*sent, *call], most)

    def _leave(self, place: Any, value: torch.Tensor) -> None:
        number = self._lane.job.numbers[place]
        before = self._left.get(number)
        if before is not None and self._places.get(id(before)) == number:
            del self._places[id(before)]
        self._left[number] = value
        self._places[id(value)] = number

    # --- what the block wants ------------------------------------------------------------------------------------

    def take(self, state: State) -> None:
        """What the block waits for now.

        Raises:
            ProtocolError: It waits for what there is not.
        """
        if self._begun and self.done and not state.done:
            raise ProtocolError("a block that is over goes on")
        self.done, self._begun = state.done, True
        self.wanted_inputs = self._modules(state.inputs)
        self.wanted_outputs = self._modules(state.outputs, STEP, SAMPLES, RESULT)
        self.recorders = {place: [_Recorder(self, place)] for place in self._modules(state.recorders)}
        self.input_recorders = {place: [_Recorder(self, place)] for place in self._modules(state.input_recorders)}

    def _modules(self, numbers: list[int], *others: Any) -> frozenset[Any]:
        places, special = self._lane.job.places, {SPECIAL[place]: place for place in others}
        found = set()
        for number in numbers:
            if 0 <= number < len(places):
                found.add(places[number])
            elif number in special:
                found.add(special[number])
            else:
                raise ProtocolError(f"there is no place {number}")
        return frozenset(found)


class _Recorder:
    """Stands for all recorders of a place."""

    def __init__(self, main: StandIn, place: Any) -> None:
        self._main = main
        self._place = place

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], _index: int) -> None:
        """The place is called."""
        self._main.record(self._place, INPUT, (args, kwargs))

    def end(self, result: Any, _args: Any, _kwargs: Any, _index: int, _step: int) -> None:
        """The call is over."""
        self._main.record(self._place, OUTPUT, result)


def _taken(shown: Any, kind: str) -> tuple[torch.Tensor | None, str]:
    """The one tensor in a value, and what is made of it."""
    if kind == INPUT:
        args, kwargs = shown
        values = [*args, *kwargs.values()]
        if len(values) < 2 and all(isinstance(value, torch.Tensor) for value in values):
            return values[0] if values else None, "inputs"
    elif isinstance(shown, CausalLMOutput):
        return cast(torch.Tensor, shown.logits), "causal"
    elif shown is None or isinstance(shown, torch.Tensor):
        return shown, "value"
    raise EngineError(f"A confined block can be shown tensors; here is a {type(shown).__name__}.")


def _formed(form: str, tensor: torch.Tensor) -> Any:
    if form == "inputs":
        return (tensor,), {}
    return CausalLMOutput(logits=tensor) if form == "causal" else tensor


def _bytes(tensor: torch.Tensor | None) -> int:
    return -(-tensor.nbytes // 64) * 64 if tensor is not None else 0


def _problem(outcome: str, value: torch.Tensor, shown: torch.Tensor | None, last: bool) -> str | None:
    """Why a value cannot be what a block left of `shown`."""
    if shown is None:
        return "it changes what has no value"
    same = value.shape == shown.shape
    if last and outcome == "written" and value.dim() == 3:  # of logits the last position counts
        same = value.shape[::2] == shown.shape[::2] and value.shape[1] > 0
    if not same or value.dtype != shown.dtype:
        return f"a value of {list(value.shape)} {value.dtype} in place of one of {list(shown.shape)} {shown.dtype}"
    return None
