"""WorkerExtension: what vLLM mixes into its workers (`worker_extension_cls`), called from the user's process."""

from __future__ import annotations

from typing import Any

from ._confined import ConfinedJob, runners_for
from ._engine import Engine
from ._jobs import Job
from ._messages import Reply, encode
from ._parent import end_with_parent
from ._runners import Limits
from ._served import ServedModel


class WorkerExtension:
    """Methods of a worker for jobs with blocks."""

    def nnsight_confine(self, limits: dict[str, float]) -> None:
        """Get ready for confined blocks, with limits of a worker's own; without it, the first one does."""
        if vars(self).get("_nnsight_runners") is None:
            engine, config = self._nnsight_parts()[0], self.vllm_config  # pyright: ignore[reportAttributeAccessIssue]
            self._nnsight_runners = runners_for(engine, config, Limits(**limits))  # pyright: ignore[reportArgumentType]

    def nnsight_begin(self, number: str, frame: bytes, confined: dict[str, float] | None = None) -> bytes:
        """Begin a job, and say what requests it needs; with limits, its block runs `confined`, in a process of its own."""
        engine, served, jobs = self._nnsight_parts()
        if confined is not None:
            self.nnsight_confine(confined)
            jobs[number] = ConfinedJob(engine, self._nnsight_runners, number, frame)
        else:
            jobs[number] = Job(engine, served, number, frame)
        return self._nnsight_reply(number, jobs[number].begin())

    def nnsight_go_on(self, number: str, results: list[Any]) -> bytes:
        """Hand in the results of the requests of a job."""
        return self._nnsight_reply(number, self._nnsight_parts()[2][number].go_on(results))

    def _nnsight_reply(self, number: str, reply: Reply) -> bytes:
        if reply.answer is not None:
            self.nnsight_end(number)
        return encode(reply)

    def nnsight_end(self, number: str) -> None:
        """Let go of a job."""
        job = self._nnsight_parts()[2].pop(number, None)
        if job is not None:
            job.close()

    def nnsight_living(self) -> dict[str, int]:
        """How much there is of jobs: all of it is over when every number is 0."""
        engine, _, jobs = self._nnsight_parts()
        return {"jobs": len(jobs), **engine.living()}

    def _nnsight_parts(self) -> tuple[Engine, ServedModel, dict[str, Job | ConfinedJob]]:
        found = vars(self).get("_nnsight")
        if found is None:
            end_with_parent()
            engine = Engine(self.model_runner)  # pyright: ignore[reportAttributeAccessIssue]
            served = ServedModel(engine, self._nnsight_tokenizer)
            found = self._nnsight = (engine, served, {})
        return found

    def _nnsight_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        config = self.vllm_config.model_config  # pyright: ignore[reportAttributeAccessIssue]
        return AutoTokenizer.from_pretrained(config.tokenizer, revision=config.tokenizer_revision)
