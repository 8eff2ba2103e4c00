"""Names of the hub, and where its cache has their files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT

from wancli.weights.hub import cache
from wancli.weights.hub.name import HubName, parse_name

VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", HubName("Wan-AI/Wan2.1-T2V-1.3B")),
        ("org/one@v1.0", HubName("org/one", "v1.0")),
        ("org/one@refs/pr/3:sub/folder", HubName("org/one", "refs/pr/3", "sub/folder")),
        ("city96/Wan2.1-T2V-14B-gguf:a.gguf", HubName("city96/Wan2.1-T2V-14B-gguf", path="a.gguf")),
    ],
)
def test_a_name_is_read_and_written(text: str, name: HubName) -> None:
    assert parse_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "wan-mini",
        "/models/wan",
        "./org/one",
        "../one/two",
        "a/b/c",
        "models/wan.pth",
        "~/models",
        "org/",
    ],
)
def test_a_path_is_no_name(text: str) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "/data/hf"},
        {"HF_HOME": "~/hf"},
        {"XDG_CACHE_HOME": "/data/cache"},
        {"HF_HUB_CACHE": "/data/hub", "HF_HOME": "/data/hf"},
        {"HUGGINGFACE_HUB_CACHE": "$HOME/hub"},
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.check_output([sys.executable, "-c", program], text=True, env=dict(os.environ))
    assert str(cache.cache_folder()) == theirs.strip()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--one" / "snapshots" / COMMIT
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.gguf").write_bytes(b"GGUF")
    refs = tmp_path / "models--org--one" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return folder


def test_a_name_leads_into_the_snapshot(snapshot: Path) -> None:
    name = HubName("org/one")
    assert cache.find_path(name) == snapshot
    assert cache.find_path(HubName("org/one", COMMIT)) == snapshot
    assert cache.find_path(name.at("sub")) == snapshot / "sub"
    assert (
        cache.find_path(name.at("a.gguf"))
        == cache.find_path(name.at("sub/a.gguf"))
        == snapshot / "sub/a.gguf"
    )
    assert cache.find_path(name.at("b.gguf")) is None
    assert cache.find_path(HubName("org/one", "v2")) is None
    assert cache.find_path(HubName("org/two")) is None
    (snapshot / "a.gguf").write_bytes(b"GGUF")
    (snapshot / "sub" / "sub").mkdir()
    (snapshot / "sub" / "sub" / "a.gguf").write_bytes(b"GGUF")
    assert cache.find_path(name.at("a.gguf")) == snapshot / "a.gguf"


def test_a_path_in_a_snapshot_has_the_name_of_its_repository(snapshot: Path) -> None:
    assert cache.name_of(snapshot / "sub" / "a.gguf") == HubName("org/one")
    assert cache.name_of(snapshot.parent / ("g" * 40)) is None
    assert cache.name_of(snapshot.parents[1] / "blobs") is None
    other = snapshot.with_name("1" * 40)
    assert cache.name_of(other) == HubName("org/one", "1" * 40)


@pytest.mark.parametrize("content", ["", "../../../etc", "main", "é" * 40])
def test_a_damaged_reference_leads_nowhere(snapshot: Path, content: str) -> None:
    (snapshot.parents[1] / "refs" / "main").write_text(content)
    assert cache.find_path(HubName("org/one")) is None
