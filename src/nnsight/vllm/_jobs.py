"""Jobs: blocks that were sent to a worker, each in a coroutine that waits while the engine computes its requests."""

from __future__ import annotations

from typing import Any

import torch

from .._core import Coroutine, capture_modes, switch_modes
from ..errors import EngineError, InputError
from ..protocol import Event, write_frame
from ..sandbox import Files, describe_failure, execute
from ..trace import Given
from ._engine import Engine
from ._lane import Lane, lane_maker
from ._messages import Ask, Reply
from ._served import ServedModel


class Job:
    """One job."""

    def __init__(self, engine: Engine, served: ServedModel, number: str, frame: bytes) -> None:
        self._engine = engine
        self._number = number
        self._lanes: list[Lane] = []  # whose requests the engine computes
        self._asked: list[Lane] = []  # since the last reply
        self._printed: list[str] = []
        self._count = 0
        self._answer: bytes | None = None
        self._files = Files()

        def main() -> None:
            lane_maker.set(self._new_lane)  # in the context of this coroutine, and those begun in it
            try:
                self._answer = execute(
                    frame, served, self._print, forward_warnings=False, seeded=False, files=self._files
                )
            except KeyboardInterrupt as error:  # of the block: the engine's own come elsewhere
                self._answer = write_frame(describe_failure(error, lambda _: True))

        self._coroutine = Coroutine(main)

    def _print(self, event: Event) -> None:
        self._printed.append(event.text)

    def begin(self) -> Reply:
        """Run the block until it needs requests, or ends."""
        self._resume()
        return self._reply()

    def go_on(self, results: list[Any]) -> Reply:
        """The requests are over, each with `[prompt, tokens]` or a text that says why not."""
        lanes, self._lanes = self._lanes, []
        for lane, result in zip(lanes, results, strict=True):
            self._engine.forget(lane)
            if isinstance(result, str):
                lane.fail(EngineError(result))
            else:
                prompt, tokens = result
                lane.steps = len(tokens)
                lane.finish(torch.tensor([[*prompt, *tokens]]))
        if self._coroutine and not self._asked:
            self._resume()
        return self._reply()

    def close(self) -> None:
        """End it, wherever it stands."""
        for lane in (*self._lanes, *self._asked):
            self._engine.forget(lane)
        self._lanes, self._asked = [], []
        self._coroutine.kill()

    def _resume(self) -> None:
        modes = capture_modes()
        self._files.show()
        self._coroutine.resume()
        switch_modes(capture_modes(), modes)

    def _reply(self) -> Reply:
        asked, self._asked = self._asked, []
        printed, self._printed = self._printed, []
        self._lanes += asked
        return Reply([lane.ask for lane in asked], self._answer, printed)

    def _new_lane(self, given: Given) -> Lane:
        self._count += 1
        return Lane(
            Ask(f"{self._number}:{self._count}", _prompt(given.args), dict(given.kwargs)),
            self._hand_in,
            self._files.show,
        )

    def _hand_in(self, lane: Lane) -> None:
        self._asked.append(lane)
        self._engine.add(lane)


def _prompt(args: tuple[Any, ...]) -> Any:
    """A prompt as text, token ids or chat messages, which travel as plain data."""
    if len(args) != 1:
        raise InputError(f"A request has one prompt; here are {len(args)}. Give each an invoke: tracer.invoke(prompt).")
    prompt = args[0]
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (list, str)):
        prompt = prompt[0]
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(one, dict) for one in prompt)
    is_ids = isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt)
    if not (isinstance(prompt, str) or is_chat or is_ids):
        raise InputError(
            "A request of vLLM takes one text, token ids [pos] or chat messages. Several prompts are several invokes."
        )
    return prompt
