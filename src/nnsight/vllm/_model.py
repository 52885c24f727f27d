"""VLLM: a model in a vLLM engine, traced like any other."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from typing import Any

from .._capture import Block, Scope, bind
from ..errors import EngineError, InputError
from ..modeling import LanguageModel
from ..remote import JobWriter, Order, RemoteTracer, bind_names, check_saved, read_answer
from ._messages import Ask, decode_reply

_EXTENSION = "nnsight.vllm._extension.WorkerExtension"
_SCHEDULER = "nnsight.vllm._scheduler.LaneScheduler"
_OURS = ("worker_extension_cls", "scheduler_cls")
VERSIONS = ((0, 32), (0, 33))  # of vLLM: from, and before


class VLLM(LanguageModel):
    """A language model served by vLLM; blocks run in the engine's worker, on the tokens of their own request.

    A block sees values as `LanguageModel` shows them, `[1, pos, …]`: at the first step those of the whole prompt, at each
    later one those of one token.  There are the modules of vLLM's model, by its names, and the standard vocabulary:
    `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `logits`; and `samples`, the token that was sampled.
    What leaves a block is saved, as in a trace elsewhere; gradients there are none.

    Every invoke is a request of its own, computed in one batch with whatever else the engine has.

    Example:
        >>> from nnsight.modeling.vllm import VLLM                              # doctest: +SKIP
        >>> model = VLLM("gpt2", tensor_parallel_size=1, dispatch=True)         # doctest: +SKIP
        >>> with model.trace("Hello", temperature=0.0, max_tokens=5) as tracer:  # doctest: +SKIP
        ...     logits = list().save()
        ...     with tracer.iter[:]:
        ...         logits.append(model.logits.output)

    Args:
        model: A name on the hub, or a local folder.
        dispatch: Start the engine now; otherwise the first trace does.
        **options: The engine's arguments: `dtype`, `max_model_len`, `gpu_memory_utilization`, `enforce_eager`, ….

    Raises:
        InputError: An option cannot be had.
        EngineError: vLLM is missing, or of a version that is not known.
    """

    def __init__(self, model: str, *, dispatch: bool = False, **options: Any) -> None:
        _check(model, options)
        self._options = {"enforce_eager": True, **options}
        self._engine: Any = None
        self._lock = threading.Lock()
        super().__init__(model)
        if dispatch:
            self.dispatch()

    def dispatch(self) -> VLLM:
        """Start the engine, if it does not run yet."""
        if self._engine is None:
            _check_version()
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            extra = {"worker_extension_cls": _EXTENSION, "scheduler_cls": _SCHEDULER}
            self._engine = LLM(self._source.name, **extra, **self._options)  # pyright: ignore[reportOptionalMemberAccess]
        return self

    def close(self) -> None:
        """End the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()

    def trace(self, *inputs: Any, trace: bool = True, strict_order: bool = False, **kwargs: Any) -> Any:
        """Run prompts in the engine, with a block for each.

        Args:
            *inputs: One text, token ids or chat messages; or none, and invokes in the block.
            trace: False gives vLLM's own output.
            strict_order: As for `LanguageModel`; nothing is computed a second time here.
            **kwargs: Sampling parameters of vLLM: `temperature`, `max_tokens`, `top_p`, `seed`, …; by default greedy
                and one token, as a trace elsewhere.

        Returns:
            A tracer to use in a `with` statement.

        Raises:
            InputError: The prompt or a sampling parameter cannot be had.
        """
        self.dispatch()
        if not trace:
            return self._run_plainly(inputs, kwargs)
        order = Order(self, "vllm", None, "trace", inputs, kwargs, strict_order, 0.0, solo=True)
        return EngineTracer(self, order)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """As `trace`, of as many tokens as vLLM gives by default."""
        return self.trace(*inputs, **{"max_tokens": 16, **kwargs})

    # --- requests ------------------------------------------------------------------------------------------------

    def _run_plainly(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(inputs) != 1:
            raise InputError("trace=False takes one prompt, or a list of them.")
        prompts = inputs[0] if isinstance(inputs[0], list) and isinstance(inputs[0][0], str) else [inputs[0]]
        return self._engine.generate([self._prompt(prompt) for prompt in prompts], _sampling(kwargs), use_tqdm=False)

    def _run_job(self, frame: bytes) -> bytes:
        """Run a job in the worker, and the requests that it asks for in the engine."""
        number = uuid.uuid4().hex
        with self._lock:
            try:
                reply = self._call("nnsight_begin", number, frame)
                while reply.answer is None:
                    if not reply.asks:
                        raise EngineError("The worker waits for something that cannot come.")
                    reply = self._call("nnsight_go_on", number, self._compute(reply.asks))
            finally:
                self._engine.collective_rpc("nnsight_end", args=(number,))
        return reply.answer

    def _call(self, method: str, *args: Any) -> Any:
        reply = decode_reply(self._engine.collective_rpc(method, args=args)[0])
        for text in reply.printed:
            print(text, end="", flush=True)
        return reply

    def _compute(self, asks: list[Ask]) -> list[Any]:
        prompts, params, results = [], [], {}
        for number, ask in enumerate(asks):
            try:
                prompt = ask.salted(self._prompt(ask.prompt))
                sampling = _sampling(ask.params, ask.extra())
                if ask.attended:
                    self._check_length(prompt)
            except (InputError, ValueError, TypeError) as error:
                results[number] = str(error)
                continue
            prompts.append(prompt)
            params.append(sampling)
        outputs = iter(self._engine.generate(prompts, params, use_tqdm=False) if prompts else ())
        return [results[i] if i in results else _result(next(outputs)) for i in range(len(asks))]

    def _prompt(self, prompt: Any) -> dict[str, Any]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], dict):
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = list(prompt)
        return {"prompt_token_ids": ids}

    def _check_length(self, prompt: dict[str, Any]) -> None:
        most = self._engine.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        size = len(prompt["prompt_token_ids"])
        if size > most:
            raise InputError(
                f"A block needs its whole prompt in one step: this one has {size} tokens, a step {most}. Give the engine "
                f"max_num_batched_tokens={size} or more."
            )


class EngineTracer(RemoteTracer):
    """A trace whose block runs in the engine's worker."""

    def __init__(self, model: VLLM, order: Order) -> None:
        super().__init__(None, order, blocking=True)  # pyright: ignore[reportArgumentType]
        self._model = model

    def _send(self, block: Block, scope: Scope) -> None:
        check_saved(block)
        if block.target is not None:
            bind(block.only_target(), scope)(self)
            scope.write_back(block.target_names())
        written = JobWriter(self._order).write(block, scope)
        bind_names(read_answer(self._model._run_job(written.frame), written), block, scope)


def _result(output: Any) -> Any:
    return [list(output.prompt_token_ids), list(output.outputs[0].token_ids)]


def _sampling(params: Mapping[str, Any], extra: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    given = {"temperature": 0.0, "max_tokens": 1, **params}
    if given.get("n", 1) != 1:
        raise InputError("n=: a block sees one continuation; give each an invoke of its own.")
    if extra is not None:
        given["extra_args"] = {**given.get("extra_args", {}), **extra}
    try:
        return SamplingParams(**given)
    except TypeError as error:
        raise InputError(f"vLLM's sampling parameters do not fit: {error}.") from None


def _check(model: str, options: Mapping[str, Any]) -> None:
    if not isinstance(model, str):
        raise InputError("VLLM takes the name of a model or a folder: vLLM has classes of its own for the modules.")
    for name in _OURS:
        if name in options:
            raise InputError(f"{name}= is what VLLM itself uses to reach the engine, and cannot be given.")
    if options.get("tensor_parallel_size", 1) != 1 or options.get("pipeline_parallel_size", 1) != 1:
        raise InputError("tensor_parallel_size= and pipeline_parallel_size= other than 1 are not supported yet.")
    if not options.get("enforce_eager", True):
        raise InputError("enforce_eager=False compiles the model, and blocks would see nothing of it.")
    if options.get("speculative_config"):
        raise InputError("speculative_config= is not supported: a block would see tokens that are thrown away.")


def _check_version() -> None:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EngineError('VLLM needs vLLM: pip install "nnsight[vllm]" (see docs/vllm.md).') from error
    numbers = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        low, high = (".".join(map(str, version)) for version in VERSIONS)
        raise EngineError(f"vLLM {vllm.__version__} is not supported: install a release from {low} on, before {high}.")
