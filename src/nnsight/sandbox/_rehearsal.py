"""What a model does before its first job: what loads lazily is loaded, and a job of our own is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..modeling import NNsight
from ..protocol import VERSION, BlockText, BoundBlock, EnvoyNode, Job, ModelState, Namespace, write_frame
from ._execute import execute
from ._together import execute_together


def warm(model: Any) -> None:
    """Load what first uses load lazily, so that no job has to: of the model, and of running jobs on it."""
    ids = torch.tensor([[1, 2]])
    with _gradients_of_few(model._model), model.trace(ids):
        loss = model.output.logits.sum()
        if loss.requires_grad:
            with loss.backward():
                pass
    with model.generate(ids, max_new_tokens=2, do_sample=True) as tracer:
        _ = tracer.result
    model._model.zero_grad(set_to_none=True)
    rehearse(model)
    execute_together([_job()] * 2, model)


@contextmanager
def _gradients_of_few(module: torch.nn.Module) -> Iterator[None]:
    """Gradients of vectors alone: those of matrices would take as much memory as the model."""
    matrices = [each for each in module.parameters() if each.requires_grad and each.dim() > 1]
    for each in matrices:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in matrices:
            each.requires_grad_(True)


def rehearse(model: NNsight) -> None:
    """Run a small job as a user's is run."""
    execute(_job(), model, lambda _: None)


def _job() -> bytes:
    block = BlockText(
        source="output = model.output.save()\n",
        filename="<rehearsal>",
        first_line=1,
        function="<module>",
        target=None,
        line=1,
        margins=[0],
        owner=None,
        first_argument=None,
        flags=0,
        names_read=["model"],
        names_bound=["output"],
        names_global=[],
    )
    return write_frame(
        Job(
            version=VERSION,
            model="",
            revision=None,
            method="trace",
            main=BoundBlock(block, [], {}, 0),
            args=["one two three four five six seven eight nine ten"],
            kwargs={},
            models=[ModelState()],
            namespaces=[Namespace("__main__", {"model": EnvoyNode(0, "")})],
            definitions=[],
            modules=[],
            containers=[],
            tensors=[],
            grad=False,
        )
    )
