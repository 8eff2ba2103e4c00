"""Shots between noise and latent, as plain states.

A shot that forks from another shot starts with a copy of its state. NAME.state.safetensors beside an output
holds all that is known of its shot between two steps, so that another run resumes from there bit for bit. It
is saved when `save_every` is due, when a shot waits for the other of two experts, and after a stop request.
It is removed once the latent is on disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.engine import attention_stage, manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.errors import EntryError, ErrorCapture
from wancli.injection.exprs import Branch
from wancli.plan.prefix_sharing import Fork, PrefixTree
from wancli.plan.render_plan import format_shots_inline
from wancli.plan.shot import Shot
from wancli.sampling import state_file
from wancli.sampling.solvers import State
from wancli.sampling.stages import Stage
from wancli.storage import atomic, disk
from wancli.storage.manifest_schema import SavedState
from wancli.units import pluralize

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.injection.attention_maps import AttentionMaps


class Status(Enum):
    """The stage of a shot's life."""

    WAITING = "waiting"  # another shot takes its next steps
    RUNNING = "running"  # it takes its next step, or its latent is to be finished
    FINISHED = "finished"  # its latent is on disk
    FAILED = "failed"  # its outcome is to be reported
    REPORTED = "reported"  # it failed, and its outcome was


@dataclass(eq=False)
class ShotState:
    """What the steps of a shot have left so far. Between two segments this is all that is known of it."""

    shot: Shot
    step: int = 0  # the number of steps behind it
    solver_state: State | None = None  # in host memory; None before the first step and once it is over
    reads: set[tuple[int, Branch, int]] = field(default_factory=set)
    effects: list[Record] = field(default_factory=list)
    attention: AttentionMaps | None = None  # with the solver's state, and as long,
    residuals: Mapping[Branch, Tensor] = field(default_factory=dict)  # and those that the next step reuses
    differences: list[Record] = field(default_factory=list)
    phases: list[Record] = field(default_factory=list)
    first_step_after: float = 0.0  # seconds after the start of the process
    status: Status = Status.RUNNING
    failure: ErrorCapture | None = None  # why it failed
    fork: Fork | None = None  # what it waits for
    dependents: list[ShotState] = field(default_factory=list)  # the shots that wait for this one
    saved_step: int = 0  # the number of steps that the state on disk has
    started_at: float = math.inf  # monotonic seconds: when this process took the first of its steps
    unsaved_since: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for the shot but to report it."""
        return self.status in (Status.FINISHED, Status.REPORTED)

    @property
    def next_stage(self) -> Stage | None:
        """The steps that are left of the stage it is in; None after the last step."""
        for stage in self.shot.stages:
            if self.step in stage.steps:
                return replace(stage, steps=range(self.step, stage.steps.stop))
        return None

    def move_to_host(self) -> None:
        """Move what the steps have left to host memory."""
        self.solver_state = self.solver_state and self.solver_state.to("cpu")
        self.attention = self.attention and self.attention.to("cpu")
        self.residuals = {branch: self.residuals[branch].to("cpu") for branch in self.residuals}

    def add_phases(self, phases: Iterable[Record]) -> None:
        """Add records that it does not have; a network that several segments use was loaded once."""
        self.phases += manifest_body.new_phases(phases, self.phases)

    def all_dependents(self) -> Iterator[ShotState]:
        """Yield the shots that wait for this one, and those that wait for them."""
        for dependent in self.dependents:
            yield dependent
            yield from dependent.all_dependents()

    def fail(self, failure: ErrorCapture) -> None:
        """Fail, and with it all shots that wait for this one: they would come to the same numbers.

        The states stay as the last step left them.
        """
        if self.failure is None:
            self.status, self.failure, self.fork = Status.FAILED, failure, None
            self.move_to_host()
        while self.dependents:
            self.dependents.pop(0).fail(failure)

    def resume_from(self, other: ShotState) -> None:
        """Take over what the steps of another shot have left, to continue from there."""
        self.status, self.fork = Status.RUNNING, None
        self.step, self.solver_state = other.step, other.solver_state
        self.reads, self.effects, self.phases = set(other.reads), list(other.effects), list(other.phases)
        self.attention, self.residuals = other.attention, other.residuals
        self.first_step_after = other.first_step_after
        self.started_at, self.unsaved_since = other.started_at, other.started_at


def load_or_start(shot: Shot, context: RenderContext) -> ShotState:
    """Return a shot as an earlier run saved it, else before its first step.

    A state that is damaged or of another job is moved aside. With --force, one that an earlier run left is
    removed.
    """
    if context.force and context.force.is_outdated(shot, "state"):
        remove_state(shot)
    try:
        solver_state, saved, attention_GSWL, residuals = load_state(shot.state, shot.latent_shape)
        if not _belongs_to(shot, saved):
            raise EntryError("the state of another render", where=str(shot.state))
        attention = _resume_maps(shot, attention_GSWL)
        _require_residuals(shot, saved.step, residuals)
    except EntryError as error:
        if atomic.move_aside(shot.state):
            context.progress.warn(f"{error}; moved aside, shot {shot.id} starts again")
        return ShotState(shot)
    return ShotState(
        shot,
        saved.step,
        solver_state,
        reads=set(saved.read),
        effects=[effect.as_dict() for effect in saved.effects],
        attention=attention,
        residuals=residuals,
        differences=[difference.as_dict() for difference in saved.differences],
        phases=manifest_body.mark_earlier(phase.as_dict() for phase in saved.phases),
        saved_step=saved.step,
    )


def _resume_maps(shot: Shot, sums_GSWL: Tensor | None) -> AttentionMaps | None:
    """Return the attention maps of a saved state. Raises EntryError if they are not those of the shot."""
    if shot.attention is None:
        return None
    from wancli.injection.attention_maps import AttentionMaps

    empty = AttentionMaps.zeros(shot.attention, shot.tokens)
    if sums_GSWL is None or sums_GSWL.shape != empty.sums_GSWL.shape:
        raise EntryError("has no attention maps of this shot", where=str(shot.state))
    return AttentionMaps(shot.attention, sums_GSWL)


def _require_residuals(shot: Shot, step: int, residuals: Mapping[Branch, Tensor]) -> None:
    """Raise EntryError if residuals of a saved state are not those that the shot reuses at its next step."""
    wanted = {branch for i, branch in shot.reused if i == step}
    shape = (1, shot.tokens, shot.model.checkpoint.transformer_config.dim)
    if residuals.keys() != wanted or any(one.shape != shape for one in residuals.values()):
        raise EntryError("has no residuals of this shot", where=str(shot.state))


def remove_state(shot: Shot) -> None:
    """Remove the state of this shot, if there is one; a file of something else stays. Raises MachineError."""
    with suppress(EntryError):
        if disk.is_taken(shot.state) and _belongs_to(shot, load_state(shot.state, shot.latent_shape)[1]):
            atomic.remove(shot.state)


def load_state(
    path: Path, shape: tuple[int, ...] | None = None
) -> tuple[State, SavedState, Tensor | None, Mapping[Branch, Tensor]]:
    """Read a saved state, its record, the sums of its attention maps and its residuals. Raises EntryError if
    one is damaged or of another version.

    With a `shape` a state of another one is damage, too, and its tensors are not read.
    """
    solver_state, facts, attention_GSWL, residuals = state_file.load_state(path, shape)
    return solver_state, SavedState.parse(facts, path), attention_GSWL, residuals


def _belongs_to(shot: Shot, saved: SavedState) -> bool:
    """Return whether the record of a state is that of this shot."""
    return (
        saved.latents_key == shot.latents_key
        and saved.step <= shot.steps
        and len(saved.differences) in (0, len(shot.injected_prompts))
        and (saved.measured or not shot.measure)
        and (shot.attention is None or attention_stage.is_of(saved.attention, shot.attention))
    )


def warn_of_other_threads(states: Sequence[ShotState], context: RenderContext) -> None:
    """Say which shots were sampled with another number of threads so far: the last bits depend on it."""
    import torch

    now = torch.get_num_threads()
    shots_by_threads: dict[int, list[Shot]] = {}
    for state in states:
        counts = [phase.get("threads") for phase in state.phases if phase["name"] == "sample"]
        if counts and counts[-1] not in (None, now) and state.shot.model.device == "cpu":
            shots_by_threads.setdefault(counts[-1], []).append(state.shot)
    for before, shots in shots_by_threads.items():
        context.progress.warn(
            f"{format_shots_inline(shots)}: sampled with {pluralize(before, 'thread')} so far and with {now} "
            f"from here on, so the last bits may differ; OMP_NUM_THREADS={before} keeps them"
        )


def save_state(state: ShotState, phases: Sequence[Record] = ()) -> None:
    """Save the state of a shot durably; `phases` are those of the segment in progress."""
    assert state.solver_state is not None
    facts = {
        "format": 1,
        "latents_key": state.shot.latents_key,
        "output": state.shot.output.name,
        **manifest_body.describe_shot(state.shot),
        "step": state.step,
        "measured": state.shot.measure,
        "read": sorted(state.reads),
        "effects": state.effects,
        "differences": state.differences,
        "phases": [*state.phases, *manifest_body.new_phases(phases, state.phases)],
    }
    maps = state.attention
    facts |= {"attention": attention_stage.describe_spec(maps.spec)} if maps else {}
    record = manifest_body.to_plain_json(facts)
    sums_GSWL = maps.sums_GSWL if maps else None
    state_file.save_state(state.shot.state, state.solver_state, record, sums_GSWL, state.residuals)
    state.saved_step, state.unsaved_since = state.step, time.monotonic()


def is_save_due(state: ShotState) -> bool:
    """Return whether so much work would be lost now that it is time to save."""
    every, steps = state.shot.save_every, state.step - state.saved_step
    seconds = time.monotonic() - state.unsaved_since
    return steps > 0 and (steps >= every.steps or seconds >= every.seconds)


def link_dependents(states: Sequence[ShotState]) -> None:
    """Decide in this order which shots fork from which.

    This is the prefix sharing of their schedule, corrected by the steps that are behind each of them.
    """
    tree = PrefixTree()
    by_index = {state.shot.index: state for state in states}
    for state in states:
        state.fork = tree.add(state.shot, state.step)
        if state.fork:
            state.status = Status.WAITING
            by_index[state.fork.parent].dependents.append(state)
    for state in states:
        propagate_state(state)


def propagate_state(state: ShotState) -> None:
    """Pass the state on to the dependents that fork at its step."""
    for dependent in list(state.dependents):
        assert dependent.fork
        if state.solver_state is not None and dependent.fork.step == state.step:
            state.dependents.remove(dependent)
            dependent.resume_from(state)
            if is_save_due(dependent):
                save_state(dependent)
            propagate_state(dependent)
