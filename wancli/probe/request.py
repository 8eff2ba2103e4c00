"""What `wancli probe` measures: which shot, where on its way, which blocks; the memory that takes, and the
map that comes of it. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

from wancli.engine.manifest_body import versions
from wancli.errors import DoesNotFit, JobError
from wancli.injection import block_map
from wancli.injection.block_map import Map, Method
from wancli.injection.table import NAMED_BLOCKS, parse_blocks
from wancli.plan import memory_estimate, memory_policy
from wancli.plan.shot import Model, Plan, Prompt, Shot
from wancli.resources import memory_model
from wancli.resources.memory_model import FP32, Phase
from wancli.units import format_bytes

LEVELS = 3  # unless somebody says another number
UNITS: dict[Method, str] = {
    "inject": "relative change of the velocity",
    "skip": "relative change of the velocity",
    "gradient": "relative change of the velocity, by first order",
    "render": "mean |difference| of 8-bit pixels",
}


@dataclass(frozen=True)
class Survey:
    """What is to be measured, decided. `ranges` are single blocks unless they were asked for."""

    job: str
    shot: Shot
    method: Method
    levels: tuple[int, ...]  # steps
    ranges: tuple[tuple[int, ...], ...]
    single: bool

    @property
    def depth(self) -> int:
        return self.shot.model.checkpoint.transformer.num_layers

    @property
    def plain(self) -> Shot:
        """The shot without its injections."""
        return replace(self.shot, rules=(), injected=(), measure=False, shared=None, fork=None)

    @property
    def texts(self) -> tuple[Prompt, ...]:
        """Those of the plain shot, and the injected one last."""
        return (*self.plain.texts, self.shot.injected[0])


def survey(plan: Plan, method: Method, levels: int | None, ranges: str | None, shot_id: str | None) -> Survey:
    """Decides what to measure of a plan. Raises JobError for what it does not have."""
    injecting = [shot for shot in plan.shots if shot.rules]
    if shot_id is not None:
        injecting = [shot for shot in injecting if shot.id == shot_id]
    if not injecting:
        who = "no shot" if shot_id is None else f"no shot {shot_id!r} that"
        raise JobError(
            f"{who} injects a prompt, so there is nothing to measure",
            where="--shot" if shot_id else plan.name,
            hint="Give the job `inject: [{prompt: ...}]`; `wancli plan` lists its shots.",
        )
    shot = injecting[0]
    levels = min(LEVELS, shot.steps) if levels is None else levels
    if not 1 <= levels <= shot.steps:
        raise JobError(f"{levels} is not within 1 and the {shot.steps} steps", where="--levels")
    depth = shot.model.checkpoint.transformer.num_layers
    if ranges is None and method == "render":
        ranges = str(min(8, depth))
    blocks = [(block,) for block in range(depth)] if ranges is None else _ranges(ranges, depth)
    # Where each part of the way begins: what is decided early moves the video most.
    steps = tuple(i * shot.steps // levels for i in range(levels))
    return Survey(plan.name, shot, method, () if method == "render" else steps, tuple(blocks), ranges is None)


def _ranges(said: str, depth: int) -> list[tuple[int, ...]]:
    """`8`: so many ranges of equal length, or nearly; else sets of blocks: `early,middle,27-39`."""
    if said.isdecimal():
        count = int(said)
        if not 1 <= count <= depth:
            raise JobError(f"{depth} blocks do not make {said} ranges", where="--ranges")
        borders = [round(i * depth / count) for i in range(count + 1)]
        return [tuple(range(a, b)) for a, b in pairwise(borders)]
    try:
        return [parse_blocks(part.strip(), depth) for part in said.split(",")]
    except ValueError as error:
        hint = f"A number of ranges, or sets of blocks: 0-9,27-39 or {','.join(NAMED_BLOCKS[1:4])}."
        raise JobError(str(error), where="--ranges", hint=hint) from None


def riders(asked: Survey, *, encoded: bool) -> int:
    """How many forwards share a pass over the blocks: one where weights are resident, else as many as fit.

    Raises DoesNotFit where not even one does. `encoded`: all prompts are in the cache.
    """
    model, allowed = asked.shot.model, memory_policy.limit(asked.shot.model)
    if asked.method == "gradient":
        _refuse_without_gradients(model)
    least = phase(asked, 1)
    needed = memory_estimate.process(model) + least.total
    if not encoded:
        tokens = [len(text.tokens.ids) for text in asked.texts]
        needed = max(needed, memory_estimate.process(model) + memory_estimate.encoding(model, tokens).total)
    if needed > allowed:
        raise DoesNotFit(
            f"probing needs {format_bytes(needed)} of memory, {memory_policy.told(model, allowed)}",
            where=f"shot {asked.shot.id}",
            hint=_way_out(asked),
        )
    if model.residency == "resident":
        return 1
    room = allowed - memory_estimate.process(model)
    return max(n for n in range(1, len(asked.ranges) + 1) if n == 1 or phase(asked, n).total <= room)


def _refuse_without_gradients(model: Model) -> None:
    lacking = None
    if model.residency != "resident":
        lacking = f"weights that are {model.residency}"
    elif model.kernels.fp8_matmul:
        lacking = "products in fp8"
    elif model.kernels.attention == "sage":
        lacking = "SageAttention"
    if lacking:
        raise JobError(
            f"gradient does not go back over {lacking}",
            where="--method",
            hint="--method inject does not need to; or set memory otherwise, if it fits.",
        )


def _way_out(asked: Survey) -> str:
    found = ["Fewer frames, or a smaller size: `--set frames=17`."]
    if asked.method == "gradient":
        found.append("--method inject keeps two residual streams instead of one for each block.")
    elif asked.shot.model.residency != "streamed":
        found.append("Or `--set memory.residency=streamed`.")
    return " ".join(found)


def phase(asked: Survey, forks: int) -> Phase:
    """Predicted memory of measuring one level, with so many forwards on a pass beside the plain one."""
    shot, wan = asked.plain, asked.shot.model.checkpoint.transformer
    rows = sum(text.rows for text in asked.texts)
    found = memory_estimate.sampling(shot, rows, 1 + forks)
    activation = found.activation
    if asked.method == "gradient":
        element = memory_estimate.ELEMENT[shot.model.computes]
        activation = max(activation, memory_model.derivative_bytes(wan, shot.tokens, element_bytes=element))
    velocities = FP32 * (len(asked.ranges) + 1) * math.prod(shot.latent_shape)
    return Phase("probe", found.model, activation, found.buffer + velocities)


def found_map(
    asked: Survey, rows: list[list[float]], total: list[float], seconds: float, forwards: float
) -> Map:
    """What was measured, with all that tells of what."""
    shot, model = asked.shot, asked.shot.model
    ranges = None if asked.single else [list(r) for r in asked.ranges]
    texts = (shot.prompt, shot.injected[0])
    return Map(
        job=asked.job,
        shot=shot.id,
        model=block_map.MapModel(
            root=str(model.checkpoint.root), sha256=model.transformer, blocks=asked.depth
        ),
        loras=[use.path.name for use in shot.loras],
        method=asked.method,
        prompts=[
            block_map.Prompts(
                main=texts[0].tokens.text, injected=texts[1].tokens.text, ids=[text.id for text in texts]
            )
        ],
        size=f"{shot.width}x{shot.height}",
        frames=shot.frames,
        seed=shot.seed,
        levels=[block_map.Level(step=step, sigma=shot.schedule.sigmas[step]) for step in asked.levels],
        unit=UNITS[asked.method],
        values=rows,
        ranges=ranges,
        total=total,
        suggestion=block_map.suggestion(total, ranges),
        seconds=round(seconds, 3),
        forwards=round(forwards, 2),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
