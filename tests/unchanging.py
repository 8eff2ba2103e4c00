"""Checkpoints that no test changes: a process reads their headers once, whatever it plans of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wancli import wan_mini
from wancli.plan import planner

FOLDERS = {Path(__file__).parent / "fixtures" / "wan21-tiny", wan_mini.FOLDER}


def identify_once() -> None:
    """Let `build_plan` of this process, and of its forks, remember these checkpoints."""
    real, known = planner.identify, {}

    def identify(source: Any) -> Any:
        if source not in FOLDERS:
            return real(source)
        if source not in known:
            known[source] = real(source)
        return known[source]

    planner.identify = identify
