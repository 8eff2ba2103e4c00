"""Stage 2 of the pipeline: shots on their way from noise to a latent on disk, expert by expert.

Only one expert fits into memory, and loading it takes long. So several shots take their
high-noise steps, wait as plain states, and then take their low-noise steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from wancli import files, latents, record
from wancli.encode import Encoded
from wancli.events import Progress
from wancli.experts import EXPERTS, WAITING_BYTES, Stage
from wancli.footprint import RIDERS
from wancli.inject import Branch
from wancli.peak import Peak
from wancli.record import Record
from wancli.shot import Shot, waits

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.difference import Difference
    from wancli.models.dit import WanModel
    from wancli.solvers import State
    from wancli.weights.lora import Loras, Patches


@dataclass
class Underway:
    """What the steps of a shot have left so far. Between two experts this is all there is of it."""

    shot: Shot
    state: State | None = None  # in host memory; None before the first step
    read: set[tuple[int, Branch, int]] = field(default_factory=set)
    effects: list[Any] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    phases: list[Record] = field(default_factory=list)
    first_step: float = 0.0  # seconds after the start of the process


def together(shots: Sequence[Shot]) -> Iterator[list[Shot]]:
    """Shots in the groups in which they change experts: one by one where there is one network, else as
    many as may wait in memory."""
    group: list[Shot] = []
    waiting = 0
    for shot in shots:
        state = waits(shot)
        if group and (state == 0 or waiting + state > WAITING_BYTES):
            yield group
            group, waiting = [], 0
        group.append(shot)
        waiting += state
    if group:
        yield group


def by_expert(shots: Sequence[Shot]) -> list[tuple[Shot, Stage]]:
    """Every stage of the shots, those of one expert together."""
    stages = [(shot, stage) for shot in shots for stage in shot.stages]
    return sorted(stages, key=lambda pair: EXPERTS.index(pair[1].expert))


def advance(
    one: Underway,
    stage: Stage,
    model: WanModel,
    load: Record,
    patches: Patches,
    loras: Loras,
    encoded: Mapping[str, Encoded],
    progress: Progress,
) -> None:
    """Takes the steps of one stage with its network. Raises NotFinite."""
    import torch

    from wancli import sample
    from wancli.difference import compare
    from wancli.probe import Effect
    from wancli.solvers import State

    shot, device = one.shot, one.shot.model.device
    rows_NE = {text.id: encoded[text.id].embedding.rows_NE.to(device) for text in shot.texts}
    with (
        torch.inference_mode(),
        Peak() as peak,
        progress.phase(shot.id, "sample", len(stage.steps)) as bar,
    ):
        patches.at(loras, stage.steps[0], stage.expert)
        contexts = sample.Contexts(model, rows_NE)
        effects: list[Effect] | None = [] if shot.measure else None
        if one.state is None:
            one.state = State(sample.noise(shot.latent_shape, shot.seed, shot.noise))
            main = encoded[shot.prompt.id].embedding
            one.differences = [compare(main, encoded[text.id].embedding, model) for text in shot.injected]
        state = one.state.to(device)
        walk = sample.Walk(state, shot.schedule, shot.solver, shot.table, contexts, stage, effects)
        riders = 1 if shot.model.residency == "resident" else RIDERS
        for done in sample.denoise(model, walk, riders):
            state = done.state
            one.read |= done.read
            one.first_step = one.first_step or record.since_start()
            bar.advance(note=f"sigma {shot.schedule.sigmas[done.step]:.3f}")
            if done.step in stage.steps and patches.at(loras, done.step, stage.expert):
                contexts.forget()
        one.state = state.to("cpu")
    one.effects += effects or []
    one.phases += [load, record.phase("sample", peak)]


def keep(
    one: Underway, encoded: Mapping[str, Encoded], loras: Loras, stage1: Record
) -> tuple[Tensor, Record]:
    """The finished latent, now durable on disk, and all that the manifest will say of its making.

    Raises InjectionMissed where a rule did not reach the blocks it was planned for.
    """
    from wancli.sample import check_hits

    shot = one.shot
    assert one.state is not None
    check_hits(shot.table, frozenset(one.read))
    facts = record.of_shot(shot) | {
        "prompts": [record.of_prompt(prompt, encoded[prompt.id].hit) for prompt in shot.texts],
        "encoder_loaded": any(not e.hit for e in encoded.values()),
        "injection": record.of_injection(shot, one.read, one.differences),
        "loras": record.of_loras(shot, loras),
        "effects": [asdict(effect) for effect in one.effects],
        "first_step_after": one.first_step,
        "phases": [stage1, *one.phases],
    }
    facts = record.plain(facts)
    files.set_aside(shot.latents)  # another shot's, or with --force this one's
    latents.save(shot.latents, one.state.x, facts)
    return one.state.x, facts
