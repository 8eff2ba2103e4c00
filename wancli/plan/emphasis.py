"""Compile `emphasis`: words of the shot's prompt that count more or less, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wancli.errors import JobError
from wancli.injection.area import Area
from wancli.injection.exprs import Emphasis
from wancli.injection.selectors import parse_blocks
from wancli.injection.tuning import EmphasisRule
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.job.schema_rules import EmphasisEntry
from wancli.plan.areas import MaskReader, VideoShape, compile_area
from wancli.plan.injections import locate_errors, narrow_to_expert, select_steps
from wancli.plan.shot import Prompt, Shot
from wancli.sampling.stages import Stage
from wancli.text.words import find_rows

Key = tuple[str | int, ...]


def compile_emphasis(
    item: Item,
    prompt: Prompt,
    depth: int,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
    video: VideoShape,
    masks: MaskReader,
) -> tuple[EmphasisRule, ...]:
    """Compile the entries of a shot; those of weight 1 change nothing and are left out. Raises JobError."""
    problems = Problems()
    rules: list[EmphasisRule] = []
    for key, entry in _list_entries(item):
        rows: tuple[int, ...] = ()
        blocks, steps, area = rows, rows, None
        where = item.location(*key, *(["words"] if isinstance(key[-1], int) else []))
        with problems.collect():
            rows = find_rows(prompt.tokens, entry.words, where)
        with problems.collect(), locate_errors(item, *key, "blocks"):
            blocks = parse_blocks(entry.blocks, depth)
        with problems.collect(), locate_errors(item, *key, "steps"):
            steps = select_steps(entry.steps, sigmas)
        with problems.collect():
            steps = narrow_to_expert(item, key, entry.expert, steps, stages)
        with problems.collect():
            area = compile_area(item, key, entry, video, masks)
        if entry.weight != 1:
            rules.append(_make_rule(entry, rows, blocks, steps, area))
    problems.raise_all()
    return tuple(rules)


def _make_rule(
    entry: EmphasisEntry,
    rows: tuple[int, ...],
    blocks: Sequence[int],
    steps: Sequence[int],
    area: Area | None,
) -> EmphasisRule:
    by_block, by_step = (tuple((index, 1.0) for index in chosen) for chosen in (blocks, steps))
    return EmphasisRule(entry.words, rows, entry.weight, by_block, by_step, area)


def _list_entries(item: Item) -> Iterator[tuple[Key, EmphasisEntry]]:
    """Yield each entry with its key: `emphasis.circle` of a mapping, `emphasis.0` of a list."""
    if isinstance(item.job.emphasis, dict):
        for words, weight in item.job.emphasis.items():
            yield ("emphasis", words), EmphasisEntry(words=words, weight=weight)
    else:
        for index, entry in enumerate(item.job.emphasis):
            yield ("emphasis", index), entry


def refuse_emphasis_without_effect(shot: Shot, item: Item) -> None:
    """Refuse an entry that no cell reads."""
    first = len(shot.rules)
    for rule, reached in zip(shot.emphasis, shot.table.changed_cells[first:]):
        cells = (shot.table.row(step, branch)[block] for step, branch, block in reached)
        if not any(isinstance(expr, Emphasis) for cell in cells for expr, _ in cell):
            why = (
                "injected prompts replace the main prompt there"
                if reached
                else "no block or step is in its range"
            )
            raise JobError(f"{rule.words!r} reaches no block: {why}", where=item.location("emphasis"))
