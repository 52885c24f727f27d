"""What one user may take of a server."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """The quotas of a server, on by default.

    Attributes:
        body: Bytes of a job.
        answer: Bytes of an answer.
        stored: Bytes of one user's waiting jobs and kept answers, together.
        queued: Jobs of one user that wait or run.
        seconds: How long a job may run.
        memory: Bytes that a confined job may use beyond the model.
        output: Bytes that a job may print.
        keep: Seconds that an answer is kept.
        attempts: How often a job is begun, where its replica dies.
        lease: Seconds without a sign of life after which a replica counts as dead.
        together: How many jobs may share a forward pass, where jobs do that.
    """

    body: int = 256 * MIB
    answer: int = 2048 * MIB
    stored: int = 8192 * MIB
    queued: int = 64
    seconds: int = 600
    memory: int = 8192 * MIB
    output: int = MIB
    keep: int = 3600
    attempts: int = 2
    lease: float = 30.0
    together: int = 16

    def public(self) -> dict[str, int]:
        """Those that a client may want to know."""
        names = ("body", "answer", "stored", "queued", "seconds", "memory", "keep")
        return {name: getattr(self, name) for name in names}
