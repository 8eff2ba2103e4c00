"""Pixels to the tensors that the VAE encoder and CLIP take, as the official code, diffusers or ComfyUI do it.

Letters: Y rows, X columns, 3 colours. A frame is fp32 [3, Y, X] of about -1 to 1; bicubic overshoots.

    official   stride 16 (Wan 2.1, 2.2 I2V): torch bicubic without antialias, stretched
               stride 32 (TI2V-5B): Pillow's Lanczos, to 8 bits, cropped
    diffusers  Pillow's Lanczos, to 8 bits, stretched
    comfy      torch bilinear without antialias, cropped
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wancli.pictures.sizes import Method, Preprocessing

if TYPE_CHECKING:
    from wancli.pictures.read import Pixels

CLIP_SIDE = 224
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Resizes pixels to (width, height) and returns a frame.
Resize: TypeAlias = Callable[["Pixels", int, int], Tensor]


def make_frame(rgb_YX3: Pixels, width: int, height: int, how: Preprocessing) -> Tensor:
    """Resize a picture to a frame, fp32 [3, height, width].

    `stretch` changes the aspect, `crop` cuts off what is outside the frame, and `pad` shows the whole picture
    on mid grey, 0.
    """
    resize = _choose_resize(how)
    if how.fit == "stretch":
        return resize(rgb_YX3, width, height)
    if how.fit == "crop":
        return (
            _crop_first(rgb_YX3, width, height)
            if how.method == "comfy"
            else _crop(rgb_YX3, width, height, resize)
        )
    return _pad(rgb_YX3, width, height, resize)


def make_clip_input(rgb_YX3: Pixels, method: Method) -> Tensor:
    """Make the input of CLIP from the picture, not from its frame: fp32 [3, 224, 224].

    `official` stretches, `diffusers` and `comfy` crop a square.
    """
    if method == "official":
        stretched = _bicubic(rgb_YX3, CLIP_SIDE, CLIP_SIDE).mul(0.5).add(0.5)
    elif method == "diffusers":
        stretched = _pillow_square(rgb_YX3)
    else:
        stretched = _antialiased_square(rgb_YX3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
    return (stretched - mean) / std


def crop_middle(rgb_YX3: Pixels, width: int, height: int) -> Pixels:
    """Return the middle of a picture, with mid grey where it is smaller, as torchvision's center_crop does.

    Mid grey is 127.5, so the values are fp32.
    """
    import numpy as np

    rows, columns, _ = rgb_YX3.shape
    tall, wide = max(rows, height), max(columns, width)
    page_YX3 = np.full((tall, wide, 3), 127.5, np.float32)
    top, left = (tall - rows) // 2, (wide - columns) // 2
    page_YX3[top : top + rows, left : left + columns] = rgb_YX3
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return page_YX3[top : top + height, left : left + width]


def _choose_resize(how: Preprocessing) -> Resize:
    if how.method == "comfy":
        return _bilinear
    return _lanczos if how.method == "diffusers" or how.stride == 32 else _bicubic


def _unit_range(rgb_YX3: Pixels) -> Tensor:
    """Return [3, Y, X] of 0 to 1."""
    import numpy as np

    return torch.from_numpy(np.array(rgb_YX3)).permute(2, 0, 1).contiguous().float().div(255)


def _bicubic(rgb_YX3: Pixels, width: int, height: int) -> Tensor:
    """Cubic with a = -0.75, half-pixel centres, no antialias, not clamped."""
    values = _unit_range(rgb_YX3).sub(0.5).div(0.5)
    return F.interpolate(values[None], size=(height, width), mode="bicubic", align_corners=False)[0]


def _bilinear(rgb_YX3: Pixels, width: int, height: int) -> Tensor:
    return F.interpolate(_unit_range(rgb_YX3)[None], size=(height, width), mode="bilinear")[0] * 2 - 1


def _lanczos(rgb_YX3: Pixels, width: int, height: int) -> Tensor:
    """Antialiased, rounded to 8 bits."""
    import numpy as np
    from PIL import Image

    resized = Image.fromarray(rgb_YX3).resize((width, height), Image.Resampling.LANCZOS)
    return _unit_range(np.asarray(resized)).sub(0.5).div(0.5)


def _crop(rgb_YX3: Pixels, width: int, height: int, resize: Resize) -> Tensor:
    """Resize to cover the frame, then take its middle, as the official TI2V code does."""
    rows, columns, _ = rgb_YX3.shape
    scale = max(width / columns, height / rows)
    covering = resize(rgb_YX3, round(columns * scale), round(rows * scale))
    left, top = (covering.shape[2] - width) // 2, (covering.shape[1] - height) // 2
    return covering[:, top : top + height, left : left + width].contiguous()


def _crop_first(rgb_YX3: Pixels, width: int, height: int) -> Tensor:
    """Cut off the pixels outside the aspect of the frame, then resize, as ComfyUI does."""
    rows, columns, _ = rgb_YX3.shape
    aspect, wanted = columns / rows, width / height
    left = round((columns - columns * (wanted / aspect)) / 2) if aspect > wanted else 0
    top = round((rows - rows * (aspect / wanted)) / 2) if aspect < wanted else 0
    left, top = min(left, (columns - 1) // 2), min(top, (rows - 1) // 2)
    return _bilinear(rgb_YX3[top : rows - top, left : columns - left], width, height)


def _pad(rgb_YX3: Pixels, width: int, height: int, resize: Resize) -> Tensor:
    rows, columns, _ = rgb_YX3.shape
    scale = min(width / columns, height / rows)
    inside = resize(rgb_YX3, max(1, round(columns * scale)), max(1, round(rows * scale)))
    left, top = (width - inside.shape[2]) // 2, (height - inside.shape[1]) // 2
    frame = torch.zeros(3, height, width)
    frame[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    return frame


def _pillow_square(rgb_YX3: Pixels) -> Tensor:
    """Resize the shorter side to 224 by Pillow's bicubic, then take the middle, as transformers does."""
    import numpy as np
    from PIL import Image

    rows, columns, _ = rgb_YX3.shape
    short = min(rows, columns)
    size = (int(CLIP_SIDE * columns / short), int(CLIP_SIDE * rows / short))
    resized = np.asarray(Image.fromarray(rgb_YX3).resize(size, Image.Resampling.BICUBIC))
    return _middle(_unit_range(resized))


def _antialiased_square(rgb_YX3: Pixels) -> Tensor:
    """Resize the shorter side to 224 by torch's antialiased bicubic, take the middle, round to 8 bits."""
    rows, columns, _ = rgb_YX3.shape
    values = _unit_range(rgb_YX3)
    if (rows, columns) != (CLIP_SIDE, CLIP_SIDE):
        scale = CLIP_SIDE / min(rows, columns)
        size = (round(scale * rows), round(scale * columns))
        values = F.interpolate(values[None], size=size, mode="bicubic", antialias=True)[0]
    return (255 * _middle(values)).clip(0, 255).round() / 255


def _middle(values_CYX: Tensor) -> Tensor:
    top, left = ((length - CLIP_SIDE) // 2 for length in values_CYX.shape[1:])
    return values_CYX[:, top : top + CLIP_SIDE, left : left + CLIP_SIDE]
