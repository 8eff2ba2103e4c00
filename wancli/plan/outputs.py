"""The outputs of shots: their names from the template of the job, and that no two are the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wancli.errors import JobError
from wancli.job.loader import Item, JobFile
from wancli.plan.shot import Shot
from wancli.storage import disk
from wancli.storage.paths import output_path, require_mp4, require_possible, slugify, to_portable


def with_output(shot: Shot, jobs: JobFile, item: Item) -> Shot:
    """Return the shot with its output. Raises JobError if the template names none."""
    # The key hashes everything else that is decided here, and is slow to hash for a thousand shots.
    key = shot.key[:12] if "{key" in item.job.output else ""
    picture = shot.pictures.name if shot.pictures else None
    slug = slugify(shot.prompt_text)
    return replace(shot, output=_name_output(jobs, shot.index, item, slug, key, picture))


def check_template(jobs: JobFile, index: int, item: Item) -> None:
    """Raise JobError if the template names no output of a shot that is not decided yet."""
    _name_output(jobs, index, item, "slug", "key", None if item.job.image is None else "image")


def _name_output(jobs: JobFile, index: int, item: Item, slug: str, key: str, picture: str | None) -> Path:
    job = item.job
    fields: dict[str, str | int] = {
        **{name: f"{v:g}" if isinstance(v, float) else v for name, v in job.labels.items()},
        "job": jobs.name,
        "item": index,
        "id": item.id,
        "slug": slug,
        "seed": job.seed,
        **({} if picture is None else {"image": picture}),
        "key": key,
    }
    where = item.location("output")
    portable = {
        name: to_portable(value) if isinstance(value, str) else value for name, value in fields.items()
    }
    output = resolve_output(jobs.directory, job.output, portable, where)
    if portable != fields:
        old = resolve_output(jobs.directory, job.output, fields, where)
        if old != output and _is_begun(old, where):
            return old
    return output


def _is_begun(output: Path, where: str) -> bool:
    """Whether a version of wancli that wrote `auto:top8` into names has rendered this, or a part of it."""
    suffixes = (".mp4", ".manifest.json", ".latents.safetensors", ".state.safetensors")
    with disk.reading_for_job(where):
        return any(disk.exists(output.with_suffix(suffix)) for suffix in suffixes)


def resolve_output(directory: Path, template: str, fields: Mapping[str, str | int], where: str) -> Path:
    """Return the path of a video that a template names, with links resolved. Raises JobError, at `where`."""
    try:
        output = output_path(directory, template, fields)
        with disk.reading_for_job(where):
            output = disk.resolve(output.parent) / output.name
        require_possible(output, str(fields.get("id", "")))
    except JobError as error:
        raise JobError(error.message, where=where, hint=error.hint) from None
    require_mp4(output, template, where)
    return output


def refuse_collisions(shots: Sequence[Shot], jobs: JobFile) -> None:
    """Raise JobError if two shots share a path, even on file systems that fold case or Unicode forms."""
    seen: dict[str, Shot] = {}
    for shot in shots:
        folded = _fold(shot.output)
        if other := seen.get(folded):
            raise JobError(
                f"shots {other.index} and {shot.index} would both write {shot.output}",
                where=jobs.items[shot.index].location("output"),
                hint="Put {item}, {id} or {seed} into the output template.",
            )
        seen[folded] = shot
    for shot in (shot for shot in shots if shot.attention):
        if other := seen.get(_fold(shot.attention_video)):
            raise JobError(
                f"the attention maps of shot {shot.index} would be written over the video of "
                f"shot {other.index}, {shot.attention_video}",
                where=jobs.items[other.index].location("output"),
                hint="Names that end in .attention.mp4 are those of attention maps.",
            )


def _fold(path: Path) -> str:
    """Return what a file system that folds case and Unicode forms makes of a path."""
    return unicodedata.normalize("NFC", str(path)).casefold()
