"""A power cut after any call: what was told to be done is there, and nothing under a final name is torn.

It is worked out from the recorded calls of a real run (`replay`), so it needs no rights and no mount. That
the recording is whole is a test of its own. `make crash-mounts` does the same on a mounted ext4, as root.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch import LONG, SHOTS, Rig
from replay import Disk, reported_paths

EVERY = 1 if LONG else 16  # which of the cuts are also gone on from


@pytest.fixture(scope="module")
def recorded(rig: Rig, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The log of an undisturbed run and the folder with what its fsyncs made durable."""
    rig.reset()
    blobs = tmp_path_factory.mktemp("blobs")
    ran = rig.run(blobs=blobs)
    assert ran.code == 0, ran.err
    assert [path.stem for path in ran.told] == list(SHOTS)
    left = {str(path): path.lstat().st_ino for path in rig.home.rglob("*") if path != rig.job}
    contents = {path: Path(path).read_bytes() for path in left if Path(path).is_file()}
    return ran, blobs, left, contents


def homes(
    rig: Rig, recorded, names: str, home: Path, *, syncs: bool = True
) -> Iterator[tuple[int, list[str]]]:  # type: ignore[no-untyped-def]
    """Lays the disk out in `home` after each call: the place in the log, and the shots told."""
    for number, disk in cuts(rig, recorded, syncs=syncs):
        shutil.rmtree(home, ignore_errors=True)
        disk.laid_out(getattr(disk, names)(), recorded[1], home)
        yield number, reported_paths(recorded[0].log, number)


def cuts(rig: Rig, recorded, *, syncs: bool = True) -> Iterator[tuple[int, Disk]]:  # type: ignore[no-untyped-def]
    """The disk after each call, with the place in the log."""
    disk = Disk(rig.home)
    for number, line in enumerate(recorded[0].log, 1):
        if "number" in line:
            disk.apply(line, syncs=syncs)
        yield number, disk


def test_the_recording_has_every_change_there_was(rig: Rig, recorded) -> None:  # type: ignore[no-untyped-def]
    ran, blobs, left, contents = recorded
    assert ran.strays == []
    *_, (_, disk) = cuts(rig, recorded)
    assert disk.names == left
    for path, data in contents.items():
        assert (blobs / disk.blobs[left[path]]).read_bytes() == data, path


def test_a_name_is_given_only_to_synced_bytes_and_its_folder_is_synced_after(rig: Rig, recorded) -> None:  # type: ignore[no-untyped-def]
    ran = recorded[0]
    for number, call in enumerate(ran.calls):
        if call["kind"] not in ("link", "replace", "rename"):
            continue
        source, target = call["path"].split(" ")
        of_source = [c["kind"] for c in ran.calls[:number] if c["path"] == source]
        assert of_source[-1] == "fsync", call
        folder = str(Path(target).parent)
        later = [c for c in ran.calls[number + 1 :] if c["path"] == folder and c["kind"] == "fsync"]
        assert later, call


@pytest.mark.parametrize("names", ["strict", "eager"])
def test_a_power_cut_after_any_call_loses_nothing_that_was_told(
    rig: Rig,
    recorded,
    tmp_path: Path,
    names: str,  # type: ignore[no-untyped-def]
) -> None:
    wrong, count, home = [], 0, tmp_path / "home"
    for number, promised in homes(rig, recorded, names, home):
        found = rig.torn(home)
        found += [f"{shot} was told, and is lost" for shot in promised if not rig.is_done(shot, home)]
        if number % EVERY == 0:
            rig.reset()
            for name in ("out", "cache"):
                if (home / name).exists():
                    shutil.copytree(home / name, rig.home / name)
            found += rig.resumes()
        wrong += [f"cut {number}: {one}" for one in found]
        count += 1
    assert count > 80
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("names", ["strict", "eager"])
def test_without_fsync_the_same_cuts_lose_what_was_told(
    rig: Rig,
    recorded,
    tmp_path: Path,
    names: str,  # type: ignore[no-untyped-def]
) -> None:
    lost = total = 0
    for _, promised in homes(rig, recorded, names, tmp_path / "home", syncs=False):
        total += len(promised)
        lost += sum(not rig.is_done(shot, tmp_path / "home") for shot in promised)
    assert total > 40
    assert lost == total
