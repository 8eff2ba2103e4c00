"""Write attention maps over their video to an MP4: heat on the darkened frames, a cell for every word.

The colours of a word go from nothing at probability 0 to the brightest at its largest in the video, which
stands under the word. Letters: W words, T latent frames, Y rows, X columns, 3 colours; pictures are uint8
[Y, X, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from wancli.storage.attention_file import latent_frame
from wancli.video import mp4
from wancli.video.clip import Clip
from wancli.video.side_by_side import choose_layout, draw_empty_grid, paste, write_pages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture: TypeAlias = NDArray[np.uint8]
    Maps: TypeAlias = NDArray[np.float32]

COMMENT = "attention maps by wancli"
_DARKENED = 0.3  # what is left of the brightness of a frame
# Heat from 0 to 1 in equal steps; dark to bright, so that it is read without colours, too.
_COLOURS = ((0, 0, 0), (85, 15, 110), (185, 55, 85), (250, 140, 10), (252, 255, 165))


def write(path: Path, video: Path, info: mp4.VideoInfo, maps_WTYX: Maps, words: Sequence[str]) -> None:
    """Write the overlay of a video. An earlier file of this kind is replaced, another file of that name is
    moved aside.

    Raises FfmpegError, NoSpace, MachineError.
    """
    tops = [float(maps_TYX.max()) for maps_TYX in maps_WTYX]
    cells = [Clip(video, word, None, info) for word in words]
    layout = choose_layout(cells, label_lines=2)

    def draw_pages() -> Iterator[bytes]:
        page_YX3 = draw_empty_grid(layout, words, [f"at most {100 * top:.3g} %" for top in tops])
        for number, picture_YX3 in enumerate(cells[0].read_pictures()):
            for place, (maps_TYX, top) in enumerate(zip(maps_WTYX, tops)):
                heat_YX = maps_TYX[latent_frame(number)] / (top or 1.0)
                paste(page_YX3, layout, place, draw_heat(picture_YX3, heat_YX))
            yield page_YX3.tobytes()

    write_pages(path, draw_pages(), layout, info.fps, info.frame_count, COMMENT)


def draw_heat(picture_YX3: Picture, heat_YX: Maps) -> Picture:
    """Draw heat from 0 to 1, of any resolution, over a darkened picture."""
    import numpy as np
    from PIL import Image

    rows, columns = picture_YX3.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(heat_YX, dtype=np.float32))
    smooth_YX = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR)).clip(0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    colours_YX3 = np.stack([np.interp(smooth_YX, stops, channel) for channel in zip(*_COLOURS)], axis=-1)
    drawn: Picture = (_DARKENED * picture_YX3 + colours_YX3).clip(0, 255).astype(np.uint8)
    return drawn
