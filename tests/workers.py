"""Workers: real processes that render one job in one folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Forked, start
from jobs import write_job

from wancli.progress import Progress

PROGRAM = """
import os, signal, sys, time
from contextlib import suppress
from pathlib import Path
from wancli.__main__ import main
from wancli.engine import denoise_stage
from wancli.video import mp4

log, event, id, step = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
note, to_rgb24 = denoise_stage._record_step, mp4.to_rgb24

def noted(one, *rest):
    note(one, *rest)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{os.getpid()} {one.shot.id} {one.step}\\n".encode())
    os.close(fd)
    if one.shot.id in id.split(",") and one.step == step:
        happens(one.shot.id)

def converted(frames):
    if step == -1:
        happens()
    return to_rgb24(frames)

def happens(shot=""):
    if event.endswith(("SIGKILL", "SIGTERM")):
        with suppress(FileExistsError):
            Path(f"{event}.{shot}").touch(exist_ok=False)
            os.kill(os.getpid(), signal.Signals[event.rpartition("/")[2]])
        return
    Path(event + ".here").touch()
    if event.endswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    while event.endswith("hang"):
        time.sleep(1)

denoise_stage._record_step, mp4.to_rgb24 = noted, converted
main()
"""


class Notes(Progress):
    """Keeps the notes, and runs something when the first one comes."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.notes: list[str] = []
        self._then = then

    def note(self, text: str) -> None:
        if not self.notes:
            self._then()
        self.notes.append(text)


class Folder:
    """A job that several processes render, and a log of the steps they take."""

    def __init__(self, path: Path, job: dict[str, Any], cache: Path) -> None:
        self.path, self.cache, self.log = path, cache, path / "log"
        self.job = write_job(path, job)
        self._running: list[Forked] = []

    def start(self, *options: str, event: str = "", at: tuple[str, int] = ("", 0)) -> Forked:
        """A real process, to which something happens at a step of a shot: `hang`, `stop`, SIGKILL or SIGTERM.

        Of several processes and several shots, `a,b`, a signal strikes one process at each shot.
        """
        special = [self.log, self.path / event, at[0], at[1]]
        arguments = ["render", self.job, "--cache-dir", self.cache, "--save-every", "1", *options]
        child = start(*special, *arguments, program=PROGRAM)
        self._running.append(child)
        return child

    def until(self, name: str) -> None:
        """Waits for a file."""
        while not (self.path / name).exists():
            assert all(child.poll() in (None, 0) for child in self._running)
            time.sleep(0.02)

    def steps(self, pid: int | None = None) -> list[tuple[str, int]]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(id, int(step)) for who, id, step in lines if pid is None or int(who) == pid]

    def end(self) -> None:
        for child in self._running:
            with child:
                child.kill()
