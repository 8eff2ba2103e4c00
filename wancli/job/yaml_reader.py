"""Read YAML as plain values, with the line of each key.

The types are the core types of YAML 1.2, so that `no` is text and `1e3` is a number. Tags, duplicate keys and
anchors without an alias are refused. The size, the depth and the number of values, those of aliases included,
are limited. JSON is YAML, and its `\\ud83d\\ude00` is one character. Every refusal is a JobError with a line.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from wancli.errors import JobError

Key = str | int
Lines = dict[tuple[Key, ...], int]
Comments = dict[tuple[Key, ...], str]
_COMMENT = re.compile(r"[ \t]+(#[^\r\n\0]*)")
_QUOTE_ANCHORS = "Quote a text that starts with & or *."
MAX_BYTES, MAX_DEPTH, MAX_NODES = 256 * 1024, 32, 20_000


def join_key(path: tuple[Key, ...]) -> str:
    return ".".join(str(p) for p in path)


class _Loader(yaml.SafeLoader):
    """Loads YAML 1.2's core types: `no` is text, `1e3` a number; `12:30` and dates are text."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,30})$"), [*"-+0123456789"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+.0123456789"],
)


class Document(NamedTuple):
    """The plain values of a file, the line of every key, and the comments right behind unquoted texts."""

    value: Any
    lines: Lines
    comments: Comments


def read_yaml(data: bytes, file: str) -> Document:
    """Read a document. Raises JobError."""
    if len(data) > MAX_BYTES:
        hint = "Move the shots into a .jsonl file: prompts_from: FILE reads 10,000 of them, up to 16 MiB."
        raise JobError(f"is larger than {MAX_BYTES // 1024} KiB", where=file, hint=hint)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise JobError(f"byte {error.start} is not UTF-8", where=f"{file}:{line}") from None
    try:
        _check_limits(text, file)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise JobError("is empty", where=file, hint="Start with: prompt: ...")
            document = Document(None, {}, {})
            return document._replace(value=_construct(loader, node, (), document, file))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = (error.problem or error.context or "").removeprefix("but ")
        raise JobError(f"is not YAML: {problem}", where=place, hint=_yaml_hint(problem)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"is not YAML: the character U+{int(error.character):04X} is not allowed"
        raise JobError(message, where=f"{file}:{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"is not YAML: {' '.join(str(error).split())}", where=file) from None


def _yaml_hint(problem: str) -> str:
    hints = {
        "undefined alias": _QUOTE_ANCHORS,
        "mapping values are not allowed": "A text with ': ' in it needs quotes.",
        r"'\t' that cannot start": "Indent with spaces.",
        "cannot start": "A text that starts with one of %@`&*!|>[{ needs quotes.",
        "another document": "A file is one job; `items` makes several shots of it.",
    }
    return next((hint for part, hint in hints.items() if part in problem), "")


def _check_limits(text: str, file: str) -> None:
    depth = nodes = 0
    unused: dict[str, str] = {}
    for event in yaml.parse(text, Loader=_Loader):
        line = f"{file}:{event.start_mark.line + 1}" if event.start_mark else file
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            unused.pop(str(event.anchor), None)
        elif anchor := getattr(event, "anchor", None):
            unused[anchor] = line
        if getattr(event, "tag", None) is not None:
            raise JobError("tags (!) are not supported", where=line, hint="Quote a text that starts with !.")
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise _too_many(line)
    if unused:  # the text & Co. would lose its beginning
        anchor, line = next(iter(unused.items()))
        raise JobError(f"no alias *{anchor} uses the anchor &{anchor}", where=line, hint=_QUOTE_ANCHORS)


def _too_many(line: str) -> JobError:
    return JobError(f"more than {MAX_DEPTH} levels or {MAX_NODES} values", where=line)


def _construct(loader: _Loader, node: yaml.Node, path: tuple[Key, ...], document: Document, file: str) -> Any:
    """Construct the value of a node; its lines and comments go into the document."""
    lines = document.lines
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_NODES or len(path) > MAX_DEPTH:  # by aliases
        raise _too_many(_locate(file, node, ()))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, child, (*path, i), document, file) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise JobError("a key must be a word", where=f"{file}:{line}")
            key = normalize_text(
                key, f"{file}:{line}: a key of {join_key(path)}" if path else f"{file}:{line}: a key"
            )
            if key in result:
                first = lines[(*path, key)]
                raise JobError(
                    f"key {key!r} appears twice, on lines {first} and {line}", where=f"{file}:{line}"
                )
            lines[(*path, key)] = line
            result[key] = _construct(loader, child, (*path, key), document, file)
        return result
    if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[-+]?0[0-9]+", node.value) and node.style is None:
        raise JobError(
            f"{node.value} has a leading zero", where=_locate(file, node, path),
            hint=f"Write {int(node.value)} for the number, '{node.value}' for the text.",
        )  # fmt: skip
    value = loader.construct_object(node)
    if isinstance(value, str):
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if is_plain and (comment := _comment_behind(node)):
            document.comments[path] = comment
        return normalize_text(value, _locate(file, node, path))
    return value


def _comment_behind(node: yaml.Node) -> str:
    """Return the comment on the line where a node ends, empty if there is none."""
    match = _COMMENT.match(node.end_mark.buffer or "", node.end_mark.pointer)
    return match[1] if match else ""


def _locate(file: str, node: yaml.Node, path: tuple[Key, ...]) -> str:
    line = f"{file}:{node.start_mark.line + 1}"
    return f"{line}: {join_key(path)}" if path else line


def normalize_text(value: str, location: str) -> str:
    """Join the halves of surrogate pairs, as in JSON. Raises JobError for NUL and for a single half."""
    try:
        value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise JobError(
            "contains half of a surrogate pair, which is not a character", where=location
        ) from None
    if "\0" in value:
        raise JobError("contains NUL, which names and prompts cannot", where=location)
    return value
