"""Files are read and asked for in one module. Reads the source.

A call counts by its name, whatever it is called on: `path.exists()`, `os.stat(path)`, `open(path)`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "wancli"
ASKS = {
    *("exists", "is_file", "is_dir", "is_symlink", "is_mount", "is_fifo", "stat", "lstat", "samefile"),
    *("iterdir", "glob", "rglob", "walk", "scandir", "listdir", "readlink", "resolve", "realpath", "access"),
    *("read_text", "read_bytes", "open", "open_code", "fdopen", "disk_usage", "statvfs", "expanduser"),
    *("lexists", "isfile", "isdir", "islink", "getsize", "getmtime", "ismount", "copyfile", "copytree"),
}
# Objects of wancli and of libraries whose methods have such a name and ask no disk, or hold a file already.
OWN = {"Image", "disk", "prompts", "header", "contents", "source", "self"}
WRITES = {
    "storage/atomic.py": {"open"},
    "storage/claim_file.py": {"open"},
    "storage/partial_file.py": {"open", "fdopen"},
    "farm/local_socket.py": {"open"},
    "farm/daemon.py": {"open"},
    "farm/client.py": {"open"},  # /dev/null
    "farm/client_environment.py": {"open"},  # stdin
    "stdio.py": {"open"},  # stdin and /dev/null
}
ASKED_HERE = {"storage/disk.py", "storage/paths.py"}  # paths.py expands `~`


def calls(path: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """The calls of a module: what each is called on, its name, and the node."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield "", node.func.id, node
            elif isinstance(node.func, ast.Attribute):
                yield ast.unparse(node.func.value), node.func.attr, node


def find_askers(path: Path, allowed: set[str]) -> list[str]:
    return [
        f"{path.name}:{node.lineno}: {owner}.{name}"
        for owner, name, node in calls(path)
        if name in ASKS - allowed and owner.split(".")[0] not in OWN and (owner or name in ("open", "fdopen"))
    ]


def test_only_one_module_asks_the_disk() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in ASKED_HERE:
            wrong += find_askers(path, WRITES.get(name, set()))
    assert wrong == [], "wancli.storage.disk has these questions, with errors that users understand"


@pytest.mark.parametrize(
    "program", ["p.exists()", "os.stat(p)", "open(p)", "p.open()", "os.path.isfile(p)", "(a / b).glob('*')"]
)
def test_a_question_elsewhere_would_be_found(program: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(program)
    assert find_askers(tmp_path / "a.py", set())
