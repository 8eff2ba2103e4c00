"""The injections, the emphasis and the steering of a shot for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wancli.injection.area import Area, Mask, TokenGrid
from wancli.injection.exprs import Branch, Row
from wancli.injection.injected_share import injected_share_by_block
from wancli.injection.table import Rule, Table
from wancli.plan.areas import MaskReader
from wancli.report.html.page_values import Pool, round_numbers
from wancli.report.recorded_mask import read_recorded_mask
from wancli.report.shot_text import describe_words
from wancli.storage.injection_schema import AreaRecord, EmphasisRecord, RuleRecord, SteerRecord
from wancli.storage.manifest_schema import ShotRecord, ShotSettings
from wancli.storage.prompt_schema import describe_injected
from wancli.units import format_ranges


def injection_entry(
    rule: RuleRecord, shot: ShotSettings, pools: Mapping[str, Pool], masks: MaskReader
) -> dict[str, Any]:
    """Return the data of a rule; what many shots share is put into the pools."""
    data = rule.as_dict()
    own = ("text", "hits", "planned", "hits_by_branch")
    shared = ("blocks", "steps", "branches", "blend", "gain", "hits_by_block", "hits_by_step")
    return {key: data[key] for key in own} | {
        "rule": pools["rules"].put({key: data[key] for key in shared}),
        "difference": pools["differences"].put(round_numbers(data["difference"], 5))
        if rule.difference
        else None,
        "picture": Path(rule.picture.path).name if rule.picture else None,
        **({"area": _area_entry(rule.area, shot, masks)} if rule.area else {}),
    }


def _area_entry(area: AreaRecord, shot: ShotSettings, masks: MaskReader) -> dict[str, Any]:
    """Return an area; of a mask its name and, if its file still shows it, its weights where the rule begins:
    a text per row of tokens, a digit per token, 9 for white.
    """
    entry = {key: value for key, value in area.as_dict().items() if key != "mask"}
    if area.mask is None:
        return entry
    entry["mask"] = Path(area.mask.path).name
    if mask := read_recorded_mask(area, shot, masks):
        first = min(area.frames[0] if area.frames else 0, len(mask.weights_FYX) - 1)
        rows = mask.weights_FYX[first].tolist()
        entry["white"] = ["".join(str(round(9 * weight)) for weight in row) for row in rows]
    return entry


def rule_rows(record: ShotRecord) -> list[dict[str, str]]:
    """Return a row of text for each rule, emphasis and steering of a shot: what acts how, and where."""
    return [
        *(_describe_rule(i, rule, record) for i, rule in enumerate(record.injection)),
        *(_describe_emphasis(i, entry) for i, entry in enumerate(record.emphasis)),
        *(_describe_steering(i, entry, record) for i, entry in enumerate(record.steer)),
    ]


def _describe_rule(index: int, rule: RuleRecord, record: ShotRecord) -> dict[str, str]:
    what = describe_injected(record.injected[index])
    if rule.words is not None and rule.rows:
        what = f"{what}, only {describe_words(rule.words, rule.rows)}"
    nag = rule.nag
    how = f", scale {nag.scale:g}, alpha {nag.alpha:g}, tau {nag.tau:g}" if nag else ""
    gain = f", gain {rule.gain:g}" if rule.gain != 1 else ""
    place = _describe_place(rule.blocks, rule.steps, rule.area)
    return {"rule": f"inject.{index}", "what": what, "how": f"{rule.blend}{how}{gain}"} | place


def _describe_emphasis(index: int, entry: EmphasisRecord) -> dict[str, str]:
    what = describe_words(entry.words, entry.rows)
    place = _describe_place(entry.blocks, entry.steps, entry.area)
    return {"rule": f"emphasis.{index}", "what": what, "how": f"counts {entry.weight:g} times"} | place


def _describe_steering(index: int, entry: SteerRecord, record: ShotRecord) -> dict[str, str]:
    texts = {prompt.id: prompt.text for prompt in record.prompts}
    sides = (("toward", entry.toward), ("away from", entry.away))
    what = "; ".join(f"{side} {' | '.join(texts[id] for id in ids)}" for side, ids in sides if ids)
    strengths = _format_bounds(entry.blocks.values())
    place = _describe_place(entry.blocks, entry.steps, entry.area)
    return {"rule": f"steer.{index}", "what": what, "how": f"strength {strengths}"} | place


def _describe_place(blocks: Iterable[int], steps: Iterable[int], area: AreaRecord | None) -> dict[str, str]:
    where = "everywhere" if area is None else f"{area.tokens:,} tokens"
    return {"blocks": format_ranges([*blocks]), "steps": format_ranges([*steps]), "where": where}


def _format_bounds(values: Iterable[float]) -> str:
    """Format the least and the largest of numbers: `0.5`, or `0.5 to 1`."""
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def injected_shares(record: ShotRecord) -> list[dict[str, Any]]:
    """Compute how much of what each block reads was injected, in [0, 1], as `wancli plan -v` shows it: for
    each branch the steps that have the same shares, and the share of each block: of its prompts or of its
    pictures, whichever is larger."""
    rules = [
        Rule(
            rule.text,
            tuple(rule.blocks.items()),
            tuple(rule.steps.items()),
            tuple(rule.branches),
            rule.blend,
            rule.gain,
            rule.picture is not None,
            _area(rule.area) if rule.area else None,
            rows=rule.rows,
            nag=(rule.nag.scale, rule.nag.alpha, rule.nag.tau) if rule.nag else None,
        )
        for rule in record.injection
    ]
    base = {"cond": record.prompt.id} | ({"uncond": record.negative.id} if record.negative else {})
    unguided = [
        step
        for stage in record.shot.stages
        if stage.guidance == 1
        for step in range(stage.steps[0], stage.steps[1] + 1)
    ]
    depth = record.model.sizes.num_layers
    image = "its own" if any(rule.image for rule in rules) else None
    table = Table(rules, base, depth, record.shot.steps, unguided, image)  # type: ignore[arg-type]

    def shares(row: Row, branch: Branch) -> list[float]:
        text = injected_share_by_block(row, *table.own_prompts(branch))
        of_pictures = injected_share_by_block(row, table.image) if table.image else text
        return [round(max(pair), 4) for pair in zip(text, of_pictures)]

    return [
        {"branch": branch, "steps": steps, "blocks": shares(row, branch)}
        for branch in table.branches
        for row, steps in table.distinct_rows(branch).items()
    ]


def _area(record: AreaRecord) -> Area:
    """Return a recorded area, to tell it from others: the weights of its mask are not recorded."""
    mask = None
    if record.mask:
        import numpy

        grid, none = TokenGrid(0, 0, 0), numpy.zeros((1, 0, 0))
        mask = Mask(record.mask.sha256, grid, (0, 0), Path(record.mask.path), none)
    return Area(record.frames, record.region, record.feather, mask)
