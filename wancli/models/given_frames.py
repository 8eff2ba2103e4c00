"""Frames of a video that are given as pictures, in the two ways in which transformers take them.

I2V, FLF2V and Fun-InP read them in further channels: a mask of given frames, and the latents of a video that
is grey except for them. TI2V-5B has the latent of the first frame in place of noise, at timestep 0. Source:
wan/image2video.py and wan/first_last_frame2video.py of Wan 2.1, wan/textimage2video.py of Wan 2.2.

Letters: C channels, T latent frames, Y X the latent grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.models.vae import VAE

MASK_CHANNELS = 4  # one for each frame of a latent frame


@dataclass(frozen=True, eq=False)
class GivenFrames:
    """The given frames of one video, in one of two ways; without any the video is made from text alone."""

    channels_CTYX: Tensor | None = None  # mask and latents, joined to the channels of the noisy latent
    first_CTYX: Tensor | None = None  # in place of the first latent frames, which stay as they are

    def put_into(self, x_CTYX: Tensor) -> Tensor:
        """Return a latent with its first frames replaced by those that are given."""
        if self.first_CTYX is None:
            return x_CTYX
        first_CTYX = self.first_CTYX.to(x_CTYX)
        return torch.cat((first_CTYX, x_CTYX[:, first_CTYX.shape[1] :]), dim=1)

    def to(self, device: torch.device | str, *, copy: bool = False) -> GivenFrames:
        tensors = self.channels_CTYX, self.first_CTYX
        moved = (None if x is None else x.to(device, copy=copy) for x in tensors)
        return GivenFrames(*moved)


NO_FRAMES = GivenFrames()


def frame_mask(frames: int, given: Collection[int]) -> Tensor:
    """Return [4, T], 1 for given frames: channel c of latent frame j is frame 4j-3+c; frame 0 has all four.

    Official FLF2V always assumes 81 frames; here the mask has those of the video, as in diffusers.
    """
    mask_F = torch.zeros(frames)
    mask_F[list(given)] = 1
    return torch.cat((mask_F[:1].expand(MASK_CHANNELS - 1), mask_F)).view(-1, MASK_CHANNELS).T


def encode_channels(vae: VAE, pictures: Mapping[int, Tensor], frames: int) -> Tensor:
    """Return the further channels [4 + z, T, Y/8, X/8], fp32, of a video of which some frames are given.

    `pictures` has them by their number: [3, Y, X] in about [-1, 1], neither clamped nor rounded.
    """
    z_CTYX = vae.encode_chunks(_chunks(pictures, frames))
    mask_CT11 = frame_mask(frames, pictures)[:, :, None, None].to(z_CTYX)
    return torch.cat((mask_CT11.expand(-1, -1, *z_CTYX.shape[2:]), z_CTYX))


def encode_picture(vae: VAE, picture_CYX: Tensor) -> Tensor:
    """Return the latent [z, 1, Y/s, X/s] of one picture, as the first frame of a video."""
    return vae.encode(picture_CYX[:, None])


def _chunks(pictures: Mapping[int, Tensor], frames: int) -> Iterator[Tensor]:
    """Yield the frames of the video in chunks of 1, 4, 4, .. frames; those that are not given are grey."""
    grey_CYX = torch.zeros_like(next(iter(pictures.values())))
    for start in range(-3, frames, 4):
        numbers = range(max(start, 0), start + 4)
        yield torch.stack([pictures.get(number, grey_CYX) for number in numbers], dim=1)
