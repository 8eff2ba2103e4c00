"""Imports run one way, and the command line imports little. Reads the source.

`TYPE_CHECKING` imports are left aside: they run nowhere. Imports inside functions count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "wancli"
# A package may import packages of earlier rows, and those of its own row unless that makes a circle.
ORDER = (
    ("errors", "units", "signals", "stream_writer", "stdio", "wan_mini"),
    ("batch_progress",),
    ("progress",),
    ("storage",),
    ("pictures", "video"),
    ("models",),
    ("resources",),
    ("weights.formats",),
    ("weights.lora",),
    ("weights",),
    ("weights.hub",),
    ("text",),
    ("injection",),
    ("sampling",),
    ("job",),
    ("plan",),
    ("engine",),
    ("farm", "probe"),
    ("report", "report.html"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {package: rank for rank, row in enumerate(ORDER) for package in row}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}


def package_of(module: str) -> str:
    """The entry of ORDER that a module belongs to: `weights.lora.file` to `weights.lora`."""
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in RANK)


def imports(node: ast.AST) -> Iterator[str]:
    """The modules of wancli that the code under a node imports, named from wancli on."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "wancli":
            base = (child.module or "").removeprefix("wancli").lstrip(".")
            for alias in child.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else base
        elif isinstance(child, ast.Import):
            yield from (a.name.removeprefix("wancli.") for a in child.names if a.name.startswith("wancli."))
        yield from imports(child)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    return {
        module: {name for name in imports(ast.parse(path.read_text())) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }


def test_no_module_imports_from_a_package_above_its_own(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if RANK[package_of(other)] > RANK[package_of(module)]
    ]
    assert upward == []


def test_no_module_imports_itself_by_way_of_others(graph: dict[str, set[str]]) -> None:
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_package_imports_itself_by_way_of_others(graph: dict[str, set[str]]) -> None:
    packages: dict[str, set[str]] = {package: set() for package in RANK}
    for module, others in graph.items():
        packages[package_of(module)] |= {package_of(other) for other in others} - {package_of(module)}
    TopologicalSorter(packages).prepare()  # raises CycleError


def test_the_command_line_is_read_before_jobs_plans_or_models_are_imported() -> None:
    """`--help`, a mistyped option and a client of a server wait for nothing else."""
    program = "import sys, wancli.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    slow = {"pydantic", "yaml", "rich", "jinja2", "numpy", "torch", "PIL"}
    slow |= {
        f"wancli.{package}" for package in ("job", "plan", "report", "farm", "weights", "models", "text")
    }
    assert loaded & slow == set()


def test_few_modules_lie_beside_the_packages() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 12
