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
from wancli.plan.prefix_sharing import Fork, PrefixTree
from wancli.plan.shot import Shot
from wancli.sampling import state_file
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.storage import atomic

_FORMAT = 1  # of the record of a state


@dataclass(eq=False)
class ShotState:
    """What the steps of a shot have left so far. Between two legs this is all there is of it."""

    shot: Shot
    step: int = 0  # how many steps are behind it
    solver_state: State | None = (
        None  # in host memory; None before the first step, and when the latent is on disk
    )
    reads: set[tuple[int, Branch, int]] = field(default_factory=set)
    effects: list[Record] = field(default_factory=list)
    differences: list[Record] = field(default_factory=list)
    phases: list[Record] = field(default_factory=list)
    first_step_after: float = 0.0  # seconds after the start of the process
    failed: WancliError | None = None  # why it ended
    over: bool = False  # its latent is on disk, or it failed and that was told
    fork: Fork | None = None  # it waits for another shot to come so far
    dependents: list[ShotState] = field(default_factory=list)  # those that wait for this one
    saved_step: int = 0  # the steps that are on disk
    started_at: float = math.inf  # monotonic seconds: when this process took the first of its steps
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

    def all_dependents(self) -> Iterator[ShotState]:
        """Those that wait for this one, and those that wait for them."""
        for heir in self.dependents:
            yield heir
            yield from heir.all_dependents()


def load_or_start(shot: Shot, context: RenderContext) -> ShotState:
    """A shot before its first step, or where an earlier run saved it. A state that is damaged or another
    job's, and with --force one of before, is moved aside."""
    if context.force and context.force.is_outdated(shot, "state"):
        atomic.move_aside(shot.state)
        return ShotState(shot)
    try:
        state, facts = state_file.load_state(shot.state)
        if not _belongs_to(shot, facts):
            raise EntryError("the state of another render", where=str(shot.state))
    except EntryError as error:
        if atomic.move_aside(shot.state):
            context.progress.warn(f"{error}; moved aside, shot {shot.id} starts anew")
        return ShotState(shot)
    read = {(step, branch, block) for step, branch, block in facts["read"]}
    past = {name: facts[name] for name in ("effects", "differences")}
    past["phases"] = manifest_body.mark_earlier(facts["phases"])
    return ShotState(shot, facts["step"], state, read, **past, saved_step=facts["step"])


def _belongs_to(shot: Shot, facts: dict[str, Any]) -> bool:
    """Whether a record is that of this shot's state."""
    same = (facts.get("format"), facts.get("latents_key")) == (_FORMAT, shot.latents_key)
    return same and (facts["measured"] or not shot.measure)


def save_state(state: ShotState, phases: Sequence[Record] = ()) -> None:
    """Makes the state of a shot durable on disk; `phases` are those of the leg it is on."""
    assert state.solver_state is not None
    facts = {
        "format": _FORMAT,
        "latents_key": state.shot.latents_key,
        "output": state.shot.output.name,
        "step": state.step,
        "measured": state.shot.measure,
        "read": sorted(state.reads),
        "effects": state.effects,
        "differences": state.differences,
        "phases": [*state.phases, *manifest_body.new_phases(phases, state.phases)],
    }
    state_file.save_state(state.shot.state, state.solver_state, manifest_body.to_plain_json(facts))
    state.saved_step, state.unsaved_since = state.step, time.monotonic()


def is_save_due(state: ShotState) -> bool:
    """Whether so much would be lost now that it is time to save."""
    every = state.shot.save_every
    seconds = time.monotonic() - state.unsaved_since
    return state.step > state.saved_step and (
        state.step - state.saved_step >= every.steps or seconds >= every.seconds
    )


def link_dependents(states: Sequence[ShotState]) -> None:
    """Decides which of these shots fork from which, in their order, now that it is known how far each is."""
    tree = PrefixTree()
    found = {one.shot.index: one for one in states}
    for one in states:
        one.fork = tree.add(one.shot, one.step)
        if one.fork:
            found[one.fork.parent].dependents.append(one)
    for one in states:
        propagate_state(one)


def fail_states(states: Iterable[ShotState], error: WancliError) -> None:
    """These end with this error, and all that wait for them; their states stay as the last step left them."""
    for one in states:
        if not one.failed:
            one.failed = error
            if one.solver_state is not None:
                one.solver_state = one.solver_state.to("cpu")
            propagate_state(one)


def propagate_state(state: ShotState) -> None:
    """Gives those that fork here the state. A shot that failed takes all that wait for it with it: each of
    them would come to the same numbers."""
    for heir in list(state.dependents):
        assert heir.fork
        if state.failed:
            heir.failed, heir.fork = state.failed, None
            state.dependents.remove(heir)
            propagate_state(heir)
        elif state.solver_state is not None and heir.fork.step == state.step:
            heir.step, heir.solver_state, heir.fork = state.step, state.solver_state, None
            heir.reads, heir.effects, heir.phases = set(state.reads), list(state.effects), list(state.phases)
            heir.first_step_after, heir.started_at, heir.unsaved_since = (
                state.first_step_after,
                state.started_at,
                state.started_at,
            )
            state.dependents.remove(heir)
            if is_save_due(heir):
                save_state(heir)
            propagate_state(heir)
