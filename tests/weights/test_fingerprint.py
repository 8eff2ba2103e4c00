"""Digests of weight files: what they cover, and how long they are remembered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from jobs import TRANSFORMER, forbid_calls

from wancli.cli import run
from wancli.storage import disk
from wancli.weights import fingerprint as fingerprint_module
from wancli.weights.fingerprint import fingerprint


def test_a_fingerprint_is_the_sha256_of_the_whole_content(tmp_path: Path):
    a, b, memo = tmp_path / "a", tmp_path / "b", tmp_path / "memo.json"
    a.write_bytes(b"first" * 1000)
    b.write_bytes(b"second")
    sha = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    assert fingerprint([a], memo) == sha[0]
    assert fingerprint([a, b], memo) == hashlib.sha256("".join(sha).encode()).hexdigest()
    assert fingerprint([b, a], memo) != fingerprint([a, b], memo)


def test_a_fingerprint_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, memo = tmp_path / "a", tmp_path / "memo.json"
    path.write_bytes(b"before")
    before = fingerprint([path], memo)
    with monkeypatch.context() as patch:
        forbid_calls(patch, (disk, "sha256"))
        assert fingerprint([path], memo) == before
    path.write_bytes(b"after!")
    assert fingerprint([path], memo) == hashlib.sha256(b"after!").hexdigest() != before


def test_a_digest_that_another_file_had_or_that_nobody_sealed_is_computed_again(tmp_path: Path) -> None:
    paths, memo = [tmp_path / "a", tmp_path / "b"], tmp_path / "memo.json"
    for path in paths:
        path.write_bytes(path.name.encode())
    sound = [fingerprint([path], memo) for path in paths]
    known = json.loads(memo.read_text())
    swapped = dict(zip(known, reversed(known.values())))
    unsealed = {name: entry["value"] for name, entry in swapped.items()}  # as earlier versions wrote them
    other_seal = {name: entry | {"value": "0" * 64} for name, entry in known.items()}
    for entries in (swapped, unsealed, other_seal):
        memo.write_text(json.dumps(entries))
        assert [fingerprint([path], memo) for path in paths] == sound
        assert json.loads(memo.read_text()) == known


def test_hashing_a_large_file_is_logged_once_and_not_when_quiet(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fingerprint_module, "LOGGED_SIZE", 10_000)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"model": str(tiny), "prompt": "a cat", "frames": 2}))
    for options, expected in ((["-q"], []), ([], [tiny / TRANSFORMER]), ([], [])):
        caplog.clear()
        cache = tmp_path / ("quiet" if options else "loud")
        assert run(["render", str(job), "--cache-dir", str(cache), *options]) == 2  # 2 frames are none
        assert [path.name in caplog.text for path in expected] == [True] * len(expected)
        assert bool(caplog.records) == bool(expected)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"x": 7}'])
def test_a_damaged_memo_is_written_again(tmp_path: Path, damage: bytes):
    path, memo = tmp_path / "a", tmp_path / "memo.json"
    path.write_bytes(b"content")
    memo.write_bytes(damage)
    expected = hashlib.sha256(b"content").hexdigest()
    assert fingerprint([path], memo) == expected
    (entry,) = json.loads(memo.read_text()).values()
    assert entry["value"] == expected


def test_a_memo_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    (tmp_path / "file").write_text("not a folder")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert fingerprint([weights], tmp_path / "file" / "memo.json") == expected
