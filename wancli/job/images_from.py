"""Read the items of `images_from`: pictures of a pattern, of a folder or of a list, each with its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wancli.errors import JobError
from wancli.job import prompts_from
from wancli.job.matrix import MAX_SHOTS
from wancli.job.overrides import Layer, Source
from wancli.job.yaml_reader import normalize_text
from wancli.storage import disk
from wancli.storage.paths import expand_home

# HEIC is refused by name when the picture is read.
_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".heic", ".heif"),
}
_LISTS = (".txt", ".jsonl")
_MAX_PROMPT_BYTES = 64 * 1024


def read(name: str, owner: Source) -> list[Layer]:
    """Read a layer for each picture, in the order of names, or of the lines of a list.

    A picture is the key `image.first`, so that the other keys of the job's `image` apply. A picture without a
    prompt of its own takes the text of NAME.txt beside it, if that file exists. `owner` is the key that names
    the pictures. Raises JobError with all problems.
    """
    if name.endswith(_LISTS):
        layers = prompts_from.read(name, owner, "image")
    else:
        layers = [Layer(owner.at(path), {"image": path}) for path in _find_pictures(name, owner)]
    if len(layers) > MAX_SHOTS:
        message = f"{name!r} names {len(layers):,} pictures; the limit is {MAX_SHOTS:,}"
        raise JobError(message, where=owner.location())
    problems: list[str] = []
    result = []
    for layer in layers:
        try:
            result.append(_name_first_frame(_add_prompt(layer)))
        except JobError as error:
            problems.append(str(error))
    if problems:
        raise JobError("\n".join(problems))
    return result


def _find_pictures(name: str, owner: Source) -> list[str]:
    """Return the paths, from the folder of the job, of the pictures that a pattern or a folder names."""
    base = owner.base_dir
    pattern = base / expand_home(name, owner.location(), base)
    with disk.reading_for_job(owner.location(), name):
        if disk.is_folder(pattern):
            pattern /= "*"
        found = dict.fromkeys(_match(Path(pattern.anchor), pattern.parts[1:]))
        files = sorted(path for path in found if disk.is_file(path))
    pictures = [path for path in files if path.suffix.lower() in _SUFFIXES]
    if not pictures:
        rest = f", only other files such as {files[0].name}" if files else ""
        hint = f"Looked for {pattern}; a pattern is written photos/*.jpg."
        raise JobError(f"{name!r} names no picture{rest}", where=owner.location(), hint=hint)
    return [str(path.relative_to(base) if path.is_relative_to(base) else path) for path in pictures]


def _match(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what a pattern finds below a folder; `**` stands for any folders. Hidden names need a dot."""
    if not parts:
        yield folder
        return
    head, *rest = parts
    if not any(letter in head for letter in "*?["):
        yield from _match(folder / head, rest)
        return
    if head == "**":
        yield from _match(folder, rest)
    for path in disk.list_folder(folder):
        if path.name.startswith(".") and not head.startswith("."):
            continue
        if head == "**" and disk.is_folder(path) and not disk.is_link(path):
            yield from _match(path, parts)
        elif head != "**" and fnmatchcase(path.name, head) and (not rest or disk.is_folder(path)):
            yield from _match(path, rest)


def _name_first_frame(layer: Layer) -> Layer:
    image = layer.value.get("image")
    return (
        Layer(layer.source, {**layer.value, "image": {"first": image}}) if isinstance(image, str) else layer
    )


def _add_prompt(layer: Layer) -> Layer:
    """Put the text of NAME.txt below the keys of a picture, as its prompt."""
    values: dict[str, Any] = layer.value
    image = values.get("image")
    if "prompt" in values or not isinstance(image, str):
        return layer
    base = layer.source.base_dir
    path = base / expand_home(image, layer.source.location(), base).with_suffix(".txt")
    with disk.reading_for_job(str(path)):
        if not disk.is_file(path):
            return layer
        with disk.opened(path) as file:
            data = file.read(_MAX_PROMPT_BYTES + 1)
    if len(data) > _MAX_PROMPT_BYTES:
        raise JobError(
            f"is larger than {_MAX_PROMPT_BYTES // 1024} KiB, too long for a prompt", where=str(path)
        )
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise JobError(f"byte {error.start} is not UTF-8", where=str(path)) from None
    return Layer(layer.source, {**values, "prompt": normalize_text(text, str(path))}) if text else layer
