"""Engine: the lanes of one vLLM worker, visited wherever the model comes by a place that a block wants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import Module
from transformers.modeling_outputs import CausalLMOutput

from .._core import INPUT, OUTPUT, Place
from ..errors import EditError, EngineError, NNsightError
from ._bridge import Inputs, Output, bridge_of, fill, own, versions_of
from ._compiled import Width
from ._lane import Lane
from ._messages import EXTRA
from ._parts import parts_of
from ._specs import Specs

SAMPLES = Place("model.samples")

Forward = Callable[..., Any]


class Engine:
    """What runs in one worker: `runner` is vLLM's, which calls the model for the batch of each step."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.root: Module = runner.model
        self.waiting: dict[str, Lane] = {}  # by key, until their request comes
        self._known: dict[str, Lane] = {}  # by the engine's name of the request
        self._lanes: list[Lane] = []  # of the current step
        self.specs = Specs(runner)
        config = runner.model_config
        self.width = Width(config.get_hidden_size(), config.dtype, runner.device)
        self._replaced: set[Module] = set()
        self._installed = False
        self._hidden: Any = None  # what leaves the layers at this step
        self._tokens = 0  # of all requests at this step
        self._compute_logits: Forward
        head = self.root.lm_head
        if sum(module is head for _, module in self.root.named_modules(remove_duplicate=False)) > 1:
            self.root.lm_head = copy.copy(head)  # the embedding itself, where weights are tied: another place
        self._places = {module: name for name, module in self.root.named_modules()}
        self._parts = parts_of(self._places)
        self._shared = {module for name, module in self.root.named_modules() if self._shares_input(name, module)}

    def _shares_input(self, name: str, module: Module) -> bool:
        """Whether the layer goes on with this module's input too: the stream beside a norm, the experts' input."""
        parent = self.root.get_submodule(name.rpartition(".")[0])
        in_layer = any(part.isdigit() for part in name.split("."))
        return in_layer and ("Norm" in type(module).__name__ or "experts" in parent._modules)

    # --- lanes ---------------------------------------------------------------------------------------------------

    def add(self, lane: Lane) -> None:
        """Expect a lane's request."""
        if lane.attended:
            self.waiting[lane.ask.key] = lane
        elif lane.spec is not None and lane.spec.acts:
            self.specs.add(lane, lane.spec.acts)
        self._install()

    def forget(self, lane: Lane) -> None:
        """Let go of a lane, whose request is over or was aborted; without any, the model is as it was."""
        self.waiting.pop(lane.ask.key, None)
        self._known = {name: known for name, known in self._known.items() if known is not lane}
        self.specs.forget(lane)
        self._install()

    def living(self) -> dict[str, int]:
        """How many lanes there are, and modules with a forward of ours."""
        replaced = sum("forward" in vars(module) for module in self._places)
        return {
            "waiting": len(self.waiting),
            "lanes": len(self._known),
            "of the step": len(self._lanes),
            "forwards": replaced,
        }

    # --- standing in the model -----------------------------------------------------------------------------------

    def _install(self) -> None:
        """Stand in every module while a lane lives, in those that specs change while there are specs alone."""
        lanes = bool(self.waiting or self._known)
        wanted = set(self._places) if lanes else {self.root, *self.specs.modules()} if self.specs else set()
        for module in wanted - self._replaced:
            vars(module)["forward"] = MethodType(self._replacement(type(module).forward), module)
        for module in self._replaced - wanted:
            del vars(module)["forward"]
        self._replaced = wanted
        if lanes and not self._installed:
            self._install_behind()
        elif self._installed and not lanes:
            self._remove_behind()

    def _install_behind(self) -> None:
        self._installed = True
        self._compute_logits = self.root.compute_logits  # pyright: ignore[reportAttributeAccessIssue]
        vars(self.root)["compute_logits"] = self._logits
        sampler = self.runner.sampler
        vars(sampler)["forward"] = MethodType(self._sampling(type(sampler).forward), sampler)

    def _remove_behind(self) -> None:
        self._installed = False
        del vars(self.root)["compute_logits"]
        del vars(self.runner.sampler)["forward"]
        self._lanes = []

    def _replacement(self, plain: Forward) -> Forward:
        def forward(module: Module, /, *args: Any, **kwargs: Any) -> Any:
            if module is self.root:
                self._begin_step()
                self._tokens = bridge_of(type(module)).inputs(args, kwargs).tokens
            run = partial(self.specs.call, plain) if module in self.specs.plans else plain
            if not self._lanes:
                return run(module, *args, **kwargs)
            return self._call(module, run, args, kwargs)

        return forward

    def _begin_step(self) -> None:
        """Find out which rows of the batch are whose."""
        self._hidden = None
        self._lanes = []
        if self.specs:
            self.specs.begin_step()
        if not (self.waiting or self._known):
            return
        batch = self.runner.input_batch
        bounds = self.runner.query_start_loc.np
        for row, name in enumerate(batch.req_ids):
            lane = self._known.get(name) or self._arrived(name)
            if lane is None or not lane.lives:
                continue
            lane.row, lane.start, lane.stop = row, int(bounds[row]), int(bounds[row + 1])
            problem = self._misplaced(lane, int(batch.num_computed_tokens_cpu[row]))
            if problem is not None:
                lane.fail(EngineError(problem))
                continue
            lane.computed += lane.stop - lane.start
            self._lanes.append(lane)

    def _arrived(self, name: str) -> Lane | None:
        state = self.runner.requests[name]
        extra = getattr(state.sampling_params, "extra_args", None) or {}
        lane = self.waiting.pop(extra.get(EXTRA, ""), None)
        if lane is not None:
            self._known[name] = lane
            lane.length = len(state.prompt_token_ids)
        return lane

    def _misplaced(self, lane: Lane, computed: int) -> str | None:
        if lane.computed == 0 and lane.stop - lane.start < lane.length:
            return _CHUNKED.format(length=lane.length, given=lane.stop - lane.start)
        return _PREEMPTED if computed != lane.computed else None

    # --- visits --------------------------------------------------------------------------------------------------

    def _call(self, module: Module, plain: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lanes = self._lanes
        inputs: Inputs | None = None
        skipping: dict[Lane, Any] = {}
        for lane in lanes:
            if not lane.lives:
                continue
            main = lane.main
            if module is self.root:
                with lane.visiting():
                    main._begin_step()
                if not lane.lives:
                    continue
            main.counts[module] = main.counts.get(module, 0) + 1
            main.running.append(module)
            if module in main.wanted_inputs or module in main.input_recorders:
                inputs = inputs or bridge_of(type(module)).inputs(args, kwargs)
                with guarding(lane):
                    self._visit_inputs(lane, module, inputs, skipping)
        if inputs is not None:
            args, kwargs = inputs.arguments()
        if skipping:
            self._lanes = [lane for lane in lanes if lane not in skipping]
        result = plain(module, *args, **kwargs)
        self._lanes = lanes
        if module is self.root:
            self._hidden = result
            return result  # its output are the logits, which come later
        output: Output | None = None
        for lane in lanes:
            main = lane.main
            if not lane.lives:
                continue
            if module in main.wanted_outputs or module in main.recorders or lane in skipping:
                output = output or bridge_of(type(module)).output(result)
                with guarding(lane):
                    self._visit_output(lane, module, output, skipping)
            main.running.pop()
        return result if output is None else output.result

    def _visit_inputs(self, lane: Lane, module: Module, inputs: Inputs, skipping: dict[Lane, Any]) -> None:
        main, index = lane.main, lane.main.counts[module] - 1
        self._check_rows(module, inputs.value)
        shown = inputs.rows(lane.start, lane.stop)
        if self._parts is not None:
            shown = self._parts.show(module, INPUT, shown)
        before = versions_of(shown)
        if module in main.wanted_inputs:
            with lane.visiting():
                visit = main._visit(module, INPUT, shown, index)
            if visit.skipped is not None and module is self.root:
                raise EditError(_NO_SKIP.format(path="model"))
            if visit.skipped is not None:
                main._pass_by_inside(module)
                skipping[lane] = visit.skipped[0]
                return
            if not lane.lives:
                return
            if visit.written or _differ(before):
                if module in self._shared and (inputs.joins_stream or not visit.written):
                    raise EditError(_SHARED.format(path=self._path(module)))
                value = visit.value if self._parts is None else self._parts.take(module, INPUT, visit.value)
                inputs.put(lane.start, lane.stop, value, self._path(module))
            shown = visit.value
            lane.leave(_tensors(before), f"{self._path(module)}.input")
        for recorder in main.input_recorders.get(module, ()):
            recorder.begin(shown[0], shown[1], index)

    def _visit_output(self, lane: Lane, module: Module, output: Output, skipping: dict[Lane, Any]) -> None:
        main, index = lane.main, lane.main.counts[module] - 1
        skipped = skipping.get(lane)
        self._check_rows(module, output.value)
        shown = output.rows(lane.start, lane.stop) if skipped is None else skipped
        if self._parts is not None and skipped is None:
            shown = self._parts.show(module, OUTPUT, shown)
        before = versions_of(shown)
        if module in main.wanted_outputs:
            with lane.visiting():
                visit = main._visit(module, OUTPUT, shown, index, ((), {}))
            if not lane.lives:
                return
            shown, changed = visit.value, visit.written or _differ(before)
            lane.leave(_tensors(before), f"{self._path(module)}.output")
        else:
            changed = False
        if changed or skipped is not None:
            value = shown if self._parts is None else self._parts.take(module, OUTPUT, shown)
            output.put(lane.start, lane.stop, value, self._path(module))
        for recorder in main.recorders.get(module, ()):
            recorder.end(shown, (), {}, index, main.step)

    def _check_rows(self, module: Module, value: torch.Tensor | None) -> None:
        """A request has its rows where there is one for each token, and nowhere else."""
        if value is not None and (not value.dim() or len(value) != self._tokens):
            raise EngineError(_NO_ROWS.format(path=self._path(module), shape=list(value.shape), tokens=self._tokens))

    def _path(self, module: Module) -> str:
        return f"model.{self._places[module]}".rstrip(".")

    # --- behind the layers ---------------------------------------------------------------------------------------

    def _logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's last projection, which vLLM applies to the last position of each request alone.

        A block that asks for logits sees those of all positions; what it changes at the last one is sampled from.
        """
        head = self.root.lm_head
        logits = self._project(hidden, *args, **kwargs)
        for lane in self._lanes:
            main = lane.main
            if not lane.lives:
                continue
            main.counts[head] = main.counts.get(head, 0) + 1
            main.running.append(head)
            if any(self._is_wanted(main, module) for module in (head, self.root)):
                with guarding(lane):
                    logits = self._visit_logits(lane, head, logits)
            if lane.lives:
                del main.running[-2:]  # the model's own call ends here too
        return logits

    def _project(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own projection, whose modules see the last position of each request: no block has rows there."""
        lanes, self._lanes = self._lanes, []
        try:
            return self._compute_logits(hidden, *args, **kwargs)
        finally:
            self._lanes = lanes

    def _is_wanted(self, main: Any, module: Any) -> bool:
        return module in main.wanted_outputs or module in main.wanted_inputs or module in main.recorders

    def _visit_logits(self, lane: Lane, head: Any, logits: torch.Tensor) -> torch.Tensor:
        main, rows = lane.main, slice(lane.start, lane.stop)
        hidden = own(self._hidden[rows])
        index = main.counts[head] - 1
        if head in main.wanted_inputs:
            with lane.visiting():
                visit = main._visit(head, INPUT, ((hidden,), {}), index)
            if visit.skipped is not None:
                raise EditError(_NO_SKIP.format(path="model.lm_head"))
            if not lane.lives:
                return logits
            lane.leave([hidden], "model.lm_head.input")
            hidden = visit.value[0][0]
        with torch.inference_mode():
            whole = self._project(hidden[0].detach())
        shown = own(whole)
        before = versions_of(shown)
        changed = head in main.wanted_inputs
        if head in main.wanted_outputs:
            with lane.visiting():
                visit = main._visit(head, OUTPUT, shown, index, (((hidden,)), {}))
            if not lane.lives:
                return logits
            changed = changed or visit.written or _differ(before)
            shown = visit.value
        for recorder in main.recorders.get(head, ()):
            recorder.end(shown, (), {}, index, main.step)
        if self.root in main.wanted_outputs:
            output = CausalLMOutput(logits=shown)
            before = versions_of(shown)
            with lane.visiting():
                visit = main._visit(self.root, OUTPUT, output, main.counts[self.root] - 1, ((), {}))
            if not lane.lives:
                return logits
            changed = changed or visit.written or _differ(before)
            shown = getattr(visit.value, "logits", visit.value)
        lane.leave([shown], "model.lm_head.output")
        for recorder in main.recorders.get(self.root, ()):
            recorder.end(CausalLMOutput(logits=shown), (), {}, main.counts[self.root] - 1, main.step)
        if changed or head in main.wanted_inputs:
            logits = logits.clone()
            last = shown[:, -1:] if self._parts is None else self._parts.agree(shown[:, -1:])
            fill(logits[lane.row : lane.row + 1], last[0].unsqueeze(0), "model.lm_head.output")
        return logits

    def _sampling(self, plain: Forward) -> Forward:
        def forward(sampler: Module, /, *args: Any, **kwargs: Any) -> Any:
            found = plain(sampler, *args, **kwargs)
            for lane in self._lanes:
                if lane.lives and SAMPLES in lane.main.wanted_outputs:
                    with guarding(lane):
                        self._visit_samples(lane, found.sampled_token_ids)
                elif lane.lives:
                    lane.main.counts[SAMPLES] = lane.main.counts.get(SAMPLES, 0) + 1
            self._lanes = []
            return found

        return forward

    def _visit_samples(self, lane: Lane, sampled: torch.Tensor) -> None:
        rows = sampled[lane.row : lane.row + 1]
        shown = own(rows[0].long())[0]
        before = versions_of(shown)
        with lane.visiting():
            value = lane.main.touch(SAMPLES, shown)
        if lane.lives and (value is not shown or _differ(before)):
            vocabulary = self.runner.model_config.get_vocab_size()
            if isinstance(value, torch.Tensor) and not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
                raise EditError(f"model.samples takes tokens 0 to {vocabulary - 1} here, not {value.tolist()}.")
            value = value if self._parts is None else self._parts.agree(value)
            fill(rows, value.to(rows.dtype).view(1, 1, -1), "model.samples")


@contextmanager
def guarding(lane: Lane) -> Iterator[None]:
    """What goes wrong with one request's values ends its block, and not the engine."""
    try:
        yield
    except NNsightError as error:
        lane.fail(error)
    except Exception as error:
        lane.fail(EngineError(f"A value could not be handed to the block: {type(error).__name__}: {error}"))


def _tensors(before: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    return [tensor for tensor, _ in before]


def _differ(before: list[tuple[torch.Tensor, int]]) -> bool:
    return any(tensor._version != version for tensor, version in before)


_SHARED = """\
{path} is given a tensor that its layer goes on with beside it, and vLLM has no tensor for the two apart: changing it here \
would mean another thing than in the Hugging Face model. Change what makes it: model.resid_post, attn_out, the module before."""

_NO_ROWS = """\
{path} is given or gives a value of shape {shape}, which has no row for each of the {tokens} tokens of this step: whose rows \
they are is not known."""

_NO_SKIP = """\
{path} cannot be skipped on vLLM, which computes the last logits of all requests at once: assign {path}.output instead."""

_CHUNKED = """\
A block needs its whole prompt in one step, and the engine computed {given} of {length} tokens: give the engine a greater \
max_num_batched_tokens=, and the scheduler that VLLM chooses (scheduler_cls= is not yours to set)."""

_PREEMPTED = """\
The engine had too little memory and took this request out of its batch, to compute its tokens again without the block: \
give it more (gpu_memory_utilization=, or VLLM_CPU_KVCACHE_SPACE on a CPU), or fewer requests at a time."""
