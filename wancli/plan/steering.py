"""Compile `steer`: prompts toward which, and away from which, what blocks read is moved, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from wancli.errors import JobError
from wancli.injection.selectors import pair_strengths, parse_blocks
from wancli.injection.tuning import SteerRule
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.plan.areas import MaskReader, VideoShape, compile_area
from wancli.plan.injections import locate_errors, narrow_to_expert, select_steps, to_curve
from wancli.plan.model_spec import ModelSpec
from wancli.plan.prompts import PromptResolver
from wancli.plan.shot import Prompt
from wancli.sampling.stages import Stage


class Steering(NamedTuple):
    """The vectors of a shot, and the distinct prompts that they are made of."""

    rules: tuple[SteerRule, ...] = ()
    prompts: tuple[Prompt, ...] = ()


def compile_steering(
    item: Item,
    model: ModelSpec,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
    video: VideoShape,
    masks: MaskReader,
) -> Steering:
    """Compile the entries of a shot; those of strength 0 change nothing and are left out. Raises JobError."""
    problems = Problems()
    rules: list[SteerRule] = []
    prompts: dict[str, Prompt] = {}
    for index in range(len(item.job.steer)):
        with problems.collect():
            rule, own = _compile_entry(item, index, model, sigmas, stages, video, masks)
            if any(s * f for _, s in rule.blocks for _, f in rule.steps):
                rules.append(rule)
                prompts |= {prompt.id: prompt for prompt in own}
    problems.raise_all()
    return Steering(tuple(rules), tuple(prompts.values()))


def _compile_entry(
    item: Item,
    index: int,
    model: ModelSpec,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
    video: VideoShape,
    masks: MaskReader,
) -> tuple[SteerRule, tuple[Prompt, ...]]:
    entry, key = item.job.steer[index], ("steer", index)
    prompts, problems = PromptResolver(item, model), Problems()
    toward: tuple[Prompt, ...] = ()
    away, area = toward, None
    blocks: Sequence[int] = ()
    steps: Sequence[int] = ()
    with problems.collect():
        toward = _resolve(item, index, "toward", prompts)
    with problems.collect():
        away = _resolve(item, index, "away", prompts)
    with problems.collect():
        if entry.file is not None:
            if entry.toward or entry.away:
                raise JobError(
                    "stands for `toward` and `away`: give one or the other", where=item.location(*key, "file")
                )
            toward, away = prompts.resolve_roles(entry.file, *key, "file").values()
    with problems.collect(), locate_errors(item, *key, "blocks"):
        blocks = parse_blocks(entry.blocks, model.checkpoint.transformer_config.num_layers)
    with problems.collect(), locate_errors(item, *key, "steps"):
        steps = select_steps(entry.steps, sigmas)
    with problems.collect():
        area = compile_area(item, key, entry, video, masks)
    problems.raise_all()
    steps = narrow_to_expert(item, key, entry.expert, steps, stages)
    _refuse_without_effect(item, index, toward, away, blocks, steps)
    with locate_errors(item, *key, "strength"):
        by_block = pair_strengths(to_curve(entry.strength), blocks)
    with locate_errors(item, *key, "step_strength"):
        by_step = pair_strengths(to_curve(entry.step_strength), steps)
    toward_ids, away_ids = (tuple(prompt.id for prompt in side) for side in (toward, away))
    return SteerRule(toward_ids, away_ids, by_block, by_step, area), (*toward, *away)


def _resolve(
    item: Item, index: int, side: Literal["toward", "away"], prompts: PromptResolver
) -> tuple[Prompt, ...]:
    """Resolve the prompts of one side of an entry, none if it has none."""
    entry = item.job.steer[index]
    given = entry.toward if side == "toward" else entry.away
    if given is None:
        return ()
    if not isinstance(given, list):
        return (prompts.resolve(given, "steer", index, side),)
    problems = Problems()
    found = []
    for i, spec in enumerate(given):
        with problems.collect():
            found.append(prompts.resolve(spec, "steer", index, side, i))
    problems.raise_all()
    return tuple(found)


def _refuse_without_effect(
    item: Item,
    index: int,
    toward: Sequence[Prompt],
    away: Sequence[Prompt],
    blocks: Sequence[int],
    steps: Sequence[int],
) -> None:
    """Refuse an entry that has no prompt, whose vector is 0, or that no block reads."""
    where = item.location("steer", index)
    if not toward and not away:
        hint = "Write `toward: a smiling face`, or `away: a sad face`, or both."
        raise JobError("steers neither toward nor away from a prompt", where=where, hint=hint)
    if sorted(prompt.id for prompt in toward) == sorted(prompt.id for prompt in away):
        raise JobError("steers toward the prompts that it steers away from: nothing changes", where=where)
    if not blocks or not steps:
        what = "step" if blocks else "block"
        raise JobError(f"reaches no block: no {what} is in its range", where=where)
