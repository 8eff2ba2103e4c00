"""The registry of errors: every listed error is raised somewhere, every raised error is listed."""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import run_wancli

from wancli import errors

SOURCES = sorted((Path(errors.__file__).parent).rglob("*.py"))
KINDS = {kind.__name__: kind for kind in errors.error_types()}


def nodes() -> Iterator[ast.AST]:
    for path in SOURCES:
        yield from ast.walk(ast.parse(path.read_text()))


def name_of(node: ast.expr | None) -> str:
    """Return the name of the called function or class."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else ""


def created_classes() -> set[str]:
    """Collect the error classes that any module creates; of `kind = A if ... else B` it creates both."""
    calls = {name_of(node) for node in nodes() if isinstance(node, ast.Call)}
    chosen = {name_of(n) for node in nodes() if isinstance(node, ast.IfExp) for n in (node.body, node.orelse)}
    return (calls | chosen) & KINDS.keys()


def test_every_kind_that_is_listed_is_made_somewhere_or_is_the_branch_of_one_that_is() -> None:
    found = created_classes()
    for name, kind in KINDS.items():
        assert any(issubclass(KINDS[other], kind) for other in found), name


def test_whatever_the_sources_raise_is_listed_or_is_an_error_of_python_or_pydantic() -> None:
    raised = {name_of(node.exc) for node in nodes() if isinstance(node, ast.Raise)}
    classes = {name for name in raised if name[:1].isupper()} - KINDS.keys()
    # a validator of the job schema raises PydanticCustomError, which its reader turns into a JobError
    assert [name for name in classes - {"PydanticCustomError"} if not hasattr(builtins, name)] == []


def test_the_tree_in_the_docstring_has_every_class_with_its_exit_code() -> None:
    tree = (errors.__doc__ or "").split("\n\n")[1].splitlines()[1:]
    found, status = {}, ""
    for line in tree:
        name, status_said, _ = re.match(r"[\s│├└─]+(\w+) +(\d*) ?(.*)", line).groups()  # type: ignore[union-attr]
        status = status_said or status
        found[name] = int(status)
    assert found == {name: int(kind.status) for name, kind in KINDS.items()}


def test_every_kind_has_its_own_code_under_that_of_its_branch_and_a_meaning_of_one_line() -> None:
    listed = [errors.describe_error_type(kind) for kind in errors.error_types()]
    assert len({facts["code"] for facts in listed}) == len(listed)
    for kind, facts in zip(errors.error_types(), listed):
        base = kind.__mro__[1]
        assert base is errors.WancliError or kind.code.startswith(f"{base.code}."), kind
        assert "\n\n" not in (kind.__doc__ or "\n\n"), kind
        assert 10 < len(facts["meaning"]) < 80


def test_errors_lists_them_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(run_wancli(capsys, "errors", "--json").out)
    assert {entry["code"]: entry["exit_code"] for entry in listed} == {
        kind.code: kind.status for kind in KINDS.values()
    }
    assert [entry["code"] for entry in listed if entry["retryable"]] == [
        "machine.disk",
        "machine.ffmpeg",
        "machine.hub",
        "machine.unreadable.now",
        "memory.exhausted",
        "stopped",
        "stopped.elsewhere",
        "stopped.interrupted",
    ]
    lines = run_wancli(capsys, "errors").out.splitlines()
    assert lines[0].split() == ["code", "exit", "retry", "meaning"]
    assert len(lines) == len(listed) + 1


def test_an_error_is_an_object_for_programs() -> None:
    error = errors.NoSpace("full", where="/out/a.mp4", hint="free some")
    assert error.as_dict() == {
        "code": "machine.no_space",
        "message": "full",
        "where": "/out/a.mp4",
        "hint": "free some",
        "retryable": False,
    }


def test_the_frames_of_an_error_list_arrays_and_no_modules() -> None:
    def fail() -> None:
        import numpy as np

        rows = np.zeros((2, 3), np.uint8)
        raise errors.JobError(f"of {rows.sum()}")

    with pytest.raises(errors.JobError) as caught:
        fail()
    text = errors.format_frames(caught.value)
    assert "rows: [2, 3] uint8" in text
    assert " np:" not in text
