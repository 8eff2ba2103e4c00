"""What README and docs say is checked against the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from wancli.cli import app, run
from wancli.errors import ExitStatus
from wancli.job.loader import parse
from wancli.job.schema import Inject, Job
from wancli.report.event_schema import build_event_schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_every_job_in_the_documents_is_a_valid_job(page: str, block: str) -> None:
    whole = yaml.safe_load(block)
    job = whole if "prompt" in whole else {"model": "m", "prompt": "p", **whole}
    assert parse(yaml.safe_dump(job).encode(), page, "job", ROOT).items


def test_every_configured_job_is_planned(tmp_path: Path) -> None:
    for path in {*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs/models.yaml"}:
        assert run(["plan", str(path), "--json"]) == 0


def test_the_exit_codes_of_the_readme_are_those_of_the_program() -> None:
    table = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == [status.value for status in ExitStatus]


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert f"`wancli {command.name or command.callback.__name__} " in text  # type: ignore[union-attr]
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            assert f"`{command.name}`" in text or f"`wancli {group.name} {command.name}`" in text


def test_the_documents_name_every_key_of_a_job() -> None:
    jobs = (ROOT / "docs/jobs.md").read_text()
    for name, field in Job.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None) or {name: field}
        for key in nested:
            assert re.search(rf"`(\w*\.)*{key}`", jobs), f"{name}.{key}"
    rules = (ROOT / "docs/injection.md").read_text()
    for key in Inject.model_fields:
        assert f"| `{key}` |" in rules, key


def test_every_file_the_documents_link_to_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_map_of_the_house_names_every_module() -> None:
    house = (ROOT / "README.md").read_text().split("## The house")[1]
    for path in (ROOT / "wancli").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in house or f"`wancli/{path.name}`" in house, (
            path.name
        )
    for folder in (p for p in (ROOT / "wancli").iterdir() if (p / "__init__.py").exists()):
        assert f"`wancli/{folder.name}/`" in house, folder.name


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name
        for path in ROOT.glob("tests/**/*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30
    assert named <= there, named - there
    for path in re.findall(r"tests/\w+(?:/\w+\.py|\.py)", page):
        assert (ROOT / path).exists(), path


def test_every_command_that_shows_a_promise_selects_tests() -> None:
    shown = [
        command
        for page in ("guarantees.md", "reliability.md")
        for command in re.findall(r"`pytest ([^`]+)`", (ROOT / "docs" / page).read_text())
    ]
    assert len(shown) > 15
    for command in shown:
        where, _, words = command.partition(" -k ")
        paths = [ROOT / path for path in where.split()]
        files = [f for path in paths for f in ([path] if path.is_file() else path.glob("test_*.py"))]
        assert len(files) >= len(paths), command
        names = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
        for word in filter(None, words.strip('"').split(" or ")):
            assert any(word in name for name in names), (command, word)


def test_every_measurement_the_documents_name_can_be_run() -> None:
    named = {
        name for page in PAGES for name in re.findall(r"python -m (scripts\.[a-z_.]+[a-z])", page.read_text())
    }
    assert len(named) > 8
    for name in named:
        assert importlib.util.find_spec(name), name


def test_the_events_in_the_documents_are_those_of_the_schema() -> None:
    section = (ROOT / "docs/machines.md").read_text().split("## Events")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE))
    assert told == {one["properties"]["type"]["const"] for one in build_event_schema()["oneOf"]}
