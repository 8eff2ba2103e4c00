"""SIGTERM from outside, again and again until a 20-step batch is done: every bit as if there was none."""

from __future__ import annotations

import signal
import time
from itertools import pairwise

import pytest
from batch import SHOTS, Rig

from wancli.errors import EntryError
from wancli.sampling import state_file


def reached(rig: Rig) -> tuple[int, ...]:
    """How many steps of each shot are on disk: 20 with its latent, 21 with its video."""
    return tuple(
        21 if rig.is_done(name) else 20 if rig.latent(name).exists() else _saved(rig, name) for name in SHOTS
    )


def _saved(rig: Rig, name: str) -> int:
    try:
        return int(state_file.load_state(rig.out / f"{name}.state.safetensors")[1]["step"])
    except EntryError:
        return 0


def test_a_batch_that_is_stopped_again_and_again_ends_as_one_that_never_was(long_rig: Rig) -> None:
    long_rig.reset()
    stops, seen = 0, [reached(long_rig)]
    for _ in range(80):
        long_rig.start(watched=False)
        child = long_rig.child()
        while long_rig.is_running(child) and reached(long_rig) == seen[-1]:
            time.sleep(0.001)
        long_rig.signal(child, signal.SIGTERM)
        ran = long_rig.ended()
        assert long_rig.torn() == []
        if ran.code == 0:
            break
        assert ran.code == 75, ran.err
        stops += 1
        seen.append(reached(long_rig))
    assert ran.code == 0
    assert stops >= 8
    assert all(later > before for before, later in pairwise(seen))
    assert long_rig.resumes() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_loses_no_step_that_was_saved(long_rig: Rig, number: int) -> None:
    long_rig.reset()
    long_rig.start(watched=False)
    child = long_rig.child()
    while not reached(long_rig)[0]:
        time.sleep(0.001)
    for _ in range(2):
        long_rig.signal(child, number)
    ran = long_rig.ended()
    assert ran.code in (75, 130, 128 + number), ran.err
    assert long_rig.torn() == []
    assert reached(long_rig)[0]
    assert long_rig.resumes() == []
