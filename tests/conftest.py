"""The tiny checkpoint and what the official code makes of it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# A run in the background of a script inherits that Ctrl-C is ignored; tests of it want it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from jobs import CommandResult

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # trio has one, and came with selenium
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny, and threads that wait for each other are not

TINY = Path(__file__).parent / "fixtures" / "wan21-tiny"
_NUMBERS = count()


gc.disable()  # nothing is garbage while modules are imported, and to look for it takes time


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_sessionfinish() -> None:
    """Hypothesis asks the collector at the end, whose answers are without frozen objects."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A whole Wan 2.1 checkpoint folder: 40 blocks, tiny widths, random weights."""
    return TINY


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Prompts, token ids and cases."""
    return json.loads((TINY / "reference.json").read_text())


@pytest.fixture(scope="session")
def numbers() -> dict[str, Any]:
    """The official tensors: contexts, velocities, latents, videos."""
    from safetensors.torch import load_file

    return load_file(TINY / "reference.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Let garbage collection look at the objects of this module alone, not at the million that imports made.

    A render asks for one when memory ran out.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, without its search for a free number among the folders of all tests before."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}{next(_NUMBERS)}"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache, or reads the user's models.yaml."""
    home = tmp_path_factory.getbasetemp() / "homes" / f"{next(_NUMBERS)}"
    (home / "cache").mkdir(parents=True)
    monkeypatch.setenv("WANCLI_CACHE", str(home / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.delenv("WANCLI_MODELS", raising=False)


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are encoded in their order, whatever the number of this process."""
    from wancli.text import encoder

    monkeypatch.setattr(encoder, "_rotate", lambda todo: todo)


@pytest.fixture(scope="session", autouse=True)
def _identify_once() -> None:
    from unchanging import identify_once

    identify_once()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that keeps embeddings and digests from test to test; one for the whole run."""
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint cut down to 4 blocks, where depth does not matter."""
    import unchanging
    from jobs import checkpoint, cut_blocks

    model = checkpoint(tmp_path_factory.mktemp("shallow"))
    cut_blocks(model)
    unchanging.FOLDERS.add(model)
    return model


@pytest.fixture(scope="session")
def quick(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of 4 blocks with all weights in safetensors, which load faster than pickles."""
    import unchanging
    from jobs import checkpoint, pickles_to_safetensors

    model = checkpoint(tmp_path_factory.mktemp("quick"), shallow)
    pickles_to_safetensors(model)
    unchanging.FOLDERS.add(model)
    return model


@pytest.fixture(scope="session")
def quick_for_pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make quick checkpoints, as `quick`, of models for pictures, each once."""
    import unchanging
    from image_cases import assemble
    from jobs import checkpoint, cut_blocks, pickles_to_safetensors

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = checkpoint(folder, assemble(name, folder / "links"))
        cut_blocks(model)
        pickles_to_safetensors(model)
        unchanging.FOLDERS.add(model)
        return model

    return make


@pytest.fixture
def known(quick: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quick checkpoint, with a cache that knows the prompts of the tiny job."""
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    return quick


@pytest.fixture
def render(tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Renders the tiny job with some changes on 4 blocks, with a cache that knows its prompts."""
    from jobs import run_wancli, tiny_job, write_job

    def rendered(*options: str, folder: Path = tmp_path, **changes: Any) -> CommandResult:
        job = tiny_job(**{"model": known} | changes)
        return run_wancli(capsys, "render", write_job(folder, job), "-q", *options)

    return rendered


@pytest.fixture
def lost_reader() -> Iterator[int]:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """ffmpeg passes the preflight and then does as the shell script says."""
    import imageio_ffmpeg

    real = imageio_ffmpeg.get_ffmpeg_exe()

    def install(script: str) -> None:
        path = tmp_path / "fake-ffmpeg"
        questions = f'case "$*" in *-version*|*-encoders*) exec {real} "$@";; esac'
        path.write_text(f"#!/bin/sh\n{questions}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return install
