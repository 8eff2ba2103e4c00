"""Add the plain shots that a comparison needs: each shot that injects is compared with the same shot without
injections, so that its figures show the injection and not another seed or prompt.

LoRAs and step caches count as an injection if the shots of the job differ in them. Shots that differ in no
other key share a plain one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from wancli.job.schema import Compare, Job
from wancli.job.schema_values import Strength

if TYPE_CHECKING:
    from wancli.job.loader import Item
    from wancli.job.matrix import Combination

# Keys that change neither the pixels of a shot nor what it is compared with.
_ASIDE = {
    "id",
    "labels",
    "output",
    "inject",
    "emphasis",
    "steer",
    "join",
    "measure",
    "attention",
    "compare",
    "batch",
    "save_every",
}
# Keys that count as an injection if shots differ in them, with their values in a plain shot.
_PLAIN_IF_DIFFERENT: dict[str, object] = {"loras": [], "cache": "none"}


def add_plain_shots(items: Sequence[Item]) -> list[Item]:
    """Return the items, and after them a plain one for each compared item that has none."""
    compared = [item for item in items if item.job.compare]
    if not compared or not all(_options(item.job).add_baseline for item in compared):
        return [*items]
    dropped = [key for key in _PLAIN_IF_DIFFERENT if _differ(compared, key)]
    has_plain = {_key(item.job, dropped) for item in items if _is_plain(item.job, dropped)}
    added = [*_make_plain_shots(compared, has_plain, {item.id for item in items}, dropped)]
    named = _options(compared[0].job).baseline
    return [*items, *added] if named is None or named in {item.id for item in added} else [*items]


def adapt_output(job: Job, combination: Combination) -> Job:
    """Name the output of a shot without the values of axes that do not apply to it."""
    absent = combination.absent_labels - job.labels.keys()
    return job.model_copy(update={"output": _name_output(job.output, absent)}) if absent else job


def _name_output(template: str, absent: Collection[str]) -> str:
    """Return the template of a shot that lacks some labels: its id stands for a name that has one of them."""
    *folders, file = template.split("/")
    parts = ["{id}" if _fields(part) & {*absent} else part for part in folders]
    return "/".join([*parts, "{id}.mp4" if _fields(file) & {*absent} else file])


def _options(job: Job) -> Compare:
    return job.compare if isinstance(job.compare, Compare) else Compare()


def _key(job: Job, dropped: Collection[str]) -> str:
    """Return a text that is the same for jobs that differ only in injections, emphasis and steering, and in
    the dropped keys.
    """
    aside = _ASIDE | {*dropped}
    below = {"memory": {"residency", "chunk", "budget"}, "video": {"keep_latents"}}
    return repr(job.model_dump(exclude={**dict.fromkeys(aside, True), **below}))


def _differ(items: Sequence[Item], key: str) -> bool:
    return len({repr(getattr(item.job, key)) for item in items}) > 1


def _is_plain(job: Job, dropped: Collection[str]) -> bool:
    if any(getattr(job, key) != _PLAIN_IF_DIFFERENT[key] for key in dropped) or job.emphasises:
        return False
    rules = (*job.inject, *job.steer)
    return all(_is_zero(rule.strength) or _is_zero(rule.step_strength) for rule in rules)


def _is_zero(strength: Strength) -> bool:
    return not any(strength) if isinstance(strength, list) else strength == 0


def _make_plain_shots(
    compared: Sequence[Item], has_plain: Collection[str], taken: Collection[str], dropped: Collection[str]
) -> Iterator[Item]:
    """Yield a plain shot for each kind of shots without one: `seed11-plain`, with the id of their entry of
    `items` if values do not tell two apart."""
    changed = ("inject", "emphasis", "steer", *dropped)
    kinds: dict[str, tuple[Item, Combination]] = {}
    for item in compared:
        swept = item.combination.select(lambda setting: setting.key.split(".")[0] not in changed)
        kinds.setdefault(_key(item.job, dropped), (item, swept))
    slugs = [swept.slug for _, swept in kinds.values()]
    used = {*taken}
    for item, swept in (kind for key, kind in kinds.items() if key not in has_plain):
        own = item.entry_id or item.id if slugs.count(swept.slug) > 1 else ""
        id = "-".join(part for part in (own, swept.slug, "plain") if part)
        while id in used:
            id += "-plain"
        used.add(id)
        yield _make_plain(item, swept, id, dropped)


def _make_plain(item: Item, combination: Combination, id: str, dropped: Collection[str]) -> Item:
    job = item.job
    gone = item.combination.labels.keys() - combination.labels.keys()
    labels = {name: label for name, label in job.labels.items() if name not in gone}
    plain: dict[str, object] = {"inject": [], "emphasis": {}, "steer": [], "join": None} | {
        key: _PLAIN_IF_DIFFERENT[key] for key in dropped
    }
    names = {"id": id, "labels": labels, "output": _plain_output(job, gone)}
    made = job.model_copy(update={**plain, **names})
    return replace(item, id=id, job=made, combination=combination, is_added=True)


def _plain_output(job: Job, gone: Collection[str]) -> str:
    """Name the output: as that of the shot, but never the same."""
    output = _name_output(job.output, gone)
    if _fields(output.rpartition("/")[2]) & {"id", "item", "key"}:
        return output
    path = PurePosixPath(output)
    return str(path.with_name(f"{path.stem}-plain{path.suffix}")) if path.name else output


def _fields(text: str) -> set[str]:
    return set(re.findall(r"\{([^{}:]*)", text))
