"""A program as the source code a user would write, and running it."""

from __future__ import annotations

import linecache
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch

from nnsight import LanguageModel, NNsight

from .models import FLAT, ROWS, SEQ, STATES, TIME, Site
from .programs import Action, Block, Program, Segment

_BLOCK = re.compile(r"(transformer\.h|model\.layers)\.\d+")

VECTOR = {ROWS: "[-1]", SEQ: "[-1, -1]", TIME: "[-1, -1]", FLAT: "[-1]", STATES: "[-1, -1]"}
LAST = {SEQ: "[:, -1]", TIME: "[-1]"}
SHAPED = {"plain": "x", "tanh": "x.tanh()", "flip": "x.flip(-1)"}


def source_of(program: Program) -> str:
    """The program as text; it fills `log` and binds `result`."""
    lines = [*_trace(program)]
    if program.in_function:
        names = sorted(n for n in {a.bind for a in program.actions if a.bind and a.bind[0] == "v"})
        found = ", ".join(f"{n!r}: locals().get({n!r})" for n in names)
        lines = [
            "def run(model, inputs, log):",
            *_indent(lines),
            f"    return {{{found}}}",
            "names = run(model, inputs, log)",
        ]
    return "\n".join(lines) + "\n"


def execute(program: Program, source: str, module: torch.nn.Module) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Run the source; returns what it logged, and the names that its invokes bound."""
    spec = program.spec
    model = LanguageModel(module) if spec.tokens else NNsight(module)
    inputs = [spec.inputs(i.seed, i.rows, i.length) for i in program.inputs]
    _warm_up(model, program)
    log: dict[Any, Any] = {}
    filename = "<program>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space = {"torch": torch, "model": model, "inputs": inputs, "log": log, "__name__": "program"}
    try:
        exec(compile(source, filename, "exec", dont_inherit=True), space)
    finally:
        del linecache.cache[filename]
    names = space["names"] if program.in_function else {n: v for n, v in space.items() if re.fullmatch(r"v\d", n)}
    return log, names


def _warm_up(model: NNsight, program: Program) -> None:
    spec = program.spec
    if program.warm == "single":
        with model.trace(*spec.inputs(98, 2, 2)):
            pass
    elif program.warm == "batch":
        with model.trace() as tracer:
            with tracer.invoke(*spec.inputs(98, 1, 3)):
                model.output
            with tracer.invoke(*spec.inputs(99, 2, 2 if spec.tokens else 3)):
                pass


def _indent(lines: list[str]) -> list[str]:
    return [textwrap.indent(line, "    ") for line in lines]


def _trace(program: Program) -> Iterator[str]:
    body, invokes = program.blocks[0], program.blocks[1:]
    options = [f"max_new_tokens={program.steps}"] if program.steps is not None else []
    if program.strict:
        options.append("strict_order=True")
    given = [f"*inputs[{body.input}]"] if body.input is not None else []
    method = "trace" if program.steps is None else "generate"
    grad = "" if program.grad else "torch.no_grad(), "
    yield f"with {grad}model.{method}({', '.join([*given, *options])}) as tracer:"
    lines = [line for name, count in program.barriers for line in (f"{name} = tracer.barrier({count})", "came = []")]
    for number, block in enumerate(invokes, 1):
        lines.append(f"with tracer.invoke({f'*inputs[{block.input}]' if block.input is not None else ''}):")
        lines += _indent([*_block(number, block)])
    lines += _block(0, body)
    lines.append('log["result"] = tracer.result')
    yield from _indent(lines)


def _block(number: int, block: Block) -> Iterator[str]:
    for segment in block.segments:
        lines = [line for action in segment.actions for line in _conditional(number, action, segment)]
        if segment.tokens:
            lines.append(f'log["token", {number}, step] = model.generator.streamer.output.clone()')
        if segment.form in ("for", "with"):
            steps = "tracer.all()" if segment.bounds == ":" and number % 2 else f"tracer.iter[{segment.bounds}]"
            yield f"for step in {steps}:" if segment.form == "for" else f"with {steps} as step:"
            yield from _indent(lines or ["pass"])
        else:
            if segment.form == "next":
                yield "tracer.next()"
            yield from lines or ["pass"]
    if block.ids:
        yield f'log["ids", {number}] = model.generator.output.clone()'
    if not block.segments and not block.ids:
        yield "pass"


def _conditional(number: int, action: Action, segment: Segment) -> list[str]:
    step = "step" if segment.form in ("for", "with") else str(segment.steps[0])
    lines = [*_action(number, action, f"{number}, {action.number}, {step}")]
    return lines if action.only_step is None else [f"if step == {action.only_step}:", *_indent(lines)]


def _action(number: int, action: Action, key: str) -> Iterator[str]:
    if action.do == "barrier":
        yield f"came.append({number})"
        yield f"{action.barrier}()"
        yield f'log["met", {key}] = len(came)'
        return
    site = action.site
    assert site is not None
    place = _place(site, spell_as_tuple=action.number % 2 == 0)
    if action.do in ("late", "back"):
        yield f"log[{key}] = {place}.clone()"
        return
    if action.do == "capture":
        yield f"{action.bind} = {place}"
        yield f"{action.bind}.retain_grad()"
        return
    if action.do == "backward":
        yield from _backward(action, place, key)
        return
    yield f"x = {place}"
    if action.do == "read":
        yield f"log[{key}] = x.clone().save()"
        if action.bind:
            yield f"{action.bind} = x{'' if action.full else VECTOR[site.layout]}.clone()"
    if not action.edits:
        return
    value = f"{SHAPED[action.shape]} * {action.scale}" + (f" + {action.use.name}" if action.use else "")
    if action.do == "assign":
        yield f"{place} = {value}"
    elif action.do == "skip":
        yield f"{_module(site.path)}.skip({value})"
    elif action.do == "inplace":
        yield f"x[:] = {value}"
    elif action.do == "column":
        yield f"x[..., 0] = {action.scale}"
    else:
        at = LAST[site.layout]
        yield f"x{at} = x{at} * {action.scale}" + (f" + {action.use.name}" if action.use else "")
    if action.do != "skip":
        yield f"log[{key}] = {place}.clone()"


def _backward(action: Action, place: str, key: str) -> Iterator[str]:
    assert action.site is not None
    yield f"loss = ({place}{LAST.get(action.site.layout, '')} ** 2).sum()"
    if action.shape == "retain":
        yield "loss.backward(retain_graph=True)"
        for name, _ in action.grads:
            yield f"log[{key}, {name!r}] = {name}.grad.clone()"
        return
    yield "with loss.backward(retain_graph=True):"
    for name, scale in action.grads:
        yield f"    log[{key}, {name!r}] = {name}.grad.clone()"
        if scale is not None:
            yield f"    {name}.grad = {name}.grad * {scale}"


def _module(path: str) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", f"model.{path}" if path else "model")


def _place(site: Site, *, spell_as_tuple: bool) -> str:
    items = "".join(f"[{i}]" for i in site.item)
    if spell_as_tuple and site.kind == "output" and _BLOCK.fullmatch(site.path):
        items = "[0]"
    return f"{_module(site.path)}.{site.kind}{items}"
