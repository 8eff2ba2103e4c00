"""Signals at many moments in the life of a process, from its start to its end.

From the moment that wancli catches a signal, no such signal ends the process by its default action: the exit
code is that of the work, or 75. What the process catches is read from /proc just before the signal is sent.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from batch import LONG
from forked import run as wancli
from forked import start
from jobs import tiny_job, write_job

from wancli.signals import STOP_SIGNALS

ASKING = [number for number in STOP_SIGNALS if number != signal.SIGINT]


def handles(pid: int, number: int) -> bool:
    """Whether a process catches or ignores a signal, proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigCgt", "SigIgn"))
    ]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_no_moment_of_a_process_is_without_a_handler_once_there_is_one(tmp_path: Path) -> None:
    """From the start of the interpreter to its end: of a render that finds no job, which takes a moment."""
    command = [sys.executable, "-m", "wancli", "render", str(tmp_path / "none.yaml"), "-q"]
    began = time.monotonic()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 2
    whole = time.monotonic() - began
    moments = 100 if LONG else 12
    ended: Counter[int] = Counter()
    for moment in range(moments):
        number = ASKING[moment % len(ASKING)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(whole * moment / moments)
        handled = handles(process.pid, number)  # of a zombie, too
        process.send_signal(number)
        code = process.wait(60)
        assert code in (75, 2) or (code == -number and not handled), (moment, number.name, code)
        ended[code] += 1
    assert ended[75] + ended[2]


def test_a_signal_at_any_moment_of_a_render_ends_it_with_75_or_its_own_exit_code(
    tmp_path: Path, known: Path
) -> None:
    job = write_job(tmp_path, tiny_job(known, sampler={"steps": 12}, frames=5))
    took, _, _ = render_disturbed(job, 60, signal.SIGTERM)
    video = tmp_path / "out/clip.mp4"
    whole = video.read_bytes()
    moments = 60 if LONG else 8
    for moment in range(moments):
        number = ASKING[moment % len(ASKING)]
        _, handled, code = render_disturbed(job, took * moment / moments, number)
        assert code in (0, 75) or (code == -number and not handled), (moment, number.name, code)
        assert video.with_suffix(".manifest.json").exists() >= (code == 0)
        assert wancli("render", job, "-q").returncode == 0  # from wherever it was
        assert video.read_bytes() == whole


def render_disturbed(job: Path, moment: float, number: int) -> tuple[float, bool, int]:
    """Render from the beginning, with a signal after so many seconds if it still runs.

    Returns how long it took, whether it handled the signal, and its exit code."""
    shutil.rmtree(job.parent / "out", ignore_errors=True)
    began, handled = time.monotonic(), True
    with start("render", job, "-q", stdout=-3, stderr=-3) as process:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(moment)
            return time.monotonic() - began, handled, code
        with suppress(FileNotFoundError):  # it has just ended
            handled = handles(process.pid, number)
        process.send_signal(number)
        code = process.wait(60)
        return time.monotonic() - began, handled, code


@pytest.mark.parametrize("number", ASKING if LONG else ASKING[:2])
def test_a_signal_after_the_last_write_leaves_the_exit_code(tmp_path: Path, number: int) -> None:
    """In an exit function that runs after all others."""
    program = (
        "import atexit, signal\n"
        f"atexit.register(lambda: [signal.raise_signal({int(number)}) for _ in 'ab'])\n"
        "from wancli.__main__ import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, "render", str(tmp_path / "none.yaml"), "-q"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 2
