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

from wancli.errors import JobError, MachineError

_NAME_BYTES = 255 - len(".latents.safetensors")  # sidecars of NAME.mp4 have longer names
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}|[{}]")


def require_cwd() -> Path:
    """Return the working folder, where relative names start. Raises MachineError if it was deleted."""
    try:
        return Path.cwd()
    except OSError as error:
        raise MachineError(
            f"the working folder is gone ({error.strerror})", hint="cd to one that exists."
        ) from None


def expand_home(text: str | Path, where: str = "") -> Path:
    """Return a path with `~` expanded. Raises JobError if nobody has that home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        hint = "Set HOME to an absolute path, or write the path in full."
        raise JobError(f"the home folder of {str(text)!r} is not known", where=where, hint=hint) from None


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


def output_path(root: Path, template: str, fields: Mapping[str, str | int]) -> Path:
    """Return the path that an output template means, relative to `root`.

    The folders before the first {field} are the user's own: they may be absolute and contain `~` and `..`.
    The rest must stay inside of them. Raises JobError, also for any character that cannot be shown: commands
    print paths, one a line.
    """
    if unprintable := next((char for char in template if not char.isprintable()), ""):
        hint = "a name may not hold control characters, line ends or invisible spaces"
        raise JobError(f"the character U+{ord(unprintable):04X} in the output", where=template, hint=hint)
    parts = template.split("/")
    first = next((i for i, part in enumerate(parts) if "{" in part), len(parts) - 1)
    base = expand_home("/".join([*parts[:first], ""]), template)
    return resolve_inside(root / base, expand_template("/".join(parts[first:]), fields))


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


def resolve_inside(root: Path, relative: str) -> Path:
    """Return `root / relative`, proven to be under `root`, also behind symbolic links. Raises JobError."""
    path = Path(relative)
    if path.is_absolute() or not path.parts:
        raise JobError("not a name inside the output folder", where=relative or "output")
    for part in path.parts:
        size = len(part.encode(errors="surrogatepass"))
        if part[0] in ".-" or "\0" in part or _DEVICES.fullmatch(part):
            raise JobError(f"{part!r} is not a safe file name", where=relative, hint="begin it with a letter")
        if size > _NAME_BYTES:
            raise JobError(
                f"a name of {size} bytes; at most {_NAME_BYTES} fit", where=relative, hint="use {slug}"
            )
    has_symlink = any(folder.is_symlink() for folder in (root / parent for parent in path.parents[:-1]))
    if has_symlink and not (root / path).parent.resolve().is_relative_to(root.resolve()):
        raise JobError(f"a symbolic link leads out of {root}", where=relative)
    return root / path
