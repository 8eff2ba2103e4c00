"""README and docs agree with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from test_layers import ORDER

from wancli.cli import app, run
from wancli.errors import ExitStatus
from wancli.job.foreign_words import explain_word
from wancli.job.loader import load, parse
from wancli.job.schema import ImageOptions, Job, Video
from wancli.job.schema_rules import InjectPicture, InjectPrompt
from wancli.report.event_schema import build_event_schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "wancli/assets/wan-mini/README.md"]
ARCHITECTURE = ROOT / "docs/architecture.md"


def blocks(language: str) -> list[tuple[str, str]]:
    """The code blocks of a language in all pages, each with the name of its page."""
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
    unplanned = {"models.yaml"}  # which is no job
    for path in (ROOT / "configs").glob("*.yaml"):
        if "model" in yaml.safe_load(path.read_text()):  # whose weights are not here
            assert load(path).items
            unplanned.add(path.name)
        elif path.name != "models.yaml":
            assert run(["plan", str(path), "--json"]) == 0
    assert unplanned == {"models.yaml", "pictures.yaml"}


def test_the_exit_codes_in_the_documents_are_those_of_the_program() -> None:
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/machines.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == [status.value for status in ExitStatus]


def test_the_readme_says_what_wancli_does_not_do() -> None:
    """A key that makes a sentence of the README wrong fails this test: change both."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("what wancli does not do\n")[1].split("\n## ")[0]
    assert {*Video.model_fields} == {"fps", "crf", "codec", "keep_latents"}
    codecs = get_args(Video.model_fields["codec"].annotation)
    assert all(f"`{codec}`" in section for codec in codecs)
    assert len(codecs) == 2
    for word in ("sound", "10 bits", "ProRes", "PNG", "EXR", "VACE"):
        assert word in section
    keys = {*Job.model_fields, *Video.model_fields, *ImageOptions.model_fields}
    assert "--preview" in readme  # which it does
    assert not {key for key in keys if str(explain_word(key)).startswith("wancli")}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_the_readme_links_to_every_page() -> None:
    targets = set(re.findall(r"\]\((docs/\w+\.md)", (ROOT / "README.md").read_text()))
    assert targets == {f"docs/{page.name}" for page in PAGES[1:]}


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert re.search(rf"^\| `wancli {name}[ `]", text, re.MULTILINE), name
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
    for key in InjectPrompt.model_fields | InjectPicture.model_fields:
        assert f"| `{key}` |" in rules, key


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def packages() -> dict[str, str]:
    """The packages of wancli as paths, each with its docstring."""
    root = ROOT / "wancli"
    docstrings = {
        f"{path.parent.relative_to(root).as_posix()}/": ast.get_docstring(ast.parse(path.read_text()))
        for path in root.glob("*/**/__init__.py")
    }
    return {name: text or "" for name, text in docstrings.items()}


def test_the_architecture_names_every_package_by_its_docstring() -> None:
    section = ARCHITECTURE.read_text().split("## Packages")[1].split("\n## ")[0]
    table = re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", section, re.MULTILINE)
    assert dict(table) == packages()
    assert len(table) == len(packages())
    for path in (ROOT / "wancli").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in section, path.name


def test_the_architecture_has_the_order_of_imports() -> None:
    section = ARCHITECTURE.read_text().split("## Order of imports")[1].split("```")[1]
    assert tuple(tuple(line.split()) for line in section.strip().splitlines()) == ORDER


def test_every_path_in_the_architecture_exists() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", ARCHITECTURE.read_text())
    assert len(named) > 60
    for path in named:
        assert (ROOT / "wancli" / path).exists() or (ROOT / path).exists(), path


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
