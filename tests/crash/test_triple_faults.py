"""Three random faults in one run: 40 draws in CI, 2,000 with `make crash-long`."""

from __future__ import annotations

import random

import pytest
from batch import LONG, Rig
from shim import KINDS, Fault

PARTS = 4
DRAWS = 2000 if LONG else 40


@pytest.mark.parametrize("part", range(PARTS))
def test_after_any_three_faults_the_disk_is_right_and_the_next_run_finishes(rig: Rig, part: int) -> None:
    draw = random.Random(part)
    rig.reset()
    calls = [call["number"] for call in rig.run().calls]
    wrong = []
    for _ in range(DRAWS // PARTS):
        rig.reset()
        wrong += rig.trial(*sorted(Fault(draw.choice(calls), draw.choice(KINDS)) for _ in range(3)))
    assert not wrong, "\n".join(wrong)
