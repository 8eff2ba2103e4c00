"""The injections of a job, compiled for a model's depth and a schedule; refused where they reach nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from wancli.errors import JobError
from wancli.injection.block_map import Choice, Shelf
from wancli.injection.table import (
    Branch,
    Concat,
    Expr,
    Lerp,
    Rule,
    Text,
    parse_blocks,
    parse_steps,
    strengths,
)
from wancli.job.loader import Item
from wancli.job.schema import Blocks, CurveSpec, Inject, SigmaRange, Strength
from wancli.plan.shot import ModelSpec, Prompt, Shot
from wancli.sampling.stages import Stage


def compiled(
    item: Item,
    texts: Sequence[Prompt],
    model: ModelSpec,
    shelf: Shelf,
    sigmas: Sequence[float],
    parts: Sequence[Stage],
) -> tuple[tuple[Rule, ...], tuple[Choice, ...]]:
    """The rules of a shot, and the blocks that measured maps chose for them. `texts` are its prompt and the
    injected ones. Raises JobError."""
    main, *injected = (text.id for text in texts)
    depth = model.checkpoint.transformer.num_layers
    rules: list[Rule] = []
    choices: list[Choice] = []
    for i, (said, text) in enumerate(zip(item.job.inject, injected, strict=True)):
        with _blaming(item, "inject", i, "blocks"):
            blocks, found = _measured(said.blocks, i, shelf, model.transformer, depth, (main, text))
        choices += found
        rules.append(_compiled(item, i, said, blocks, text, depth, sigmas, parts))
    return tuple(rules), tuple(choices)


def _measured(
    said: Blocks, index: int, shelf: Shelf, transformer: str, depth: int, ids: tuple[str, str]
) -> tuple[Blocks, list[Choice]]:
    """The blocks with numbers for what is left to a map, as `auto:top8`, and what these became."""
    blocks: list[str | int] = []
    choices = []
    for part in said if isinstance(said, list) else [said]:
        if isinstance(part, str) and part.startswith("auto"):
            chosen, choice = shelf.chosen(part, index, transformer, depth, ids)
            blocks += chosen
            choices += [choice] if choice else []
        else:
            blocks.append(part)
    return blocks, choices


def _compiled(
    item: Item,
    index: int,
    said: Inject,
    said_blocks: Blocks,
    text: str,
    depth: int,
    sigmas: Sequence[float],
    parts: Sequence[Stage],
) -> Rule:
    at = ("inject", index)
    with _blaming(item, *at, "blocks"):
        blocks = parse_blocks(said_blocks, depth)
    with _blaming(item, *at, "steps"):
        spec = said.steps
        steps = parse_steps((spec.sigma[0], spec.sigma[1]) if isinstance(spec, SigmaRange) else spec, sigmas)
    if said.expert != "both":
        if parts[0].expert == "only":
            raise no_experts(item, *at, "expert")
        taken = {step for part in parts if part.expert == said.expert for step in part.steps}
        steps = tuple(step for step in steps if step in taken)
    with _blaming(item, *at, "strength"):
        by_block = strengths(_curve(said.strength), blocks)
    with _blaming(item, *at, "step_strength"):
        by_step = strengths(_curve(said.step_strength), steps)
    products = {s * f for s in {s for _, s in by_block} for f in {f for _, f in by_step}}
    if said.blend == "replace" and products - {0.0, 1.0}:
        raise JobError(
            "replace has strength 1 only", where=item.where(*at, "strength"), hint="Try blend: context-lerp."
        )
    if said.blend == "concat" and min(products, default=0.0) < 0:
        raise JobError("concat needs strengths above 0", where=item.where(*at, "strength"))
    branches: tuple[Branch, ...] = ("cond", "uncond") if said.branch == "both" else (said.branch,)
    return Rule(text, by_block, by_step, branches, said.blend, said.gain)


def _curve(said: Strength) -> Any:
    return said.resolved() if isinstance(said, CurveSpec) else said


def refuse_rules_without_cells(shot: Shot, item: Item) -> None:
    """A strength of 0 was asked for and stays; every other rule must reach some cell and be read there."""
    for i, (rule, reached) in enumerate(zip(shot.rules, shot.table.reached)):
        cells = (shot.table.row(step, branch)[block] for step, branch, block in reached)
        if any(_names(expr, rule.text) for cell in cells for expr, _ in cell):
            continue
        if rule.steps and rule.blocks and not rule.on:
            continue
        if reached:
            why, hint = "later rules replace all that it changes", "Rules apply in the order written."
        elif not rule.blocks:
            depth = shot.model.checkpoint.transformer.num_layers
            why, hint = f"a model of {depth} blocks has none there", "Give numbers."
        elif "cond" not in rule.branches and (rule.steps or not shot.negative):
            why, hint = "guidance 1 has no uncond branch", "Set branch: cond, or a guidance above 1."
        else:
            why, hint = f"no step of {shot.steps} is in its range", "`wancli plan -v` prints the sigmas."
        raise JobError(f"reaches no block: {why}", where=item.where("inject", i), hint=hint)


def _names(expr: Expr, text: str) -> bool:
    return expr.id == text if isinstance(expr, Text) else _names(expr.a, text) or _names(expr.b, text)


def refuse_lerps_of_joined(shot: Shot, item: Item) -> None:
    """Rows that `concat` joined have no counterparts to interpolate with."""
    if not any(rule.blend == "concat" for rule in shot.rules):
        return
    rows = {shot.table.row(step, branch) for branch, steps in shot.table.steps_of.items() for step in steps}
    for block, expr in ((block, expr) for row in rows for block, cell in enumerate(row) for expr, _ in cell):
        while isinstance(expr, Lerp | Concat):
            if isinstance(expr, Lerp) and isinstance(expr.a, Concat):
                raise JobError(
                    f"context-lerp follows concat in block {block}, whose rows have no counterparts",
                    where=item.where("inject"),
                    hint="Put the concat rule last, or use blend: output-mix.",
                )
            expr = expr.a


@contextmanager
def _blaming(item: Item, *path: str | int) -> Iterator[None]:
    """Gives an error of a parser the file, line and key that it came from."""
    try:
        yield
    except JobError as error:
        raise JobError(error.message, where=item.where(*path), hint=error.hint) from None
    except ValueError as error:
        raise JobError(str(error), where=item.where(*path)) from None


def no_experts(item: Item, *path: str | int) -> JobError:
    return JobError(
        "the model has one network for all steps, not two experts",
        where=item.where(*path),
        hint="Only Wan 2.2 A14B has a high-noise and a low-noise expert.",
    )
