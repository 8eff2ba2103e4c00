"""Resolve the key `attention` of a job: words to rows of the prompt, selectors to blocks and steps."""

from __future__ import annotations

from collections.abc import Sequence

from wancli.errors import JobError
from wancli.injection.attention_spec import AttentionSpec, Group
from wancli.injection.selectors import parse_blocks
from wancli.job.loader import Item
from wancli.job.problems import Problems
from wancli.job.schema_values import Blocks, SigmaRange, Steps
from wancli.plan.injections import locate_errors, select_steps
from wancli.plan.model_spec import ModelSpec
from wancli.plan.shot import Prompt
from wancli.text.words import find_rows


def resolve_maps(
    item: Item, prompt: Prompt, model: ModelSpec, sigmas: Sequence[float]
) -> AttentionSpec | None:
    """Return the attention maps that a shot records; None if it records none.

    `sigmas` are those of the shot's schedule. Raises JobError for a word that the prompt does not have, and
    for a group without blocks or steps.
    """
    wanted = item.job.attention
    if wanted is None:
        return None
    depth = model.checkpoint.transformer_config.num_layers
    problems = Problems()
    rows, blocks, steps = [], [], []
    for i, word in enumerate(wanted.words):
        with problems.collect():
            rows.append(find_rows(prompt.tokens, word, item.location("attention", "words", i)))
    block_groups = wanted.blocks if isinstance(wanted.blocks, list) else [wanted.blocks]
    for block_spec in block_groups:
        with problems.collect(), locate_errors(item, "attention", "blocks"):
            blocks.append(_block_group(block_spec, depth))
    step_groups = wanted.steps if isinstance(wanted.steps, list) else [wanted.steps]
    for step_spec in step_groups:
        with problems.collect(), locate_errors(item, "attention", "steps"):
            steps.append(_step_group(step_spec, sigmas))
    problems.raise_all()
    return AttentionSpec(tuple(wanted.words), tuple(rows), tuple(blocks), tuple(steps))


def _block_group(spec: Blocks, depth: int) -> Group:
    parts = spec if isinstance(spec, list) else [spec]
    label = ", ".join(map(str, parts))
    if any(str(part).startswith("auto") for part in parts):
        raise JobError(
            "auto chooses blocks for an injection, not for maps", hint="Give numbers, or a range like early."
        )
    blocks = parse_blocks(spec, depth)
    if not blocks:
        raise JobError(f"{label!r} is empty in a model of {depth} blocks", hint="Give numbers.")
    return Group(tuple(sorted(blocks)), label)


def _step_group(spec: Steps, sigmas: Sequence[float]) -> Group:
    label = f"sigma {spec.sigma[0]:g}-{spec.sigma[1]:g}" if isinstance(spec, SigmaRange) else str(spec)
    steps = select_steps(spec, sigmas)
    if not steps:
        hint = "`wancli plan -v` prints the sigmas."
        raise JobError(f"none of the {len(sigmas) - 1} steps is in {label!r}", hint=hint)
    return Group(steps, label)
