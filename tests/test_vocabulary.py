"""Words that messages, help texts, the README and the docs no longer use, and the words that replace them.

Values of JSON documents keep their old words, which programs read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.core
import typer.main

from wancli import errors
from wancli.cli import app

ROOT = Path(__file__).parents[1]
# Patterns of retired words, and what to write instead.
RETIRED = {
    r"in the way": "already exists",
    r"anew": "again",
    r"(go|goes|going|gone) on": "continue, resume",
    r"in other hands|with other workers": "claimed by another worker",
    r"on (its|their|the) way": "in progress",
    r"under way": "in progress",
    r"told": "reported",
    r"what (is|was) there|what there is": "name it",
    r"what is free": "the free memory",
    r"(?<!there )(is|are) no(?! longer| more)": "is not a",
    r"(is|are) not there": "not found",
    r"(is|are) there (twice|whole|under)": "appears twice",
    r"nobody|somebody|whoever": "name who",
    r"but for": "except",
    r"asks? for (an|its) end|an end is asked for": "after a stop request",
    r"lock-?step": "batching",
    r"rid(e|es|ing) along|riders?": "is batched",
    r"heirs?": "dependents",
    r"debris": "leftover temporary files",
    r"(nothing|was|were) begun": "not started",
}
# Values of JSON documents: a contract with programs, whatever people read instead.
JSON_VALUES = {"in the way"}
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def retired(text: str) -> list[str]:
    """The retired words of a text, each with what to write instead."""
    return [
        f"{match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 30]!r}: write {instead!r}"
        for words, instead in RETIRED.items()
        for match in re.finditer(rf"\b(?:{words})\b", text, re.IGNORECASE)
    ]


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The string constants of a module in which words follow each other, docstrings aside."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if " " in node.value and node.value not in JSON_VALUES:
            yield node.lineno, node.value


def help_texts(command: typer.core.TyperGroup, name: str = "wancli") -> Iterator[tuple[str, str]]:
    """The help of each command and of each option."""
    for word, sub in command.commands.items():
        yield f"{name} {word}", sub.help or ""
        for parameter in sub.params:
            yield f"{name} {word} {parameter.name}", getattr(parameter, "help", None) or ""
        if isinstance(sub, typer.core.TyperGroup):
            yield from help_texts(sub, f"{name} {word}")


def test_messages_have_no_retired_words() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in sorted((ROOT / "wancli").rglob("*.py"))
        for line, text in messages(path)
        for problem in retired(text)
    ]
    assert not found, "\n".join(found)


def test_help_texts_have_no_retired_words() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    found = [f"{place}: {problem}" for place, text in help_texts(command) for problem in retired(text)]
    kinds = map(errors.describe_error_type, errors.error_types())
    found += [f"wancli errors: {problem}" for kind in kinds for problem in retired(kind["meaning"])]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_have_no_retired_words(path: Path) -> None:
    values = "|".join(f'[`"]{value}[`"]' for value in JSON_VALUES)
    found = retired(re.sub(values, "", re.sub(r"\s+", " ", path.read_text())))
    assert not found, "\n".join(found)


def test_a_retired_word_is_found_and_a_word_like_it_is_not() -> None:
    for text in ("out/a.mp4 is in the way", "Another worker goes on.", "5 is no size"):
        assert retired(text)
    assert not retired("there is no GPU; renewed, retold, undergo one; it is no longer a size")
