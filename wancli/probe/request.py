"""Plan a probe: which shot, which noise levels, which blocks, how much memory. Build the block map.

Loads without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

from wancli.engine.manifest_body import versions
from wancli.errors import DoesNotFit, JobError
from wancli.injection import block_map
from wancli.injection.block_map import Attended, BlockMap, MeasuredBranch, Method
from wancli.injection.selectors import NAMED_BLOCKS, parse_blocks
from wancli.injection.table import Rule
from wancli.plan import memory_estimate, memory_policy
from wancli.plan.pictures import InjectedPicture
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Prompt, Shot
from wancli.probe.parts import By, check_parts
from wancli.resources import memory_model
from wancli.resources.memory_model import FP32, Phase
from wancli.units import format_bytes

DEFAULT_LEVELS = 3
UNITS: dict[Method, str] = {
    "inject": "relative change of the velocity",
    "skip": "relative change of the velocity",
    "gradient": "relative change of the velocity, by first order",
    "render": "mean |difference| of 8-bit pixels",
}


@dataclass(frozen=True)
class Subject:
    """The prompt or the picture whose effect is measured, and the rule that injects it."""

    rule: Rule
    injected: Prompt | InjectedPicture

    @property
    def attended(self) -> Attended:
        return "image" if self.rule.image else "text"


@dataclass(frozen=True)
class Measured:
    """The values of one branch: a row for each level, the total, and how many blocks read another context."""

    values: list[list[float]]
    total: list[float]
    hits: int | None = None
    parts: dict[str, list[float]] | None = None  # the total of each part of the video, if they are told apart
    changes: dict[str, list[float]] | None = None  # in pixels, by kind


@dataclass(frozen=True)
class ProbeRequest:
    """What a probe measures. `ranges` are single blocks if `per_block`."""

    job: str
    shot: Shot
    method: Method
    levels: tuple[int, ...]  # steps
    ranges: tuple[tuple[int, ...], ...]
    per_block: bool
    by: By | None = None  # parts of the video that are told apart

    @property
    def depth(self) -> int:
        return self.shot.model.checkpoint.transformer_config.num_layers

    @property
    def plain_shot(self) -> Shot:
        """The shot without its injections and its step cache."""
        return replace(self.shot, rules=(), injected=(), measure=False, cache=None)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The first prompt and the first picture that the shot injects, if it does."""
        found: dict[bool, Subject] = {}
        for rule, injected in zip(self.shot.rules, self.shot.injected, strict=True):
            found.setdefault(rule.image, Subject(rule, injected))
        return tuple(found[image] for image in sorted(found))

    @property
    def encoded_shot(self) -> Shot:
        """The plain shot, and the prompt and the picture that are encoded for it to read, too."""
        return replace(self.plain_shot, injected=tuple(subject.injected for subject in self.subjects))


def plan_probe(
    plan: Plan,
    method: Method,
    levels: int | None,
    ranges: str | None,
    shot_id: str | None,
    by: By | None = None,
) -> ProbeRequest:
    """Choose the shot, the noise levels and the ranges of blocks. Raises JobError if the plan lacks them."""
    candidates = [shot for shot in plan.shots if shot.injected]
    if shot_id is not None:
        candidates = [shot for shot in candidates if shot.id == shot_id]
    if not candidates:
        subject = "no shot" if shot_id is None else f"no shot {shot_id!r} that"
        raise JobError(
            f"{subject} injects a prompt or a picture, so there is nothing to measure",
            where="--shot" if shot_id else plan.name,
            hint="Give the job `inject: [{prompt: ...}]`, or `{image: ...}`; `wancli plan` lists its shots.",
        )
    shot = candidates[0]
    if shot.continues:
        raise JobError(
            f"shot {shot.id} continues shot {shot.continues.id}; a probe measures one shot alone",
            where="--shot" if shot_id else plan.name,
            hint="Render the other shot, and name its kept frame: image: NAME.frame80.png",
        )
    if shot.timeline:
        raise JobError(
            f"the prompt of shot {shot.id} changes over the frames; a probe measures one prompt",
            where="--shot" if shot_id else plan.name,
            hint="Give the shot one of its prompts: `--set prompt='...'`.",
        )
    if by:
        check_parts(by, shot, method)
    levels = min(DEFAULT_LEVELS, shot.steps) if levels is None else levels
    if not 1 <= levels <= shot.steps:
        raise JobError(f"{levels} is not within 1 and the {shot.steps} steps", where="--levels")
    depth = shot.model.checkpoint.transformer_config.num_layers
    if ranges is None and method == "render":
        ranges = str(min(8, depth))
    blocks = [(block,) for block in range(depth)] if ranges is None else _parse_ranges(ranges, depth)
    # The first step of each of `levels` equal parts, since early steps change the video most.
    steps = tuple(i * shot.steps // levels for i in range(levels))
    return ProbeRequest(
        plan.name, shot, method, () if method == "render" else steps, tuple(blocks), ranges is None, by
    )


def _parse_ranges(spec: str, depth: int) -> list[tuple[int, ...]]:
    """Parse `8`, a number of ranges of nearly equal length, or sets of blocks: `early,middle,27-39`."""
    if spec.isdecimal():
        count = int(spec)
        if not 1 <= count <= depth:
            raise JobError(f"{depth} blocks cannot be split into {spec} ranges", where="--ranges")
        borders = [round(i * depth / count) for i in range(count + 1)]
        return [tuple(range(a, b)) for a, b in pairwise(borders)]
    try:
        return [parse_blocks(part.strip(), depth) for part in spec.split(",")]
    except ValueError as error:
        hint = f"A number of ranges, or sets of blocks: 0-9,27-39 or {','.join(NAMED_BLOCKS[1:4])}."
        raise JobError(str(error), where="--ranges", hint=hint) from None


def max_forwards_per_pass(probe: ProbeRequest, *, encoded: bool) -> int:
    """Return how many forwards share a pass over the blocks: 1 for resident weights, else as many as fit.

    `encoded`: all prompts are in the cache. Raises DoesNotFit if not even one forward fits, and JobError if
    the model has no gradients and the method needs them.
    """
    model, limit = probe.shot.model, probe.shot.model.memory_limit
    if probe.method == "gradient":
        _refuse_without_gradients(probe.shot)
    smallest = predict_phase(probe, 1)
    need = memory_estimate.process_bytes(model) + smallest.total
    if not encoded:
        tokens = [len(text.tokens.ids) for text in probe.encoded_shot.prompts]
        need = max(
            need,
            memory_estimate.process_bytes(model) + memory_estimate.predict_encoding(model, tokens).total,
        )
    pictures = [
        phase for phase in memory_estimate.predict_phases(probe.encoded_shot) if phase.name == "pictures"
    ]
    need = max([need, *(memory_estimate.process_bytes(model) + phase.total for phase in pictures)])
    if need > limit:
        raise DoesNotFit(
            f"probing needs {format_bytes(need)} of memory, {memory_policy.describe_limit(model)}",
            where=f"shot {probe.shot.id}",
            hint=_memory_hint(probe),
        )
    if model.residency == "resident":
        return 1
    headroom = limit - memory_estimate.process_bytes(model)
    forks = len(probe.ranges) * len(probe.subjects)
    return max(n for n in range(1, forks + 1) if n == 1 or predict_phase(probe, n).total <= headroom)


def _refuse_without_gradients(shot: Shot) -> None:
    model, obstacle = shot.model, None
    checkpoint = model.checkpoint
    if model.residency != "resident":
        obstacle = f"{model.residency} weights"
    elif model.kernels.fp8_matmul:
        obstacle = "fp8 matmuls"
    elif model.kernels.attention == "sage":
        obstacle = "SageAttention"
    elif shot.pictures and not checkpoint.transformer_config.joins_frames:
        # Its tokens run apart from the others, and the strengths are those of all tokens.
        obstacle = "a given first frame in place of noise"
    if obstacle:
        raise JobError(
            f"gradient is not available with {obstacle}",
            where="--method",
            hint="Use --method inject, or change `memory` if that fits.",
        )


def _memory_hint(probe: ProbeRequest) -> str:
    hints = ["Fewer frames, or a smaller size: `--set frames=17`."]
    if probe.method == "gradient":
        hints.append("--method inject keeps two residual streams instead of one for each block.")
    elif probe.shot.model.residency != "streamed":
        hints.append("Or `--set memory.residency=streamed`.")
    return " ".join(hints)


def predict_phase(probe: ProbeRequest, forks: int) -> Phase:
    """Predict the memory of measuring one level, with `forks` forwards in a pass beside the plain one."""
    shot, wan = probe.plain_shot, probe.shot.model.checkpoint.transformer_config
    rows = sum(probe.encoded_shot.context_rows.values())
    sampling = memory_estimate.predict_sampling(shot, rows, 1 + forks)
    activation = sampling.activation
    if probe.method == "gradient":
        element = memory_estimate.ELEMENT_BYTES[shot.model.compute_dtype]
        activation = max(activation, memory_model.derivative_bytes(wan, shot.tokens, element_bytes=element))
    forwards = len(probe.ranges) * len(probe.subjects) + 1
    velocities = FP32 * forwards * math.prod(shot.latent_shape)
    return Phase("probe", sampling.model, activation, sampling.buffer + velocities)


def build_map(
    probe: ProbeRequest, measured: Mapping[Attended, Measured], seconds: float, forwards: float
) -> BlockMap:
    """Build the map from the measured values and the facts of the shot."""
    shot, model = probe.shot, probe.shot.model
    ranges = None if probe.per_block else [list(r) for r in probe.ranges]
    text = _build_branch(probe, "text", measured, ranges)
    return BlockMap(
        job=probe.job,
        shot=shot.id,
        model=block_map.MapModel(
            root=str(model.checkpoint.root), sha256=model.transformer, blocks=probe.depth
        ),
        loras=[use.path.name for use in shot.loras],
        method=probe.method,
        prompts=[block_map.PromptPair(main=text.main, injected=text.injected, ids=text.ids)] if text else [],
        size=f"{shot.width}x{shot.height}",
        frames=shot.frames,
        seed=shot.seed,
        levels=[
            block_map.NoiseLevel(step=step, sigma=shot.sigma_schedule.sigmas[step]) for step in probe.levels
        ],
        unit=UNITS[probe.method],
        values=text.values if text else [],
        ranges=ranges,
        total=text.total if text else [],
        suggestion=text.suggestion if text else "",
        seconds=round(seconds, 3),
        forwards=round(forwards, 2),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hits=text.hits if text else None,
        parts=text.parts if text else None,
        changes=text.changes if text else None,
        image=_build_branch(probe, "image", measured, ranges),
    )


def _build_branch(
    probe: ProbeRequest,
    attended: Attended,
    measured: Mapping[Attended, Measured],
    ranges: list[list[int]] | None,
) -> MeasuredBranch | None:
    """Build a branch of the map; None if the shot injects nothing into it."""
    shot = probe.shot
    subject = next((subject for subject in probe.subjects if subject.attended == attended), None)
    if subject is None:
        return None
    if isinstance(subject.injected, InjectedPicture):
        given = shot.pictures.frames if shot.pictures else ()
        main, injected = ", ".join(frame.source.name for frame in given), subject.injected.source.name
        main_id = shot.clip_id or ""
    else:
        main, injected, main_id = shot.prompt.tokens.text, subject.injected.tokens.text, shot.prompt.id
    found = measured[attended]
    return MeasuredBranch(
        main=main,
        injected=injected,
        ids=[main_id, subject.injected.id],
        values=found.values,
        total=found.total,
        suggestion=block_map.suggest_blocks(found.total, ranges),
        hits=found.hits,
        parts=found.parts,
        changes=found.changes,
    )
