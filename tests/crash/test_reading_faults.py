"""Calls that ask fail, one call of one path at a time, in every command.

A command then never ends as a bug, never loses or moves a finished video or a saved state, and names the file
that it could not look at. Without the fault, the next render finishes. CI tries each path with one of its
calls and one error, in turn; `make crash-long` tries all calls and all errors.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch import LONG, Rig, RunResult, in_memory
from disk_state import disk_state
from shim import Ask, Fault

ERRNOS = ("EIO", "ESTALE", "EACCES", "EMFILE", "EROFS", "EDQUOT", "ENFILE", "ENAMETOOLONG")
COMMANDS = {
    "plan": ("plan", "JOB"),
    "render": ("render", "JOB", "-q"),
    "status": ("status", "JOB"),
    "check a job": ("check", "JOB"),
    "check a folder": ("check", "OUT"),
    "report a job": ("report", "JOB", "-o", "OUT/page.html"),
    "report a folder": ("report", "OUT", "-o", "OUT/page.html"),
    "compare": ("compare", "OUT/a.mp4", "OUT/c.mp4", "-o", "OUT/sheet.png"),
    "inspect": ("inspect", "MODEL"),
    "encode": ("encode", "JOB", "-q"),
    "decode": ("decode", "OUT/a.latents.safetensors", "-o", "OUT/again.mp4", "-q"),
}
KEPT = ("a.mp4", "a.manifest.json", "a.latents.safetensors")


class ReadingRig:
    """A job with one finished shot, and one that was killed after its first step."""

    def __init__(self, rig: Rig, spare: Path) -> None:
        self.rig, self.spare = rig, spare
        rig.reset()
        assert rig.run().code == 0
        first = self._calls_for_b()
        saved = next(call for call in first if call["path"].endswith("b.state.safetensors"))
        self._remove_b()
        for path in rig.out.glob("job.report.*"):
            path.unlink()
        rig.run(Fault(saved["number"], "kill after"))
        assert (rig.out / "b.state.safetensors").exists()
        assert not (rig.out / "b.mp4").exists()
        shutil.copytree(rig.home, spare, symlinks=True)
        self.kept = {name: (rig.out / name).read_bytes() for name in KEPT}
        self.state = (rig.out / "b.state.safetensors").read_bytes()
        self.recoveries: dict[str, list[str]] = {}

    def _remove_b(self) -> None:
        for path in self.rig.out.glob("b.*"):
            path.unlink()

    def _calls_for_b(self) -> list[dict[str, str]]:
        self._remove_b()
        return self.rig.run().calls

    def run(self, name: str, *asks: Ask) -> RunResult:
        """One command in the folder as it was, on a disk that does not answer these."""
        rig = self.rig
        shutil.rmtree(rig.home)
        shutil.copytree(self.spare, rig.home, symlinks=True)
        words = {"JOB": rig.job, "OUT": rig.out, "MODEL": rig.model}
        command = [*COMMANDS[name]]
        for key, path in words.items():
            command = [
                str(path) + word.removeprefix(key) if word.startswith(key) else word for word in command
            ]
        shutil.copyfile(rig.out / "a.mp4", rig.out / "c.mp4")
        return rig.run(asks=asks, command=command, beat=0.05)

    def asks(self, name: str) -> list[tuple[str, str]]:
        """The paths that an undisturbed run asks for, with the calls."""
        ran = self.run(name)
        assert ran.code == 0, ran.err + ran.out
        return sorted({(line["path"], line["asked"]) for line in ran.log if "asked" in line})

    def trial(self, name: str, ask: Ask) -> list[str]:
        """What is wrong after a command with this fault, and after the next render; nothing should be."""
        ran = self.run(name, ask)
        wrong = [*self._promises(ran, ask), *self._losses()]
        state = disk_state(self.rig.home)
        if name in ("render", "encode") and (LONG or state not in self.recoveries):
            self.recoveries[state] = self._recovers()
        wrong += self.recoveries.get(state, [])
        return [f"{name}, {ask.error} at {ask.call} of {ask.path}: {one}" for one in wrong]

    def _promises(self, ran: RunResult, ask: Ask) -> Iterator[str]:
        if ran.code not in (0, 1, 2, 3, 4):
            yield f"exit code {ran.code}: {ran.err}"
        if "Traceback" in ran.err or "a bug in wancli" in ran.err:
            yield f"a traceback: {ran.err}"
        if ran.code and Path(ask.path).name not in ran.err + ran.out:
            yield f"exit code {ran.code}, and the path is not named: {ran.err}{ran.out}"
        yield from (f"a stray {line['stray']} of {line['path']}" for line in ran.strays)

    def _losses(self) -> Iterator[str]:
        out = self.rig.out
        for name, data in self.kept.items():
            if not (out / name).exists() or (out / name).read_bytes() != data:
                yield f"{name} is lost or changed"
        yield from (f"{path.name} was set aside" for path in out.glob("*.damaged-*"))
        yield from (f"{path.name} was set aside" for path in out.glob("*.old-*"))
        state = out / "b.state.safetensors"
        if not (out / "b.mp4").exists() and not state.exists():
            yield "the state of b is lost"

    def _recovers(self) -> list[str]:
        ran = self.rig.run(beat=0.05)
        made = self.rig.out / "b.mp4"
        right = made.exists() and hashlib.sha256(made.read_bytes()).digest() == self.rig.wanted["b"].digest()
        return [] if ran.code == 0 and right else [f"the next render ends with {ran.code}: {ran.err}"]


@pytest.fixture(scope="module")
def reading(one_block: Path) -> Iterator[ReadingRig]:
    with in_memory() as folder, in_memory() as spare, Rig(folder, one_block, quick=False) as rig:
        yield ReadingRig(rig, spare / "home")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_cannot_be_looked_at_is_named_and_nothing_is_lost(reading: ReadingRig, name: str) -> None:
    asks = reading.asks(name)
    assert len({path for path, _ in asks}) >= 5
    errors = itertools.cycle(ERRNOS)
    if LONG:
        trials = [Ask(call, path, error) for path, call in asks for error in ERRNOS]
    else:
        turn = itertools.count()
        calls = [[call for _, call in group] for _, group in itertools.groupby(asks, lambda ask: ask[0])]
        paths = sorted({path for path, _ in asks})
        trials = [
            Ask(of_path[next(turn) % len(of_path)], path, next(errors))
            for path, of_path in zip(paths, calls, strict=True)
        ]
    wrong = [one for ask in trials for one in reading.trial(name, ask)]
    assert not wrong, f"{len(wrong)} wrong in {len(trials)} trials:\n" + "\n".join(wrong)
