"""Programs as data: what blocks read and change at which sites, and strategies that draw valid ones.

A program is valid by construction: each block names its sites in the order of the forward, a name is used where
its binding has come by, a barrier stands at one place of the forward for all who meet there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from .models import FLAT, ROWS, SEQ, SPECS, STATES, TIME, Site, Spec

_WITH_MASK = re.compile(r"(h|layers)\.\d+$|attn$|rotary_emb$")
SCALES = (0.5, -1.0, 2.0, 0.25)
SHAPES = ("plain", "tanh", "flip")


@dataclass(frozen=True)
class Input:
    seed: int
    rows: int
    length: int


@dataclass(frozen=True)
class Use:
    """A name in an expression, and the action that bound it: in `step`, or in the user's own step where that is None."""

    name: str
    block: int
    number: int
    step: int | None
    full: bool


@dataclass(frozen=True)
class Action:
    """One thing that a block does.

    `do`: read, assign, inplace, last (position, in place), column (in place), skip, back (a module's input while the model
    stands at its output), late (a site that has passed), capture (for a gradient), backward, barrier.
    """

    number: int
    do: str
    site: Site | None = None
    shape: str = "plain"
    scale: float = 1.0
    use: Use | None = None
    bind: str | None = None
    full: bool = False
    only_step: int | None = None
    grads: tuple[tuple[str, float | None], ...] = ()
    barrier: str = ""

    @property
    def edits(self) -> bool:
        return self.do in ("assign", "inplace", "last", "column", "skip")

    @property
    def in_place(self) -> bool:
        return self.do in ("inplace", "last", "column")


@dataclass(frozen=True)
class Segment:
    """Actions of one step (`plain`, or `next` after a `tracer.next()`), or of each of `steps` (`for`, `with`)."""

    form: str
    bounds: str
    steps: tuple[int, ...]
    actions: tuple[Action, ...]
    tokens: bool = False


@dataclass(frozen=True)
class Block:
    """An invoke, or the native body of the trace (`native`).  `input` None: it sees the whole batch."""

    input: int | None
    native: bool
    segments: tuple[Segment, ...]
    ids: bool = False  # reads what was generated at its end

    def timeline(self) -> Iterator[tuple[int, Action]]:
        """What the block does, with the step in which it does it."""
        for segment in self.segments:
            for step in segment.steps:
                for action in segment.actions:
                    if action.only_step is None or action.only_step == step:
                        yield step, action


@dataclass(frozen=True, repr=False)
class Program:
    """`steps` None is a trace, else a generation of that many tokens; `warm` is what the model was used for before."""

    model: str
    warm: str
    grad: bool
    strict: bool
    in_function: bool
    inputs: tuple[Input, ...]
    blocks: tuple[Block, ...]
    steps: int | None = None
    barriers: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        return f"<a program on {self.model}, see below>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def spec(self) -> Spec:
        return SPECS[self.model]

    @property
    def actions(self) -> list[Action]:
        return [a for block in self.blocks for segment in block.segments for a in segment.actions]

    def covers(self, block: Block) -> list[int]:
        """The inputs whose rows a block sees."""
        return list(range(len(self.inputs))) if block.input is None else [block.input]

    @property
    def reads_late(self) -> bool:
        return any(action.do == "late" for action in self.actions)

    @property
    def runs_past_the_end(self) -> bool:
        return any(
            segment.bounds not in ("", ":", "1:") and max(segment.steps, default=0) >= (self.steps or 1)
            for block in self.blocks
            for segment in block.segments
        )


# --- strategies -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Which models and which constructs the programs of a test have."""

    models: tuple[str, ...]
    generates: bool = False
    gradients: bool = False
    late: bool = False


@st.composite
def programs(draw: st.DrawFn, family: Family) -> Program:
    return _Drawing(draw, family).program()


class _Drawing:
    """One program on its way."""

    def __init__(self, draw: st.DrawFn, family: Family) -> None:
        self.draw = draw
        self.family = family
        self.spec = SPECS[self.pick(family.models)]
        self.steps = self.pick((1, 2, 3)) if family.generates else None
        self.inputs = self.draw_inputs()
        self.grad = family.gradients or self.chance(2)
        self.bound: list[dict[str, tuple[Action, int, int | None]]] = []
        self.captured: set[tuple[str, str]] = set()
        self.assigned: list[tuple[Site, int | None]] = []
        self.in_place: list[Site] = []
        self.skipped: str | None = None
        self.number = 0
        self.warm = self.pick(("", "", "single", "batch"))
        self.sites = [site for site in self.spec.sites if not self.is_avoided(site)]

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, of: int) -> bool:
        return self.draw(st.integers(0, of - 1)) == of - 1

    def draw_inputs(self) -> tuple[Input, ...]:
        length = self.pick((2, 3, 4))
        ragged = self.spec.tokens and self.chance(2)
        return tuple(
            Input(seed, self.pick((1, 2, 3)), self.pick((1, 2, 3, 5)) if ragged else length)
            for seed in range(self.pick((1, 2, 3)))
        )

    @property
    def padded(self) -> bool:
        return len({i.length for i in self.inputs}) > 1

    def is_avoided(self, site: Site) -> bool:
        """Inputs that come with a mask and positions, whose rows depend on whether there is padding."""
        mixed = self.padded or self.warm == "batch"
        return site.kind == "input" and self.spec.cached and mixed and bool(_WITH_MASK.search(site.path))

    def program(self) -> Program:
        shape = self.pick(("body", "invokes", "invokes")) if len(self.inputs) == 1 else "invokes"
        owners: list[int | None] = [0] if shape == "body" else [None, *range(len(self.inputs))]
        for _ in range(self.pick((0, 0, 1, 2)) if shape == "invokes" else self.pick((0, 0, 1))):
            owners.insert(self.draw(st.integers(1, len(owners))), None)
        self.draw_skip(owners)
        self.owners = owners
        loops = self.shared_loops(owners)
        self.meeting = self.draw_meeting(owners, loops)
        self.with_gradients = self.who_takes_gradients(owners)
        blocks = []
        for index, owner in enumerate(owners):
            self.bound.append({})
            quiet = index == 0 and shape == "invokes" and not self.chance(3)
            blocks.append(self.block(index, owner, quiet, loops))
        blocks = self.with_meeting(blocks)
        return Program(
            self.spec.name,
            warm=self.warm,
            grad=self.grad,
            strict=not self.family.late and self.chance(4),
            in_function=self.chance(2),
            inputs=self.inputs,
            blocks=tuple(blocks),
            steps=self.steps,
            barriers=(("meet", len(owners) - 1),) if self.meeting is not None else (),
        )

    # --- blocks ------------------------------------------------------------------------------------------

    def block(self, index: int, owner: int | None, quiet: bool, loops: Segment | None) -> Block:
        native = index == 0
        if quiet:
            return Block(owner, native, ())
        if self.steps is None:
            segments = [Segment("plain", "", (0,), self.actions(index, owner, 0))]
        elif loops is not None and not native:
            segments = [replace(loops, form=self.pick(("for", "with")), actions=self.actions(index, owner, None))]
            segments[0] = replace(segments[0], tokens=self.chance(3))
        else:
            segments = self.segments(index, owner)
        return Block(owner, native, tuple(segments), ids=self.steps is not None and self.chance(2))

    def segments(self, index: int, owner: int | None) -> list[Segment]:
        assert self.steps is not None
        found, start = [], 0
        if self.chance(2):
            found.append(Segment("plain", "", (0,), self.actions(index, owner, 0)))
            start = 1
        if self.chance(3):
            for step in range(max(start, 1), self.steps):
                found.append(Segment("next", "", (step,), self.actions(index, owner, step)))
            return found
        if self.chance(4):
            return found
        bounds, steps = self.bounds(start)
        form = self.pick(("for", "with"))
        found.append(Segment(form, bounds, steps, self.actions(index, owner, None), tokens=self.chance(3)))
        return found

    def bounds(self, start: int) -> tuple[str, tuple[int, ...]]:
        assert self.steps is not None
        everything = f"{start or ''}:"
        some = [(everything, tuple(range(start, self.steps)))]
        some.append((f"{start}:{start + 2}", (start, start + 1)))
        some.append((str(start), (start,)))
        some.append((f"[{start}, {start + 2}]", (start, start + 2)))
        return self.pick((some[0], *some))

    def shared_loops(self, owners: list[int | None]) -> Segment | None:
        """Where invokes meet at a barrier in each step, all loop over the same steps."""
        if self.steps is None or len(owners) < 3 or not self.chance(3):
            return None
        return Segment("for", ":", tuple(range(self.steps)), ())

    def draw_meeting(self, owners: list[int | None], loops: Segment | None) -> int | None:
        """The place in the forward where all invokes meet at a barrier (in each step), if they do."""
        apart = len(owners) < 3 or self.family.late or (self.steps is not None and loops is None)
        return None if apart or not self.chance(2) else self.pick(self.sites).order

    def with_meeting(self, blocks: list[Block]) -> list[Block]:
        """Somebody must come to the barrier from a place of the model."""
        members = [block for block in blocks if not block.native]
        if self.meeting is None or any(b.segments[0].actions[0].do != "barrier" for b in members):
            return blocks
        self.meeting = None
        return [_without_barriers(block) for block in blocks]

    def with_barrier(self, done: list[Action]) -> None:
        done.insert(_index_after(done, self.meeting), Action(self.next_number(), "barrier", barrier="meet"))

    def draw_skip(self, owners: list[int | None]) -> None:
        """Choose a module that one block skips; what is inside does not run."""
        whole = len(self.inputs) == 1 or any(owner is None for owner in owners[1:])
        if not whole or self.family.late or not self.chance(4):
            return
        events, outputs = self.spec.events, {s.path: s for s in self.sites if s.kind == "output"}
        fitting = [
            s
            for s in self.sites
            if s.kind == "input" and s.path in outputs and s.path and self.may_skip(s)
            and (outputs[s.path].item, outputs[s.path].layout, outputs[s.path].width) == ((), s.layout, s.width)
        ]  # fmt: skip
        if not fitting:
            return
        site = self.pick(fitting)
        end = events[site.path, "output"]
        self.skipped = site.path
        self.sites = [s for s in self.sites if not (site.order < s.order < end)]

    def may_skip(self, site: Site) -> bool:
        if self.family.gradients and not site.differentiable:
            return False
        # Not what fills a model's cache: the number of tokens so far is read from there.
        fills = self.family.generates and self.spec.cached
        return not fills or site.path.endswith(("mlp", "norm", "ln_1", "ln_2"))

    def who_takes_gradients(self, owners: list[int | None]) -> set[int]:
        if not self.family.gradients:
            return set()
        if len(owners) > 1 and any(o is not None for o in owners) and self.chance(2):
            return {i for i, owner in enumerate(owners) if owner is not None}
        return {self.draw(st.integers(1, len(owners) - 1)) if len(owners) > 1 else 0}

    # --- actions -----------------------------------------------------------------------------------------

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def actions(self, index: int, owner: int | None, step: int | None) -> tuple[Action, ...]:
        """The actions of one segment; `step` None is each step of a loop."""
        taking = index in self.with_gradients
        picked = [self.pick(self.sites) for _ in range(self.pick((1, 2, 3, 4)))]
        picked.sort(key=lambda site: site.order)
        done: list[Action] = []
        waited = False
        capturing = None
        loss = self.loss_site() if taking else None
        if loss is not None:
            before = [s for s in self.sites if s.order < loss.order and self.may_capture(s, owner)]
            capturing = self.draw_captures(before)
            picked = sorted([*picked, *capturing], key=lambda s: s.order)
        for site in picked:
            if capturing and site in capturing:
                capturing.remove(site)
                name = f"g{index}_{len([a for a in done if a.do == 'capture'])}"
                self.captured.add(site.event)
                done.append(Action(self.next_number(), "capture", site, bind=name))
                continue
            action = self.action(index, owner, step, site, done)
            waited = waited or (action.use is not None and action.use.block != index)
            done.append(action)
            self.note(index, action, step)
            back = next((s for s in self.sites if s.event == (site.path, "input")), None)
            if site.kind == "output" and back is not None and site.path != self.skipped and self.chance(6):
                done.append(Action(self.next_number(), "back", back, only_step=action.only_step))
            if self.family.late and not waited and self.chance(2):
                passed = [s for s in self.sites if s.order < site.order and s.path != site.path]
                if passed:
                    done.append(Action(self.next_number(), "late", self.pick(passed)))
        if loss is not None:
            names = [a.bind for a in reversed(done) if a.do == "capture"]
            scales = [self.pick((None, None, *SCALES)) for _ in names]
            form = self.pick(("retain", "block"))
            grads = tuple((name, scale if form == "block" else None) for name, scale in zip(names, scales, strict=True))
            done.append(Action(self.next_number(), "backward", loss, shape=form, grads=grads))
        self.add_skip(index, owner, done)
        if self.meeting is not None and index:
            self.with_barrier(done)
        return tuple(done)

    def add_skip(self, index: int, owner: int | None, done: list[Action]) -> None:
        may = self.skipped is not None and (owner is None or len(self.inputs) == 1) and index not in self.with_gradients
        if may and self.chance(2):
            site = next(s for s in self.sites if s.event == (self.skipped, "input"))
            done.insert(
                _index_after(done, site.order),
                Action(self.next_number(), "skip", site, self.pick(SHAPES), self.pick(SCALES)),
            )

    def action(self, index: int, owner: int | None, step: int | None, site: Site, done: list[Action]) -> Action:
        do = self.pick(self.possible(site, owner))
        action = Action(
            self.next_number(),
            do,
            site,
            shape=self.pick(SHAPES) if do == "assign" else "plain",
            scale=self.pick(SCALES) if do != "read" else 1.0,
            only_step=self.pick((None, None, 0, 1)) if step is None and do != "read" else None,
        )
        if do == "read" and self.chance(2):
            # Once a block has bound a name itself, its next step does not take it from another block any more.
            taken = {a.use.name for a in done if a.use is not None and a.use.block != index} if step is None else ()
            free = {"b0", "b1"} if index == 0 else {"v0", "v1"}
            names = sorted(free - self.bound[index].keys() - {*taken})
            if names:
                return replace(action, bind=self.pick(names), full=self.chance(2))
        if do in ("assign", "inplace", "last") and self.chance(2):
            uses = list(self.uses(index, owner, step, site, done, full=do != "last"))
            if uses:
                return replace(action, use=self.pick(uses), only_step=None)
        return action

    def possible(self, site: Site, owner: int | None) -> list[str]:
        found = ["read", "read"]
        batched = len(self.inputs) > 1
        if not (batched and owner is not None and any(is_further(s, site) for s in self.in_place)):
            found.append("assign")
        if self.family.late and not site.fresh:
            return found
        if batched and any(o is not None and is_further(site, s) for s, o in self.assigned):
            return found  # the rows of the others are copies there, which is refused
        if self.family.gradients:
            return [*found, "inplace"] if site.safe and site.fresh and not self.captured else found
        return [*found, "inplace", "column", *(["last"] if site.layout in (SEQ, TIME) else [])]

    def draw_captures(self, sites: list[Site]) -> list[Site]:
        """One, or two of which the second is made of the first: gradients come in the reverse order."""
        first = self.pick(sites)
        second = [s for s in sites if s.order > first.order and first.memory in s.made_of]
        return [first, self.pick(second)] if second and self.chance(2) else [first]

    def may_capture(self, site: Site, owner: int | None) -> bool:
        """Where an invoke has assigned, the whole batch's tensor is a new one: what else holds the old one has a part."""
        new = any(o is not None and s.memory == site.memory for s, o in self.assigned) and len(self.inputs) > 1
        return site.differentiable and (site.fresh or owner is not None or not new)

    def loss_site(self) -> Site:
        """What losses are made of: the last output with the batch in front."""
        outputs = [s for s in self.sites if s.kind == "output" and s.layout in (ROWS, SEQ)]
        return [s for s in outputs if s.item in ((), (0,))][-1]

    def note(self, index: int, action: Action, step: int | None) -> None:
        assert action.site is not None
        if action.do == "assign":
            self.assigned.append((action.site, self.owners[index]))
        elif action.in_place:
            self.in_place.append(action.site)
        if action.bind is not None:
            self.bound[index][action.bind] = (action, self.number, step)

    def uses(
        self, index: int, owner: int | None, step: int | None, site: Site, done: list[Action], *, full: bool
    ) -> Iterator[Use]:
        """Names that can be used at a site."""
        for name in ("b0", "b1") if index == 0 else ("v0", "v1"):
            at = next((i for i in range(index, 0 if index else -1, -1) if name in self.bound[i]), None)
            if at is None:
                continue
            action, _, bound_in = self.bound[at][name]
            own = at == index
            if own and bound_in is None and action not in done:
                continue
            whole = owner is None and len(self.inputs) > 1 and bool(self.with_gradients)
            if (self.mixes_rows or whole) and not (own and action.full):
                continue  # losses would have gradients in the rows of others
            if self.family.gradients and not own and self.owners[at] is None:
                continue  # what the whole batch gave does not come from an invoke's own part of it
            if not own and not self.passes_on(action.site, bound_in, site, step):
                continue
            if action.site.width != site.width or (action.full and not full):
                continue
            if action.full and not self.same_shape(action.site, site, at, owner, own, bound_in, step):
                continue
            yield Use(name, at, action.number, None if bound_in == step else bound_in, action.full)

    @property
    def mixes_rows(self) -> bool:
        """Whether a loss is taken of all inputs, so that what passes from one to another would have a gradient."""
        return len(self.inputs) > 1 and any(self.owners[i] is None for i in self.with_gradients)

    def passes_on(self, bound: Site, bound_in: int | None, used: Site, step: int | None) -> bool:
        """Whether a value of an earlier block is there; a loop's is passed on at a barrier only."""
        if bound_in is None:
            return step is None and self.meeting is not None and bound.order <= self.meeting < used.order
        return bound_in == 0 and bound.order <= used.order

    def same_shape(
        self, bound: Site, used: Site, at: int, owner: int | None, own: bool, bound_in: int | None, step: int | None
    ) -> bool:
        if bound.layout != used.layout or bound_in != step or bound.layout == STATES:
            return False
        if own:
            return True
        source = self.owners[at]
        if source is None or owner is None:
            return source is owner
        a, b = self.inputs[source], self.inputs[owner]
        return a.rows == b.rows and (bound.layout not in (SEQ, TIME, FLAT) or not self.padded)


def is_further(site: Site, other: Site) -> bool:
    """Whether the tensor at `other` comes by again at `site`."""
    return site.memory == other.memory and site.order > other.order


def _without_barriers(block: Block) -> Block:
    segments = (replace(s, actions=tuple(a for a in s.actions if a.do != "barrier")) for s in block.segments)
    return replace(block, segments=tuple(segments))


def _index_after(actions: list[Action], order: int) -> int:
    """Where in a block the places of the forward up to `order` are done with."""
    later = (i for i, a in enumerate(actions) if a.do not in ("back", "late") and a.site.order > order)
    return next(later, len(actions))
