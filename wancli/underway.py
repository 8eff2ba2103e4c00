"""Stage 2 of the pipeline: shots on their way from noise to a latent on disk, expert by expert.

Only one expert fits into memory, and loading it takes long. So several shots take their
high-noise steps, wait as plain states, in memory and on disk, and then take their low-noise steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from wancli import files, latents, record
from wancli.encode import Encoded
from wancli.errors import EntryError, NotFinite
from wancli.events import Progress
from wancli.experts import Stage
from wancli.inject import Branch
from wancli.peak import Peak
from wancli.record import Record
from wancli.shot import Shot
from wancli.solvers import State

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.dit import WanModel
    from wancli.probe import Effect
    from wancli.sample import Contexts, Sampled, Walk
    from wancli.weights.lora import Loras, Patches


@dataclass
class Underway:
    """What the steps of a shot have left so far. Between two experts this is all there is of it."""

    shot: Shot
    step: int = 0  # how many steps are behind it
    state: State | None = None  # in host memory; None before the first step
    read: set[tuple[int, Branch, int]] = field(default_factory=set)
    effects: list[Record] = field(default_factory=list)
    differences: list[Record] = field(default_factory=list)
    phases: list[Record] = field(default_factory=list)
    first_step: float = 0.0  # seconds after the start of the process
    failed: NotFinite | None = None  # where it ended

    @property
    def next_stage(self) -> Stage | None:
        """The steps that come now; None after the last, and for a shot that failed."""
        coming = [stage for stage in self.shot.stages if stage.steps.start == self.step]
        return coming[0] if coming and not self.failed else None


def begin(shot: Shot, force: bool) -> Underway:
    """A shot before its first step, or where an earlier run left it: see `wait`. The state of another
    job, or with `force` any, is moved aside."""
    try:
        state, facts = latents.load_state(shot.state)
    except EntryError:
        state, facts = None, {"latents_key": None}
    unmeasured = shot.measure and not facts.get("measured")
    if state is None or force or facts["latents_key"] != shot.latents_key or unmeasured:
        files.set_aside(shot.state)
        return Underway(shot)
    read = {(step, branch, block) for step, branch, block in facts["read"]}
    past = {name: facts[name] for name in ("effects", "differences", "phases")}
    return Underway(shot, facts["step"], state, read, **past)


def wait(one: Underway) -> None:
    """Makes the state of a shot durable on disk, so that another run goes on from here bit for bit."""
    assert one.state is not None
    facts = {
        "latents_key": one.shot.latents_key,
        "step": one.step,
        "measured": one.shot.measure,
        "read": sorted(one.read),
        "effects": one.effects,
        "differences": one.differences,
        "phases": one.phases,
    }
    latents.save_state(one.shot.state, one.state, record.plain(facts))


def advance(
    group: Sequence[Underway],
    model: WanModel,
    load: Record,
    patches: Patches,
    loras: Loras,
    encoded: Mapping[str, Encoded],
    progress: Progress,
) -> None:
    """Takes the steps of the next stage with its network, all shots of a group in lock-step.

    A shot that meets NaN or Inf has `failed`; the others go on.
    """
    import torch

    from wancli import sample

    stages = [stage for one in group if (stage := one.next_stage)]
    steps, expert = stages[0].steps, stages[0].expert  # those of the others, too
    device = group[0].shot.model.device
    texts = {text.id for one in group for text in one.shot.texts}
    rows_NE = {id: encoded[id].embedding.rows_NE.to(device) for id in texts}
    with (
        torch.inference_mode(),
        Peak() as peak,
        progress.phase(title(group), "sample", len(steps)) as bar,
    ):
        patches.at(loras, steps[0], expert)
        contexts = sample.Contexts(model, rows_NE)
        _start([one for one in group if one.state is None], model, encoded)
        walks = [_walk(one, stage, contexts) for one, stage in zip(group, stages)]
        for step, now in zip(steps, sample.denoise_together(model, walks, _riders(group))):
            for one, at in zip(group, now):
                _note(one, at)
            bar.advance(note=f"sigma {walks[0].schedule.sigmas[step + 1]:.3f}")
            if all(one.failed for one in group):
                break
            if step + 1 in steps and patches.at(loras, step + 1, expert):
                contexts.forget()
    shared = record.phase("sample", peak) | {"shots": len(group)}
    for one, walk in zip(group, walks):
        assert one.state is not None
        one.state = one.state.to("cpu")
        one.effects += [asdict(effect) for effect in walk.effects or ()]
        one.phases += [load, shared]


def title(group: Sequence[Underway]) -> str:
    """What people read of a group: the id of its shot, or how many and which they are."""
    first, last = group[0].shot.id, group[-1].shot.id
    return first if len(group) == 1 else f"{len(group)} shots, {first} to {last}"


def _riders(group: Sequence[Underway]) -> int:
    """Forwards on a pass over the blocks: all of the group where the pass fetches weights."""
    resident = group[0].shot.model.residency == "resident"
    return 1 if resident else sum(one.shot.riders for one in group)


def _start(group: Sequence[Underway], model: WanModel, encoded: Mapping[str, Encoded]) -> None:
    """Noise, and how different the injected prompts are."""
    from wancli import sample
    from wancli.difference import compare_all

    pairs = {(one.shot.prompt.id, text.id): None for one in group for text in one.shot.injected}
    embeddings = [(encoded[main].embedding, encoded[other].embedding) for main, other in pairs]
    differences = dict(zip(pairs, compare_all(embeddings, model)))
    for one in group:
        shot = one.shot
        one.state = State(sample.noise(shot.latent_shape, shot.seed, shot.noise))
        one.differences = [differences[shot.prompt.id, text.id].as_dict() for text in shot.injected]


def _walk(one: Underway, stage: Stage, contexts: Contexts) -> Walk:
    from wancli import sample

    assert one.state is not None
    shot, state = one.shot, one.state.to(one.shot.model.device)
    effects: list[Effect] | None = [] if shot.measure else None
    return sample.Walk(state, shot.schedule, shot.solver, shot.table, contexts, stage, effects)


def _note(one: Underway, at: Sampled | NotFinite) -> None:
    """What a step has left."""
    if isinstance(at, NotFinite):
        one.failed = at
        return
    one.step, one.state = at.step, at.state
    one.read |= at.read
    one.first_step = one.first_step or record.since_start()


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
        "effects": one.effects,
        "first_step_after": one.first_step,
        "phases": [stage1, *one.phases],
    }
    facts = record.plain(facts)
    files.set_aside(shot.latents)  # another shot's, or with --force this one's
    latents.save(shot.latents, one.state.x, facts)
    return one.state.x, facts
