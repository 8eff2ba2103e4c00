"""The real command, the real ffmpeg, and a real SIGKILL: 20 moments in CI, 100 with `make crash-long`.

A run begins where all is imported: what is killed before that has written nothing.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from batch import LONG, Rig
from forked import Forked, start

KILLS = 100 if LONG else 20
PARTS = 2


def ffmpegs(folder: Path) -> list[int]:
    """The processes that write into a folder, our children or orphans."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(b"file:" + os.fsencode(folder)) for word in words):
            found.append(int(process.name))
    return found


def wait_for(what: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def meets(process: Forked, latent: Path, home: Path) -> bool:
    """Whether ffmpeg works on the video of this latent, or all is over."""
    return process.poll() is not None or (latent.exists() and bool(ffmpegs(home)))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_killed_run_leaves_no_orphan_and_nothing_torn_and_the_next_one_finishes(
    long_rig: Rig, part: int
) -> None:
    draw, wrong, alive = random.Random(part), [], 0
    for number in range(KILLS // PARTS):
        long_rig.reset()
        with start(*long_rig.arguments, env=long_rig.environment, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            if number % 2:  # while ffmpeg works on the first video, or the second
                latent = long_rig.latent(draw.choice("ab"))
                wait_for(partial(meets, process, latent, long_rig.home))
            else:
                wait_for(lambda: long_rig.out.exists())
                time.sleep(draw.uniform(0, 1.0))
            alive += bool(ffmpegs(long_rig.home))
            process.kill()
            told = process.stdout.read().split()
        wait_for(lambda: not ffmpegs(long_rig.home), 60)
        found = long_rig.torn()
        found += [
            f"{path} was told, and is not done" for path in told if not long_rig.is_done(Path(path).stem)
        ]
        wrong += [f"kill {number}: {one}" for one in found + long_rig.resumes()]
    assert not wrong, "\n".join(wrong)
    assert alive, "no kill met a living ffmpeg, which proves nothing about orphans"
