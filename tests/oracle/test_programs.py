"""Random programs give what plain hooks and unbatched runs give."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, note, reject

from nnsight.errors import EditError, IterationWarning, OutOfOrderError, OutOfOrderWarning

from .models import ROWS, SEQ
from .profile import LONG, profile
from .programs import Family, Program, programs
from .reference import Reference, of_input
from .render import execute, source_of

FAMILIES = {
    "blocks": (700, Family(("mlp", "in_place", "router", "pairs", "recurrent"))),
    "language": (300, Family(("decoder", "gpt2", "llama"))),
    "late": (300, Family(("mlp", "in_place", "router", "pairs", "decoder", "gpt2"), late=True)),
    "gradients": (350, Family(("mlp", "router", "pairs", "decoder", "gpt2"), gradients=True)),
    "generation": (250, Family(("decoder",), generates=True)),
    "transformers": (100, Family(("gpt2", "llama"), generates=True)),
}


@pytest.mark.slow
@pytest.mark.timeout(0 if LONG else 300)
@pytest.mark.parametrize("family", FAMILIES)
def test_programs(family):
    examples, constructs = FAMILIES[family]

    @profile(examples)
    @given(programs(constructs))
    def agrees(program: Program) -> None:
        check(program)

    agrees()


def check(program: Program) -> None:
    source = source_of(program)
    sizes = ", ".join(f"{i.rows} x {i.length}" for i in program.inputs)
    note(
        f"\n# {program.model}{program.warm and f', used for a {program.warm} trace before'}; inputs of {sizes}\n{source}"
    )
    module = copy.deepcopy(program.spec.build())
    try:
        reference, expected_grads = with_parameter_gradients(module, lambda: Reference(program, module).run())
    except RuntimeError as error:
        if "broadcast" in str(error):  # the last position's value with one of all positions: no program at all
            reject()
        raise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            (log, names), grads = with_parameter_gradients(module, lambda: execute(program, source, module))
        except (OutOfOrderError, EditError) as error:
            if is_refusal(program, error):
                return
            raise
    check_warnings(program, caught)
    compare(program, reference, log)
    compare_names(program, reference, names)
    for name, gradient in expected_grads.items():
        close(grads[name], gradient, f"the gradient of {name}")


def is_refusal(program: Program, error: Exception) -> bool:
    """A second pass is refused where a value was changed in place since; so is a change in place of joined rows."""
    in_place = program.model == "in_place" or any(action.in_place for action in program.actions)
    if isinstance(error, EditError):
        return in_place and len(program.inputs) > 1 and "put together by assigning its rows" in str(error)
    return program.reads_late and in_place and "changed in place" in str(error)


def check_warnings(program: Program, caught: list[warnings.WarningMessage]) -> None:
    kinds = [type(w.message) for w in caught]
    assert kinds.count(OutOfOrderWarning) == program.reads_late, [str(w.message) for w in caught]
    assert (IterationWarning in kinds) == program.runs_past_the_end, [str(w.message) for w in caught]
    rest = [w for w in caught if type(w.message) not in (OutOfOrderWarning, IterationWarning)]
    assert not rest, [str(w.message) for w in rest]


def compare(program: Program, reference: Reference, log: dict[Any, Any]) -> None:
    rows = [i.rows for i in program.inputs]
    result = log.pop("result")
    special = [key for key in log if key[0] in ("token", "ids")]
    for key in special:
        compare_ids(program, reference, key, log.pop(key), rows)
    for key in [key for key in log if key[0] == "met"]:
        members = program.barriers[0][1]
        assert log.pop(key) >= members * (key[3] + 1), f"{key}: not everybody had come to the barrier"
    assert log.keys() == reference.values.keys()
    for key, pieces in reference.values.items():
        covers = program.covers(program.blocks[key[0]])
        assert sorted(pieces) == covers
        for at, i in enumerate(covers):
            mine = [rows[j] for j in covers]
            close(of_input(log[key], reference.layouts[key], mine, at, pieces[i]), pieces[i], f"{key} for input {i}")
    for i, expected in reference.results.items():
        for whole, part in zip(tensors(result), tensors(expected), strict=True):
            layout = SEQ if part.dim() > 1 and program.spec.sequences else ROWS
            close(of_input(whole, layout, rows, i, part), part, f"the result for input {i}")


def compare_ids(program: Program, reference: Reference, key: Any, found: torch.Tensor, rows: list[int]) -> None:
    covers = program.covers(program.blocks[key[1]])
    mine = [rows[j] for j in covers]
    for at, i in enumerate(covers):
        ids = reference.results[i]
        expected = ids if key[0] == "ids" else ids[:, program.inputs[i].length + key[2]]
        layout = SEQ if expected.dim() == 2 else ROWS
        close(of_input(found, layout, mine, at, expected), expected, f"{key} for input {i}")


def compare_names(program: Program, reference: Reference, names: dict[str, Any]) -> None:
    """After the trace a name has the value that the last invoke gave it."""
    last: dict[str, tuple[Any, Any]] = {}
    for number, block in enumerate(program.blocks):
        for step, action in block.timeline():
            if action.bind in names and action.site is not None and step < (program.steps or 1):
                last[action.bind] = (number, action.number, step), action
    for name, (key, action) in last.items():
        if not action.full:
            found = reference.bound[key][program.covers(program.blocks[key[0]])[-1]]
            close(names[name], found, f"{name} after the trace")


def with_parameter_gradients(module: torch.nn.Module, function: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    try:
        found = function()
        return found, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    finally:
        for parameter in module.parameters():
            parameter.grad = None


def tensors(value: Any) -> list[torch.Tensor]:
    """What a model returned, without caches."""
    if hasattr(value, "logits"):
        return [value.logits]
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what} has the shape {list(found.shape)}, not {list(expected.shape)}"
    difference = (found.detach() - expected.detach()).abs().max().item() if expected.numel() else 0.0
    scale = 1.0 + expected.detach().abs().max().item()
    assert difference <= 1e-8 * scale, f"{what} differs by {difference}"
