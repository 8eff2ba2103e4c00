"""Files that change after they were written: every damage is found, none becomes a traceback or result."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batch import LONG, Rig
from jobs import damaged_copies

from wancli.errors import EntryError
from wancli.sampling import state_file
from wancli.sampling.solvers import State
from wancli.storage import manifest, tensor_file
from wancli.storage.cache import Store

DAMAGES = 10_000 if LONG else 250  # of each of four files: 1,000 in CI


def flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def grow(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 4096))


def zeroed(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    size = min(512, len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


def swapped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[at:] + data[:at]


def garbage(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randint(0, len(data)))


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, cut, grow, zeroed, swapped, garbage)


@pytest.fixture(scope="module")
def finished(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished shot with its latent, and the state of another."""
    rig.reset()
    assert rig.run().code == 0
    folder = tmp_path_factory.mktemp("finished")
    for path in rig.out.glob("a.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state_file.save_state(folder / "c.state.safetensors", State(noise, (noise * 2,), noise + 1), {"step": 1})
    return folder


def undetected(folder: Path, name: str) -> bool:
    if name.endswith(".state.safetensors"):
        return _reads(state_file.load_state, folder / name)
    if name.endswith(".latents.safetensors"):
        return _reads(tensor_file.load_latent, folder / name)
    key = hashlib.sha256(b"any").hexdigest()
    output = folder / "a.mp4"
    try:
        key = str((manifest.read_json(manifest.manifest_path(output)) or {}).get("key"))
    except EntryError:
        return False
    return manifest.is_done(output, key)


def _reads(load: Callable[[Path], object], path: Path) -> bool:
    try:
        load(path)
    except EntryError:
        return False
    return True


@pytest.mark.parametrize("name", ["a.mp4", "a.manifest.json", "a.latents.safetensors", "c.state.safetensors"])
def test_every_random_damage_to_an_output_is_found(finished: Path, name: str) -> None:
    draw, path = random.Random(name), finished / name
    whole = path.read_bytes()
    assert undetected(finished, name)
    count = missed = 0
    try:
        while count < DAMAGES:
            damaged = WAYS[count % len(WAYS)](whole, draw)
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            missed += undetected(finished, name)
            count += 1
    finally:
        path.write_bytes(whole)
    assert missed == 0


def test_every_bit_and_every_length_of_an_entry_on_disk_is_a_miss_or_the_payload(tmp_path: Path) -> None:
    key, payload = "ab" * 32, bytes(range(256))
    store = Store(tmp_path / "cache")
    store.put(key, payload)
    path = store.path(key)
    whole = path.read_bytes()
    damaged = list(damaged_copies(whole))
    for data in damaged:
        path.write_bytes(data)
        assert store.get(key) is None
    assert len(damaged) > 2500
    path.write_bytes(whole)
    assert store.get(key) == payload


# ---- many processes on one cache ----


def _hammer(root: Path, who: int, rounds: int) -> None:
    store, draw = Store(root), random.Random(who)
    for _ in range(rounds):
        name = draw.randrange(20)
        key, payload = hashlib.sha256(b"%d" % name).hexdigest(), b"%d" % name * 1000
        found = store.get(key)
        if found is None:
            store.put(key, payload)
        elif found != payload:
            os._exit(1)
        if draw.random() < 0.15:
            path = store.path(hashlib.sha256(b"%d" % draw.randrange(20)).hexdigest())
            _spoil(path, draw)


def _spoil(path: Path, draw: random.Random) -> None:
    """Deletes it, cuts it, or writes into it, as another program might."""
    try:
        if draw.random() < 0.3:
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.seek(draw.randrange(1000))
                file.write(draw.randbytes(10))
    except OSError:
        pass


def test_eight_processes_that_put_get_and_spoil_never_read_a_wrong_payload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(logging.getLogger("wancli.storage.cache"), "disabled", True)
    rounds = 5000 if LONG else 400
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(tmp_path / "cache", who, rounds)) for who in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert not list((tmp_path / "cache").rglob(".wancli-*"))
