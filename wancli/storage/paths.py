"""Expand output templates to paths that are safe on every file system.

A returned path stays inside the folder that the user wrote, leaves room for the longer names of its sidecars,
and is not a device, an option or a hidden file anywhere. Nothing is created.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from wancli.errors import JobError, MachineError
from wancli.storage import disk

_MAX_NAME, _MAX_PATH = 255, 4095  # bytes; Linux's NAME_MAX and PATH_MAX
_NAME_BYTES = _MAX_NAME - len(".latents.safetensors")  # sidecars of NAME.mp4 have longer names
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_VARIABLE = re.compile(r"(?:^|/)(\$(?:[a-z_]\w*|\{[a-z_]\w*\}))[^/]*", re.IGNORECASE)
_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}|[{}]")


def require_cwd() -> Path:
    """Return the working folder, where relative names start. Raises MachineError if it was deleted."""
    try:
        return Path.cwd()
    except OSError as error:
        raise MachineError(
            f"the working folder is gone ({error.strerror})", hint="cd to one that exists."
        ) from None


def expand_home(text: str | Path, where: str = "", base: Path = Path()) -> Path:
    """Return a path that a user wrote, with `~` expanded. A relative path starts from `base`.

    Raises JobError for a home folder that nobody has, for a URL, and for a variable of the shell: neither is
    silently another path. A folder `night:` makes `night://` no URL, and a file or folder whose name really
    begins with `$NAME` is no variable.
    """
    if (match := _URL.match(str(text))) and not _exists(base / f"{match[1]}:", where, str(text)):
        hint = "wancli reads and writes files: mount the store as a folder, or copy the file."
        raise JobError(f"{str(text)!r} is a URL ({match[1]}), not a path", where=where, hint=hint)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        hint = "Set HOME to an absolute path, or write the path in full."
        raise JobError(f"the home folder of {str(text)!r} is not known", where=where, hint=hint) from None
    for match in _VARIABLE.finditer(str(path)):
        if not _exists(base / str(path)[: match.end()], where, str(text)):
            hint = 'Write the path in full, or let the shell expand it: --set KEY="$NAME/...".'
            raise JobError(f"{match[1]} in {str(text)!r}: paths expand no variables", where=where, hint=hint)
    return path


def _exists(path: Path, where: str, text: str) -> bool:
    with disk.reading_for_job(where, text):
        return disk.is_taken(path)


def require_possible(path: Path, shot: str) -> None:
    """Raise JobError if an output has a name or a path that is too long for any file system.

    Temporary files and claims have longer paths than the output of the shot.
    """
    if size := max((len(_encode(part)) for part in path.parts if len(_encode(part)) > _MAX_NAME), default=0):
        raise _too_long("a name", size, _MAX_NAME, shot, "shorten the folder of the output")
    if (size := len(_encode(str(path)))) > (limit := _MAX_PATH - _MAX_NAME):
        raise _too_long("a path", size, limit, shot, "choose a folder nearer to the root")


def _too_long(what: str, size: int, limit: int, shot: str, hint: str, where: str = "") -> JobError:
    whose = f", for shot {shot}" if shot else ""
    return JobError(f"{what} of {size:,} bytes; at most {limit:,} fit{whose}", where=where, hint=hint)


def shorten_name(name: str, limit: int) -> str:
    """Cut a name to at most `limit` bytes, between two characters."""
    data = _encode(name)
    return name if len(data) <= limit else data[:limit].decode(errors="ignore")


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def user_folder(kind: Literal["cache", "config"]) -> Path | None:
    """Return the folder of wancli in the home of this user; None if the user has none.

    A container may run as a number that no name belongs to, without HOME.
    """
    import platformdirs

    find = platformdirs.user_cache_path if kind == "cache" else platformdirs.user_config_path
    try:
        folder = find("wancli").expanduser()
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None


@lru_cache(1024)  # the shots of a sweep have the same prompts
def slugify(text: str, limit: int = 48) -> str:
    """Make a readable file name of at most `limit` UTF-8 bytes from a text.

    It has lower-case letters and digits of any script in NFC, with dashes between words. It is never empty
    and never the name of a device.
    """
    name = ""
    for char in unicodedata.normalize("NFC", text.lower()):
        is_mark = unicodedata.category(char).startswith("M")
        if char.isalnum() or (is_mark and name[-1:] not in ("", "-")):
            name += char
        elif name[-1:] not in ("", "-"):
            name += "-"
    name = name.encode()[:limit].decode(errors="ignore").strip("-") or "shot"
    return f"{name}-shot" if _DEVICES.fullmatch(name) else name


def require_mp4(path: Path, shown: str, where: str) -> None:
    """Raise JobError if a video is to have another suffix than .mp4."""
    if path.suffix != ".mp4":
        hint = "wancli writes MP4 alone; `ffmpeg -i NAME.mp4 NAME.mov` makes another file of one."
        raise JobError(f"{shown!r} does not end in .mp4", where=where, hint=hint)


def to_portable(text: str) -> str:
    """Return a text without what names cannot have on Windows and SMB: `auto:top8` becomes `auto-top8`."""
    return re.sub('[<>:"|?*]+', "-", text).rstrip(" .") or text


def output_path(root: Path, template: str, fields: Mapping[str, str | int]) -> Path:
    """Return the path that an output template means, relative to `root`.

    The folders before the first {field} are the user's own: they may be absolute and contain `~` and `..`.
    The rest must stay inside of them. Raises JobError, also for any character that cannot be shown: commands
    print paths, one a line.
    """
    if unprintable := next((char for char in template if not char.isprintable()), ""):
        hint = "a name may not hold control characters, line ends or invisible spaces"
        raise JobError(f"the character U+{ord(unprintable):04X} in the output", where=template, hint=hint)
    expand_home(template, template, root)  # refuses what is no path
    parts = template.split("/")
    first = next((i for i, part in enumerate(parts) if "{" in part), len(parts) - 1)
    base = expand_home("/".join([*parts[:first], ""]), template, root)
    return resolve_inside(
        root / base, expand_template("/".join(parts[first:]), fields), str(fields.get("id", ""))
    )


def expand_template(template: str, fields: Mapping[str, str | int]) -> str:
    """Put fields into `{name}` and `{name:04d}`, the only two forms.

    Raises JobError for an unknown field, another form, or a value that would add a folder.
    """

    def value(match: re.Match[str]) -> str:
        name, form = match.group(1), match.group(2)
        if name is None:
            raise JobError(f"a lone {match.group()} in the template", where=template)
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            known = " ".join(f"{{{field}}}" for field in fields)
            hint = f"did you mean {{{close[0]}}}?" if close else f"known fields: {known}"
            raise JobError(f"no field {{{name}}}", where=template, hint=hint)
        content = fields[name]
        if form is not None and not (isinstance(content, int) and re.fullmatch(r"0?[1-9]?d", form)):
            hint = "{name} for text, {name:04d} for numbers"
            raise JobError(f"cannot write {{{name}}} as {form!r}", where=template, hint=hint)
        text = format(content, form or "")
        if not text.isprintable() or "/" in text or "\\" in text:
            hint = "a field may not hold a slash or a control character; {slug} is always safe"
            raise JobError(f"{{{name}}} is {text!r}", where=template, hint=hint)
        return text

    return _FIELD.sub(value, template)


def resolve_inside(root: Path, relative: str, shot: str = "") -> Path:
    """Return `root / relative`, proven to be under `root`, also behind symbolic links. Raises JobError.

    `shot` is the id for messages about long names: the template is that of many shots.
    """
    path = Path(relative)
    if path.is_absolute() or not path.parts:
        raise JobError("not a name inside the output folder", where=relative or "output")
    for part in path.parts:
        size = len(part.encode(errors="surrogatepass"))
        if part[0] in ".-" or "\0" in part or _DEVICES.fullmatch(part):
            raise JobError(f"{part!r} is not a safe file name", where=relative, hint="begin it with a letter")
        if size > _NAME_BYTES:
            raise _too_long("a name", size, _NAME_BYTES, shot, "use {slug}", relative)
    has_symlink = any(disk.is_link(root / parent) for parent in path.parents[:-1])
    if has_symlink and not disk.resolve((root / path).parent).is_relative_to(disk.resolve(root)):
        raise JobError(f"a symbolic link leads out of {root}", where=relative)
    return root / path
