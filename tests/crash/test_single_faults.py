"""One fault at every call that changes the disk: nothing is torn, nothing is lost, no exit code lies.

The state of the disk after one call is that before the next, so `kill before` only adds what ffmpeg writes
meanwhile: `make crash-long` has it at every call, CI before the first. ENOSPC lasts until the run ends. It
takes the same way through the program as EIO: `make crash` has one of them at each call, in turn.
"""

from __future__ import annotations

import pytest
from batch import LONG, Rig
from shim import KINDS, Fault

_SHORT = ("write",)
_IN_TURN = ("EIO", "ENOSPC")


def faults(rig: Rig, kind: str) -> list[Fault]:
    """One for each call of an undisturbed run that this kind can hit."""
    rig.reset()
    ran = rig.run()
    assert ran.code == 0, ran.err
    assert ran.strays == []
    calls = [call for call in ran.calls if kind != "short" or call["kind"] in _SHORT]
    if kind == "kill before" and not LONG:
        calls = calls[:1]
    if kind in _IN_TURN and not LONG:
        calls = calls[_IN_TURN.index(kind) :: len(_IN_TURN)]
    return [Fault(call["number"], kind) for call in calls]


@pytest.mark.parametrize("kind", KINDS)
def test_after_any_single_fault_the_disk_is_right_and_the_next_run_finishes(rig: Rig, kind: str) -> None:
    wrong, trials = [], faults(rig, kind)
    assert len(trials) > {"kill before": 0, "short": 12, "EIO": 50, "ENOSPC": 50}.get(kind, 100)
    for fault in trials:
        rig.reset()
        wrong += rig.trial(fault)
    assert not wrong, f"{len(wrong)} wrong in {len(trials)} trials:\n" + "\n".join(wrong)
