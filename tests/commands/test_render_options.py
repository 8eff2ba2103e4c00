"""One parser reads the options of a render, wherever they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from wancli.__main__ import _parse_socket
from wancli.commands._options import Engine, LogLevel
from wancli.commands._render_options import RenderOptions


def test_words_become_options_of_their_types() -> None:
    words = ["job.yaml", "--set", "seed=1", "--set", "fps=8", "--cache-dir", "/c", "--log-level", "trace"]
    options = RenderOptions.parse([*words, "--save-every", "5", "--engine", "ray", "-q", "--force"])
    assert (options.job, options.cache_dir, options.quiet, options.force) == (
        "job.yaml",
        Path("/c"),
        True,
        True,
    )
    assert (options.engine, options.log_level) == (Engine.ray, LogLevel.trace)
    assert options.flags.sets == ("seed=1", "fps=8", "save_every=5")
    assert options.measures_effects


def test_without_words_every_option_has_its_default() -> None:
    assert RenderOptions.parse([]) == RenderOptions()
    assert RenderOptions().prints_paths


@pytest.mark.parametrize(
    ("output", "template"),
    [
        ("finals/", "finals/{id}.mp4"),
        ("/finals", "/finals/{id}.mp4"),
        ("v1.2/", "v1.2/{id}.mp4"),
        ("best-{seed}.mp4", "best-{seed}.mp4"),
        ("best.mov", "best.mov"),  # an error of the plan
    ],
)
def test_the_outputs_of_a_job_go_to_a_folder_or_after_a_template(output: str, template: str) -> None:
    assert RenderOptions(job="job.yaml", output=output).flags.sets == (f"output={template}",)
    assert RenderOptions(prompt="a cat", output=output).flags.sets == ()


@pytest.mark.parametrize("word", ["--json", "--json-stream"])
def test_json_on_stdout_leaves_no_room_for_paths(word: str) -> None:
    assert not RenderOptions.parse(["job.yaml", word]).prints_paths


@pytest.mark.parametrize("words", [["--bogus"], ["--retries", "-1"], ["--log-level", "loud"], ["a", "b"]])
def test_a_wrong_command_line_is_an_error(words: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        RenderOptions.parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["job.yaml"],
        ["job.yaml", "--socket", "auto"],
        ["--socket=/run/s", "job.yaml", "-q"],
        ["job.yaml", "--set", "seed=1", "--socket", "/a", "--socket", "/b"],
    ],
)
@pytest.mark.parametrize("variable", [None, "/from/environment"])
def test_the_socket_read_before_the_imports_is_that_of_the_parser(
    words: list[str], variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANCLI_SOCKET", raising=False)
    if variable:
        monkeypatch.setenv("WANCLI_SOCKET", variable)
    assert _parse_socket(["render", *words]) == RenderOptions.parse(words).socket
