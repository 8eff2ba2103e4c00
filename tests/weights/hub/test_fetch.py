"""Files of the hub arrive whole or not at all, whatever the server and the disk do."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub, digest_of, serve_hub, use_hub
from huggingface_hub import constants
from jobs import run_wancli

from wancli.errors import HubError, HubRefused, IntegrityError, JobError, NoSpace
from wancli.storage import disk
from wancli.weights import fingerprint
from wancli.weights.hub import cache, fetch
from wancli.weights.hub.name import HubName

UNIT = 8192  # ten of them are a piece that is written together
WEIGHTS = "model.safetensors"
NAME = HubName("org/one")
CONTENT = random.Random(1).randbytes(23 * UNIT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A repository with one file of weights, and nothing in the cache."""
    with serve_hub(org__one={WEIGHTS: CONTENT, "README.md": b"# One"}) as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10 * UNIT)
        yield server


def fetch_weights() -> tuple[Path, int]:
    """Fetch the file; return its path and how many bytes were counted."""
    (download,) = fetch.plan_downloads([NAME])
    counted: list[int] = []
    path = fetch.fetch(download, counted.append)
    fetch.finish(download.repository)
    return path, sum(counted)


def partial() -> Path:
    return cache.repository_folder(NAME.repo) / "blobs" / f"{digest_of(CONTENT)}.incomplete"


def test_a_file_arrives_where_huggingface_hub_looks_for_it(hub: Hub, monkeypatch: Any) -> None:
    from huggingface_hub import try_to_load_from_cache

    path, counted = fetch_weights()
    assert path.read_bytes() == CONTENT
    assert counted == len(CONTENT)
    found = try_to_load_from_cache("org/one", WEIGHTS, cache_dir=cache.cache_folder())
    assert found == str(path)
    assert cache.find_path(NAME) == path.parent
    assert path.resolve().name == digest_of(CONTENT)
    assert [name for name, _ in hub.requests] == ["api:org/one@main", WEIGHTS]
    fetch_weights()
    assert hub.asked_for(WEIGHTS) == [""]


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [11 * UNIT, 21 * UNIT]
    path, counted = fetch_weights()
    assert path.read_bytes() == CONTENT
    assert counted == len(CONTENT)
    assert hub.asked_for(WEIGHTS) == ["", f"bytes={10 * UNIT}-", f"bytes={20 * UNIT}-"]


def test_a_server_that_sends_nothing_more_ends_the_fetch_and_keeps_the_part(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [11 * UNIT] + [10 * UNIT] * 6
    with pytest.raises(HubError, match="cannot be reached") as caught:
        fetch_weights()
    assert caught.value.retryable
    assert partial().stat().st_size == 10 * UNIT
    (download,) = fetch.plan_downloads([NAME])
    assert download.missing == 13 * UNIT
    assert fetch_weights()[0].read_bytes() == CONTENT
    assert hub.asked_for(WEIGHTS)[-1] == f"bytes={10 * UNIT}-"


def test_a_server_that_ignores_ranges_sends_the_file_again(hub: Hub) -> None:
    partial().parent.mkdir(parents=True)
    partial().write_bytes(CONTENT[: 10 * UNIT])
    hub.ignores_ranges = True
    assert fetch_weights()[0].read_bytes() == CONTENT


def test_other_bytes_than_the_hub_says_are_refused_and_removed(hub: Hub) -> None:
    hub.lies[WEIGHTS] = CONTENT[:-1] + b"!"
    with pytest.raises(IntegrityError, match="the SHA-256 of what arrived") as caught:
        fetch_weights()
    assert caught.value.where == f"org/one:{WEIGHTS}"
    assert [path.name for path in partial().parent.iterdir()] == []
    assert cache.find_path(NAME) is None
    hub.lies.clear()
    assert fetch_weights()[0].read_bytes() == CONTENT


def test_a_damaged_part_is_found_at_the_end(hub: Hub) -> None:
    partial().parent.mkdir(parents=True)
    partial().write_bytes(b"?" * 100)
    with pytest.raises(IntegrityError):
        fetch_weights()
    assert fetch_weights()[0].read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_number_of_bytes_is_refused(hub: Hub, length: int) -> None:
    hub.lies[WEIGHTS] = (CONTENT + b"!")[:length]
    with pytest.raises((HubError, IntegrityError)):
        fetch_weights()
    hub.lies.clear()
    assert fetch_weights()[0].read_bytes() == CONTENT


def test_a_small_file_is_compared_by_the_sha1_of_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serve_hub(
        org__two={"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"x" * 2000}
    ) as hub:
        use_hub(monkeypatch, hub, tmp_path)
        hub.lies["config.json"] = b"[]"
        downloads = {download.path: download for download in fetch.plan_downloads([HubName("org/two")])}
        with pytest.raises(IntegrityError, match="SHA-1"):
            fetch.fetch(downloads["config.json"], lambda _: None)
        hub.lies.clear()
        path = fetch.fetch(downloads["config.json"], lambda _: None)
        git = ["git", "hash-object", "--no-filters", str(path)]
        assert path.resolve().name == subprocess.check_output(git, text=True).strip()


@pytest.mark.parametrize(
    ("answer", "kind", "words", "hint"),
    [
        ((401, "GatedRepo"), HubRefused, "gated", "Accept them at"),
        ((403, "GatedRepo"), HubRefused, "gated", "HF_TOKEN"),
        ((401, "RepoNotFound"), JobError, "no such repository", "HF_TOKEN"),
        ((403, ""), HubRefused, "403", "HF_TOKEN"),
        ((404, "RevisionNotFound"), JobError, "no revision 'main'", ""),
        ((429, ""), HubError, "429", "continues"),
        ((500, ""), HubError, "500", "continues"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    hub: Hub, answer: tuple[int, str], kind: type[Exception], words: str, hint: str
) -> None:
    hub.answers["api"] = answer
    with pytest.raises(kind, match=words) as caught:
        fetch_weights()
    assert hint in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "kind"), [(403, HubRefused), (429, HubError), (503, HubError), (404, JobError)]
)
def test_a_refusal_of_a_file_keeps_the_part(hub: Hub, status: int, kind: type[Exception]) -> None:
    partial().parent.mkdir(parents=True)
    partial().write_bytes(CONTENT[:UNIT])
    hub.answers[WEIGHTS] = (status, "")
    with pytest.raises(kind):
        fetch_weights()
    assert partial().stat().st_size == UNIT


def test_a_token_opens_a_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubRefused, match="gated"):
        fetch_weights()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_weights()[0].read_bytes() == CONTENT


def test_nothing_is_asked_in_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubRefused, match="HF_HUB_OFFLINE"):
        fetch_weights()
    assert hub.requests == []


def test_a_hub_that_is_away_is_an_error_of_the_machine(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9: cannot be reached"):
        fetch_weights()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(disk, "free_space", lambda _: len(CONTENT) - 1)
    done = run_wancli(capsys, "fetch", "org/one")
    assert done.code == 3
    assert "184 KiB are to be fetched, and 184 KiB are free" in done.err
    assert hub.asked_for(WEIGHTS) == []
    partial().parent.mkdir(parents=True)
    partial().write_bytes(CONTENT[:UNIT])
    fetch.require_space(fetch.plan_downloads([NAME]))  # a part needs no space


def test_a_disk_that_becomes_full_keeps_the_part(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15 * UNIT, limits[1]))
    try:
        with pytest.raises(NoSpace):
            fetch_weights()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert partial().stat().st_size == 15 * UNIT
    assert fetch_weights()[0].read_bytes() == CONTENT
    assert hub.asked_for(WEIGHTS)[-1] == f"bytes={15 * UNIT}-"


def test_the_command_prints_the_folder_and_says_what_it_does(hub: Hub, capsys: Any) -> None:
    listed = run_wancli(capsys, "fetch", "org/one", "--dry-run", "--json")
    (row,) = json.loads(listed.out)
    assert (row["path"], row["bytes"], row["missing"]) == (WEIGHTS, len(CONTENT), len(CONTENT))
    assert row["licence"] == "apache-2.0"
    assert "184 KiB to fetch; apache-2.0" in run_wancli(capsys, "fetch", "org/one", "--dry-run").out
    done = run_wancli(capsys, "fetch", "org/one", "--progress", "plain")
    assert done.code == 0
    assert done.out.strip() == str(cache.find_snapshot(NAME))
    assert f"fetch {WEIGHTS}: started, 1 MiB" in done.err
    again = run_wancli(capsys, "fetch", f"org/one:{WEIGHTS}", "--json")
    assert json.loads(again.out) == [
        {"name": f"org/one:{WEIGHTS}", "path": str(cache.find_path(NAME.at(WEIGHTS)))}
    ]
    assert hub.asked_for(WEIGHTS) == [""]


def test_a_fetched_file_is_not_hashed_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    run_wancli(capsys, "fetch", "org/one", "--cache-dir", tmp_path)
    monkeypatch.setattr(fingerprint, "_sha256", lambda _: pytest.fail("hashed again"))
    path = cache.find_path(NAME.at(WEIGHTS))
    assert path
    assert fingerprint.fingerprint([path], tmp_path / "hashes.json") == digest_of(CONTENT)


def test_a_commit_and_a_branch_are_revisions(hub: Hub, capsys: Any) -> None:
    assert run_wancli(capsys, "fetch", f"org/one@{COMMIT}").code == 0
    assert cache.find_path(NAME) is None  # nobody asked what main is
    assert run_wancli(capsys, "fetch", "org/one@refs/pr/1").code == 0
    assert cache.find_path(HubName("org/one", "refs/pr/1")) == cache.find_path(HubName("org/one", COMMIT))
    assert hub.asked_for(WEIGHTS) == [""]


def test_a_fetch_that_was_killed_twice_continues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In processes of their own, where a piece has 10 MiB."""
    content, piece = random.Random(2).randbytes(21 * 2**20), 10 * 2**20
    with serve_hub(org__one={WEIGHTS: content}) as hub:
        hub.cuts[WEIGHTS], hub.holds = [piece + 1, 2 * piece + 1], threading.Event()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "wancli", "fetch", "org/one"]
        use_hub(monkeypatch, hub, tmp_path)
        part = cache.repository_folder("org/one") / "blobs" / f"{digest_of(content)}.incomplete"
        for size in (piece, 2 * piece):
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
                until = time.monotonic() + 60
                while not part.exists() or part.stat().st_size < size:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.01)
                process.kill()
        hub.holds.set()
        path, counted = fetch_weights()
        assert path.read_bytes() == content
        assert counted == 2**20
        assert hub.asked_for(WEIGHTS) == ["", f"bytes={piece}-", f"bytes={2 * piece}-"]
