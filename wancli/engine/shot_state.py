"""Shots on their way from noise to a latent, as plain states: handed over where shots fork, saved on disk.

NAME.state.safetensors beside an output holds all there is of its shot between two steps, so that another run
goes on from there bit for bit. It is written every so often (`save_every`), where a shot waits for the other
of two experts, and when somebody asks for an end; it goes when the latent is on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.errors import EntryError, WancliError
from wancli.injection.table import Branch
from wancli.plan.prefix_sharing import Fork, Tree
from wancli.plan.shot import Shot
from wancli.sampling import state_file
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.storage import atomic

_FORMAT = 1  # of the record of a state


@dataclass(eq=False)
class Underway:
    """What the steps of a shot have left so far. Between two legs this is all there is of it."""

    shot: Shot
    step: int = 0  # how many steps are behind it
    state: State | None = None  # in host memory; None before the first step, and when the latent is on disk
    read: set[tuple[int, Branch, int]] = field(default_factory=set)
    effects: list[Record] = field(default_factory=list)
    differences: list[Record] = field(default_factory=list)
    phases: list[Record] = field(default_factory=list)
    first_step: float = 0.0  # seconds after the start of the process
    failed: WancliError | None = None  # why it ended
    over: bool = False  # its latent is on disk, or it failed and that was told
    fork: Fork | None = None  # it waits for another shot to come so far
    heirs: list[Underway] = field(default_factory=list)  # those that wait for this one
    saved: int = 0  # the steps that are on disk
    began: float = math.inf  # monotonic seconds: when this process took the first of its steps
    unsaved_since: float = math.inf

    @property
    def next_stage(self) -> Stage | None:
        """The steps that are left of the stage it is in; None after the last, and for a shot that failed."""
        if self.failed:
            return None
        for stage in self.shot.stages:
            if self.step in stage.steps:
                return replace(stage, steps=range(self.step, stage.steps.stop))
        return None

    def add_phases(self, phases: Iterable[Record]) -> None:
        """Those that it does not know yet; a network that several legs use was loaded once."""
        self.phases += manifest_body.new_phases(phases, self.phases)

    def all_heirs(self) -> Iterator[Underway]:
        """Those that wait for this one, and those that wait for them."""
        for heir in self.heirs:
            yield heir
            yield from heir.all_heirs()


def begin(shot: Shot, tools: RenderContext) -> Underway:
    """A shot before its first step, or where an earlier run saved it. A state that is damaged or another
    job's, and with --force one of before, is moved aside."""
    if tools.force and tools.force.outdated(shot, "state"):
        atomic.set_aside(shot.state)
        return Underway(shot)
    try:
        state, facts = state_file.load_state(shot.state)
        if not _of(shot, facts):
            raise EntryError("the state of another render", where=str(shot.state))
    except EntryError as error:
        if atomic.set_aside(shot.state):
            tools.progress.warn(f"{error}; moved aside, shot {shot.id} starts anew")
        return Underway(shot)
    read = {(step, branch, block) for step, branch, block in facts["read"]}
    past = {name: facts[name] for name in ("effects", "differences")}
    past["phases"] = manifest_body.mark_earlier(facts["phases"])
    return Underway(shot, facts["step"], state, read, **past, saved=facts["step"])


def _of(shot: Shot, facts: dict[str, Any]) -> bool:
    """Whether a record is that of this shot's state."""
    same = (facts.get("format"), facts.get("latents_key")) == (_FORMAT, shot.latents_key)
    return same and (facts["measured"] or not shot.measure)


def save(one: Underway, phases: Sequence[Record] = ()) -> None:
    """Makes the state of a shot durable on disk; `phases` are those of the leg it is on."""
    assert one.state is not None
    facts = {
        "format": _FORMAT,
        "latents_key": one.shot.latents_key,
        "output": one.shot.output.name,
        "step": one.step,
        "measured": one.shot.measure,
        "read": sorted(one.read),
        "effects": one.effects,
        "differences": one.differences,
        "phases": [*one.phases, *manifest_body.new_phases(phases, one.phases)],
    }
    state_file.save_state(one.shot.state, one.state, manifest_body.to_plain_json(facts))
    one.saved, one.unsaved_since = one.step, time.monotonic()


def due(one: Underway) -> bool:
    """Whether so much would be lost now that it is time to save."""
    every = one.shot.save_every
    seconds = time.monotonic() - one.unsaved_since
    return one.step > one.saved and (one.step - one.saved >= every.steps or seconds >= every.seconds)


def join(ones: Sequence[Underway]) -> None:
    """Decides which of these shots fork from which, in their order, now that it is known how far each is."""
    tree = Tree()
    found = {one.shot.index: one for one in ones}
    for one in ones:
        one.fork = tree.add(one.shot, one.step)
        if one.fork:
            found[one.fork.of].heirs.append(one)
    for one in ones:
        hand_over(one)


def fail(ones: Iterable[Underway], error: WancliError) -> None:
    """These end with this error, and all that wait for them; their states stay as the last step left them."""
    for one in ones:
        if not one.failed:
            one.failed = error
            if one.state is not None:
                one.state = one.state.to("cpu")
            hand_over(one)


def hand_over(one: Underway) -> None:
    """Gives those that fork here the state. A shot that failed takes all that wait for it with it: each of
    them would come to the same numbers."""
    for heir in list(one.heirs):
        assert heir.fork
        if one.failed:
            heir.failed, heir.fork = one.failed, None
            one.heirs.remove(heir)
            hand_over(heir)
        elif one.state is not None and heir.fork.step == one.step:
            heir.step, heir.state, heir.fork = one.step, one.state, None
            heir.read, heir.effects, heir.phases = set(one.read), list(one.effects), list(one.phases)
            heir.first_step, heir.began, heir.unsaved_since = one.first_step, one.began, one.began
            one.heirs.remove(heir)
            if due(heir):
                save(heir)
            hand_over(heir)
