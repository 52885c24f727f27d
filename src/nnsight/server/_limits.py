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
        queued: Jobs of one user that wait or run.
        seconds: How long a job may run.
        output: Bytes that a job may print.
        keep: Seconds that an answer is kept.
        attempts: How often a job is begun, where its replica dies.
        lease: Seconds without a sign of life after which a replica counts as dead.
    """

    body: int = 256 * MIB
    answer: int = 2048 * MIB
    queued: int = 64
    seconds: int = 600
    output: int = MIB
    keep: int = 3600
    attempts: int = 2
    lease: float = 30.0

    def public(self) -> dict[str, int]:
        """Those that a client may want to know."""
        return {"body": self.body, "answer": self.answer, "queued": self.queued, "seconds": self.seconds}
