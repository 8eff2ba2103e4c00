"""Programs that tests keep in strings, which no type checker reads, import names that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
IMPORT = re.compile(r"from (wancli[\w.]*) import (\w+(?:, \w+)*)")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the module and the name of each import in the strings of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in IMPORT.findall(node.value):
                yield from ((module, name) for name in names.split(", "))


def exists(module: str, name: str) -> bool:
    return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None


def test_a_program_in_a_string_imports_what_exists() -> None:
    found = {(path.name, *one) for path in FILES for one in imports(path)}
    assert len(found) > 10
    assert [one for one in sorted(found) if not exists(*one[1:])] == []
