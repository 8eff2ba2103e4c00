"""A Plan of Shots: everything that a render will do, decided and frozen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wancli.plan.pictures import Join
from wancli.plan.schedule import Schedule
from wancli.plan.shot import Shot
from wancli.storage.paths import slugify

_NAME_BYTES = 200  # of a job, for the names of files about it


class ShotWarning(NamedTuple):
    """A kind of warning, and the detail of one shot that stands for `{}` in it."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished shots. `baselines` has by id of a shot the id of its baseline; None if it is
    compared with nothing."""

    baselines: Mapping[str, str | None]
    default_baseline: str  # the first one, or the first shot if there is none
    sheet: bool
    video: bool
    added: tuple[str, ...] = ()  # plain shots that the job does not list


@dataclass(frozen=True)
class Plan:
    """The shots to render, and the warnings for the user before the render starts."""

    name: str
    shots: tuple[Shot, ...]
    warnings: tuple[str, ...]
    unselected: tuple[Shot, ...] = ()  # shots of the same job that are not to be rendered
    comparison: Comparison | None = None
    schedule: Schedule = field(default_factory=Schedule)  # of `shots`
    joins: tuple[Join, ...] = ()

    @property
    def all_shots(self) -> list[Shot]:
        """All shots of the job, selected or not."""
        return sorted((*self.shots, *self.unselected), key=lambda shot: shot.index)

    def sidecar_path(self, suffix: str) -> Path:
        """Return the path of a file about the whole job.

        It is in the folder that the outputs share, else in the folder of the first output.
        """
        shots = self.all_shots
        folder = Path(os.path.commonpath([shot.output.parent for shot in shots]))
        if folder == folder.parent:  # they share nothing but the root of the file system
            folder = shots[0].output.parent
        name = os.fsencode(self.name)
        if len(name) > _NAME_BYTES:
            return folder / f"{slugify(self.name)}-{hashlib.sha256(name).hexdigest()[:12]}.{suffix}"
        return folder / f"{self.name}.{suffix}"


def format_shots(shots: Sequence[Shot]) -> str:
    """Name shots for people: by the id of one, or by their number, the first and the last."""
    first, last = shots[0].id, shots[-1].id
    return first if len(shots) == 1 else f"{len(shots)} shots, {first} to {last}"


def format_shots_inline(shots: Sequence[Shot]) -> str:
    """Name shots in the middle of a sentence."""
    return f"shot {format_shots(shots)}" if len(shots) == 1 else format_shots(shots)
