"""The mask of a rule that was rendered, read again from its file."""

from __future__ import annotations

from pathlib import Path

from wancli.errors import WancliError
from wancli.injection.area import Mask, TokenGrid
from wancli.plan.areas import MaskReader
from wancli.storage.injection_schema import AreaRecord
from wancli.storage.manifest_schema import ShotSettings


def read_recorded_mask(area: AreaRecord, shot: ShotSettings, masks: MaskReader) -> Mask | None:
    """Return the mask as weights of the tokens of a shot; None if its file is gone or changed."""
    if area.mask is None:
        return None
    grids = (TokenGrid.of_video(shot.width, shot.height, shot.frames, stride) for stride in (8, 16))
    grid = next(grid for grid in grids if grid.tokens == shot.tokens)
    try:
        mask = masks.read(Path(area.mask.path), area.feather, grid)
    except WancliError:
        return None
    return mask if mask.sha256 == area.mask.sha256 else None
