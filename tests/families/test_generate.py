"""Generation: the tokens of plain `generate`, with a read and an edit at every step, alone and in a batch."""

from __future__ import annotations

from typing import Any

import torch
from zoo import Family, build, inputs, prompts
from zoo.capability import shows
from zoo.plain import hooks, on_output
from zoo.traced import close, envoy, own_part, wrap

from nnsight import NNsight

LENGTHS = (1, 40, 7, 13)
STEPS = 5
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Steps:
    """What a generation shows at each step: the input of a block, and the logits."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.tokens = torch.zeros(0)

    def assert_same(self, family: Family, other: Steps) -> None:
        assert torch.equal(self.tokens[:, -STEPS:], other.tokens[:, -STEPS:])
        assert len(self.hidden) == len(self.logits) == len(other.hidden) == len(other.logits) == STEPS
        for ours, theirs in zip([*self.hidden, *self.logits], [*other.hidden, *other.logits], strict=True):
            assert close(own_part(ours, theirs, left=True), theirs)


def feed(family: Family, seed: int) -> dict[str, Any]:
    """Keyword inputs of plain `generate`, of one row."""
    if family.takes_text:
        ids = torch.tensor([prompts(LENGTHS)[seed]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value for name, value in inputs(family, rows=1, seed=seed).items() if name != "decoder_input_ids"}


@torch.no_grad()
def by_hooks(family: Family, net: Any, seed: int, edited: bool) -> Steps:
    found, block = Steps(), net.get_submodule(f"{family.steps}.1")

    def keep_input(_module: Any, args: Any, kwargs: Any) -> None:
        found.hidden.append((args[0] if args else kwargs["hidden_states"]).clone())

    def keep_logits(_module: Any, _args: Any, output: torch.Tensor) -> None:
        found.logits.append(output[:, -1].clone())

    handles = [
        block.register_forward_pre_hook(keep_input, with_kwargs=True),
        net.get_submodule(family.head).register_forward_hook(keep_logits),
        *([on_output(block, lambda hidden: hidden * 1.2 - 0.1)] if edited else []),
    ]
    with hooks(*handles):
        found.tokens = net.generate(**feed(family, seed), **OPTIONS)
    return found


def follow(family: Family, model: NNsight, tracer: Any, found: Steps, edited: bool) -> None:
    """The body of a traced generation that shows the same."""
    for _ in tracer.iter[:]:
        block = envoy(model, f"{family.steps}.1")
        found.hidden.append(block.input.clone())
        if edited:
            block.output[0][:] = block.output[0] * 1.2 - 0.1
        found.logits.append(envoy(model, family.head).output[:, -1].clone())
    found.tokens = model.generator.output  # pyright: ignore[reportAttributeAccessIssue]


@shows("generate")
@torch.no_grad()
def test_alone(family: Family) -> None:
    net = build(family)
    model = wrap(family, net)
    for edited in (False, True):
        found, fed = Steps(), feed(family, 2)
        args = (fed["input_ids"],) if family.takes_text else ()
        kwargs = {} if family.takes_text else fed
        with model.generate(*args, **kwargs, **OPTIONS) as tracer:
            follow(family, model, tracer, found, edited)
        expected = by_hooks(family, net, 2, edited)
        found.assert_same(family, expected)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@shows("generate")
@torch.no_grad()
def test_in_a_batch(family: Family) -> None:
    net = build(family)
    model = wrap(family, net)
    found = {seed: Steps() for seed in range(len(LENGTHS))}
    with model.generate(**OPTIONS) as tracer:
        for seed, steps in found.items():
            fed = feed(family, seed)
            with tracer.invoke(fed["input_ids"][0].tolist()) if family.takes_text else tracer.invoke(**fed):
                follow(family, model, tracer, steps, seed % 2 == 1)
    for seed, steps in found.items():
        steps.assert_same(family, by_hooks(family, net, seed, seed % 2 == 1))
