"""Compile the injections of a job for a model's depth and a schedule. Refuse rules without an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from wancli.errors import JobError
from wancli.injection.block_map_store import AutoBlocks, BlockMapStore
from wancli.injection.exprs import Branch, Concat, Emphasis, Expr, Image, Lerp, Nag, Select, Steer, Text
from wancli.injection.selectors import pair_strengths, parse_blocks, parse_steps
from wancli.injection.table import Rule
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.job.schema_rules import InjectRule
from wancli.job.schema_values import Blocks, CurveSpec, SigmaRange, Steps, Strength
from wancli.plan import word_rules
from wancli.plan.model_spec import ModelSpec
from wancli.plan.pictures import InjectedPicture
from wancli.plan.shot import Prompt, Shot
from wancli.sampling.stages import Stage


def compile_rules(
    item: Item,
    prompt: Prompt,
    clip_id: str | None,
    injected: Sequence[Prompt | InjectedPicture],
    model: ModelSpec,
    maps: BlockMapStore,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
) -> tuple[tuple[Rule, ...], tuple[AutoBlocks, ...]]:
    """Compile the rules of a shot. Also returns the blocks that measured maps chose for them.

    `prompt` and `clip_id` are what blocks read without rules, and `injected` has what each rule injects.
    Raises JobError.
    """
    depth = model.checkpoint.transformer_config.num_layers
    rules: list[Rule] = []
    auto_blocks: list[AutoBlocks] = []
    problems = Problems()
    for i, (inject, other) in enumerate(zip(item.job.inject, injected, strict=True)):
        blocks: Blocks = "all"  # if their map is missing
        with problems.collect(), locate_errors(item, "inject", i, "blocks"):
            choose = partial(maps.select_blocks, rule=i, transformer=model.transformer, depth=depth)
            if isinstance(other, InjectedPicture):
                choose = partial(choose, ids=(clip_id or "", other.id), attended="image")
            else:
                choose = partial(choose, ids=(prompt.id, other.id))
            blocks, auto = _select_auto_blocks(inject.blocks, choose)
            auto_blocks += auto
        with problems.collect():
            rules.append(_compile_rule(item, i, inject, blocks, other, depth, sigmas, stages))
    problems.raise_all()
    return tuple(rules), tuple(auto_blocks)


def _select_auto_blocks(
    spec: Blocks, choose: Callable[[str], tuple[list[int], AutoBlocks | None]]
) -> tuple[Blocks, list[AutoBlocks]]:
    """Replace sets like `auto:top8` by the blocks that a measured map chooses. Also returns these choices."""
    blocks: list[str | int] = []
    auto_blocks = []
    for part in spec if isinstance(spec, list) else [spec]:
        if isinstance(part, str) and part.startswith("auto"):
            chosen, auto = choose(part)
            blocks += chosen
            auto_blocks += [auto] if auto else []
        else:
            blocks.append(part)
    return blocks, auto_blocks


def _compile_rule(
    item: Item,
    index: int,
    inject: InjectRule,
    block_spec: Blocks,
    other: Prompt | InjectedPicture,
    depth: int,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
) -> Rule:
    key = ("inject", index)
    problems = Problems()
    with problems.collect(), locate_errors(item, *key, "blocks"):
        blocks = parse_blocks(block_spec, depth)
    with problems.collect(), locate_errors(item, *key, "steps"):
        steps = select_steps(inject.steps, sigmas)
    problems.raise_all()
    steps = narrow_to_expert(item, key, inject.expert, steps, stages)
    with locate_errors(item, *key, "strength"):
        by_block = pair_strengths(to_curve(inject.strength), blocks)
    with locate_errors(item, *key, "step_strength"):
        by_step = pair_strengths(to_curve(inject.step_strength), steps)
    products = {s * f for s in {s for _, s in by_block} for f in {f for _, f in by_step}}
    if inject.blend == "replace" and products - {0.0, 1.0}:
        raise JobError(
            "replace needs strength 1",
            where=item.location(*key, "strength"),
            hint="Try blend: context-lerp.",
        )
    if inject.blend == "concat" and min(products, default=0.0) < 0:
        raise JobError("concat needs strengths above 0", where=item.location(*key, "strength"))
    branches: tuple[Branch, ...] = ("cond", "uncond") if inject.branch == "both" else (inject.branch,)
    is_picture = isinstance(other, InjectedPicture)
    rule = Rule(other.id, by_block, by_step, branches, inject.blend, inject.gain, is_picture)
    nag = word_rules.read_nag(item, index, inject, min(products, default=0.0))
    words, rows = word_rules.select_words(item, index, inject, other)
    return replace(rule, nag=nag, words=words, rows=rows)


def narrow_to_expert(
    item: Item, key: tuple[str | int, ...], expert: str, steps: Sequence[int], stages: Sequence[Stage]
) -> tuple[int, ...]:
    """Return those of the steps that an expert takes. Raises JobError if the model has none."""
    if expert == "both":
        return tuple(steps)
    if stages[0].expert == "only":
        raise no_experts_error(item, *key, "expert")
    of_expert = {step for stage in stages if stage.expert == expert for step in stage.steps}
    return tuple(step for step in steps if step in of_expert)


def select_steps(spec: Steps, sigmas: Sequence[float]) -> tuple[int, ...]:
    """Select the steps of a rule or a LoRA. Raises ValueError."""
    return parse_steps((spec.sigma[0], spec.sigma[1]) if isinstance(spec, SigmaRange) else spec, sigmas)


def to_curve(strength: Strength) -> Any:
    """Return strengths as `pair_strengths` takes them."""
    return strength.to_curve() if isinstance(strength, CurveSpec) else strength


def refuse_rules_without_effect(shot: Shot, item: Item) -> None:
    """Refuse a rule that no cell reads. A rule of strength 0 is allowed: the user asked for it."""
    for i, (rule, reached) in enumerate(zip(shot.rules, shot.table.changed_cells)):
        cells = (shot.table.row(step, branch)[block] for step, branch, block in reached)
        if any(_contains_text(expr, rule.text) for cell in cells for expr, _ in cell):
            continue
        if rule.steps and rule.blocks and not rule.is_active:
            continue
        if reached:
            why, hint = "later rules replace every cell that it changes", "Rules apply in the order written."
        elif not rule.blocks:
            depth = shot.model.checkpoint.transformer_config.num_layers
            why, hint = f"this range is empty in a model of {depth} blocks", "Give numbers."
        elif "cond" not in rule.branches and (rule.steps or not shot.negative):
            why, hint = "guidance 1 has no uncond branch", "Set branch: cond, or a guidance above 1."
        else:
            why, hint = (
                f"none of the {shot.steps} steps is in its range",
                "`wancli plan -v` prints the sigmas.",
            )
        raise JobError(f"reaches no block: {why}", where=item.location("inject", i), hint=hint)


def _contains_text(expr: Expr | Nag, text: str) -> bool:
    match expr:
        case Text(id) | Image(id):
            return id == text
        case Steer(inner) | Emphasis(inner) | Nag(inner):
            return _contains_text(inner, text)
    return _contains_text(expr.a, text) or _contains_text(expr.b, text)


def refuse_gain_over_time(shot: Shot, item: Item) -> None:
    """Refuse to extrapolate from a prompt that changes over the frames."""
    for i, rule in enumerate(shot.rules if shot.timeline else ()):
        if rule.gain != 1 and not rule.image:
            raise JobError(
                "extrapolates from the prompt, and that changes over the frames",
                where=item.location("inject", i, "gain"),
                hint="Leave it out; blend: context-lerp extrapolates with a strength above 1.",
            )


def refuse_lerp_after_concat(shot: Shot, item: Item) -> None:
    """Refuse a context-lerp, or words, after a concat: joined rows have no counterparts."""
    if not any(rule.blend == "concat" for rule in shot.rules):
        return
    rows = {
        shot.table.row(step, branch) for branch, steps in shot.table.steps_by_branch.items() for step in steps
    }
    for block, expr in ((block, expr) for row in rows for block, cell in enumerate(row) for expr, _ in cell):
        while isinstance(expr, Emphasis | Steer):
            expr = expr.expr
        while isinstance(expr, Lerp | Concat | Select):
            if isinstance(expr, Lerp | Select) and isinstance(expr.a, Concat):
                what = "context-lerp follows" if isinstance(expr, Lerp) else "words follow"
                raise JobError(
                    f"{what} concat in block {block}; joined rows cannot be interpolated",
                    where=item.location("inject"),
                    hint="Put the concat rule last, or use blend: output-mix.",
                )
            expr = expr.a


@contextmanager
def locate_errors(item: Item, *path: str | int) -> Iterator[None]:
    """Add the file, line and key to the errors of a parser."""
    try:
        yield
    except JobError as error:
        raise JobError(error.message, where=item.location(*path), hint=error.hint) from None
    except ValueError as error:
        raise JobError(str(error), where=item.location(*path)) from None


def no_experts_error(item: Item, *path: str | int) -> JobError:
    return JobError(
        "the model has one network for all steps, not two experts",
        where=item.location(*path),
        hint="Only Wan 2.2 A14B has a high-noise and a low-noise expert.",
    )
