"""The Wan transformer: video latents, a timestep, one text per block and given frames -> velocity.

Letters: B batch, C latent channels, T Y X latent frames, rows and columns, L video tokens (one per 1x2x2
patch, t-major), N context rows, D model width, E width of the text encoder or of CLIP, F = 4C features of a
patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit_layers import (
    Blocks,
    CrossAttention,
    FeedForward,
    Linear,
    Mix,
    SelfAttention,
    add,
    add_gated,
    linear,
    mlp,
    modulate,
    narrow_mix,
    rope_table,
    timestep_vector,
)
from wancli.models.given_frames import NO_FRAMES, GivenFrames
from wancli.models.text_context import Context, concat, from_image_rows, from_padded_rows, lerp

__all__ = ["Context", "Mix", "Request", "WanModel", "concat", "lerp"]


@dataclass(frozen=True)
class Request:
    """The inputs of one forward: latents at timestep t, with block i attending to `contexts[i]`.

    If `given` has first frames, x begins with them, and their tokens are at timestep 0. The residual of the
    forward [B, L, D], fp32, is appended to `kept`, if that is a list: x after the blocks minus x before them.
    """

    x_BCTYX: Tensor
    t: float | Tensor
    contexts: Sequence[Mix]
    given: GivenFrames = NO_FRAMES
    kept: list[Tensor] | None = None


class GivenTokens(NamedTuple):
    """The first tokens of a video, which are at timestep 0, and the embedding of this timestep."""

    tokens: int
    time_1D: Tensor
    time_16D: Tensor


class Piece(NamedTuple):
    """Consecutive tokens of one timestep, at most a chunk of them, from token `start` on."""

    start: int
    x_BLD: Tensor
    rope_L1P: Tensor
    modulation: Sequence[Tensor]


class Block(nn.Module):
    def __init__(self, config: WanConfig, kernels: ComputeOptions) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.chunk = kernels.chunk
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(dim, config.num_heads, config.eps, kernels.attention)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.eps, config.image_dim is not None)
        self.ffn = FeedForward(dim, config.ffn_dim)

    def forward(
        self,
        x_BLD: Tensor,
        time_B6D: Tensor,
        rope_L1P: Tensor,
        mix: Mix,
        given: GivenTokens | None = None,
    ) -> Tensor:
        """Run all tokens through the block. May overwrite x in place."""
        chunk = None if torch.is_grad_enabled() else self.chunk
        if given is None and (chunk is None or chunk >= x_BLD.shape[1]):
            modulation = (self.modulation + time_B6D).chunk(6, dim=1)
            return self.forward_tokens(x_BLD, modulation, rope_L1P, mix)
        pieces = list(self.split_tokens(x_BLD, time_B6D, rope_L1P, given, chunk or x_BLD.shape[1]))
        keys_values = self.keys_values(x_BLD, pieces)
        outputs = [
            self.forward_tokens(x, modulation, rope, narrow_mix(mix, start, start + x.shape[1]), keys_values)
            for start, x, rope, modulation in pieces
        ]
        return torch.cat(outputs, dim=1) if torch.is_grad_enabled() else x_BLD

    def split_tokens(
        self, x_BLD: Tensor, time_B6D: Tensor, rope_L1P: Tensor, given: GivenTokens | None, chunk: int
    ) -> Iterator[Piece]:
        """Split the tokens into pieces of one timestep each, which therefore share their modulation."""
        first, time_16D = (given.tokens, given.time_16D) if given else (0, time_B6D)
        for start, stop, time in ((0, first, time_16D), (first, x_BLD.shape[1], time_B6D)):
            if start == stop:
                continue
            modulation = (self.modulation + time).chunk(6, dim=1)
            for first_of_piece in range(start, stop, chunk):
                piece = slice(first_of_piece, min(first_of_piece + chunk, stop))
                yield Piece(first_of_piece, x_BLD[:, piece], rope_L1P[piece], modulation)

    def forward_tokens(
        self,
        x_BLD: Tensor,
        modulation: Sequence[Tensor],
        rope_L1P: Tensor,
        mix: Mix,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Run tokens through the block. A chunk of the tokens attends to the `keys_values` of all tokens. May
        overwrite x in place.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y_BLD = self.self_attn(modulate(x_BLD, shift1, scale1, self.eps), rope_L1P, keys_values)
        x_BLD = add_gated(x_BLD, y_BLD, gate1)
        del y_BLD  # or it stays in memory during the feed-forward
        x_BLD = add(x_BLD, self.cross_attn(self.norm3(x_BLD), mix))
        return add_gated(x_BLD, self.ffn(modulate(x_BLD, shift2, scale2, self.eps)), gate2)

    def keys_values(self, x_BLD: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Compute the self-attention keys and values of all tokens, piece by piece."""
        buffers = [torch.empty_like(x_BLD, dtype=self.self_attn.o.dtype) for _ in range(2)]
        k_BHLK, v_BHLK = map(self.self_attn.split_heads, buffers)
        for start, piece_BLD, piece_L1P, (shift1, scale1, *_) in pieces:
            kv = self.self_attn.keys_values(modulate(piece_BLD, shift1, scale1, self.eps), piece_L1P)
            end = start + piece_BLD.shape[1]
            k_BHLK[:, :, start:end], v_BHLK[:, :, start:end] = kv
        return k_BHLK, v_BHLK


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, 4 * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x_BLD: Tensor, time_BD: Tensor, given: GivenTokens | None = None) -> Tensor:
        if given is not None:
            parts = (x_BLD[:, : given.tokens], given.time_1D), (x_BLD[:, given.tokens :], time_BD)
            return torch.cat([self(*part) for part in parts], dim=1)
        shift, scale = (self.modulation + time_BD[:, None]).chunk(2, dim=1)
        y: Tensor = self.head(modulate(x_BLD, shift, scale, self.eps))
        return y.float()


class ImageEmbedding(nn.Module):
    """The rows of CLIP -> rows that the blocks attend to. Those of two pictures have learned positions."""

    def __init__(self, image_dim: int, dim: int, rows: int | None) -> None:
        super().__init__()
        self.emb_pos = None if rows is None else nn.Parameter(torch.zeros(1, rows, image_dim))
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            Linear(image_dim, image_dim),
            nn.GELU(),
            Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, rows_NE: Tensor) -> Tensor:
        y_ND: Tensor = self.proj(rows_NE if self.emb_pos is None else rows_NE + self.emb_pos[0])
        return y_ND


@dataclass
class BlockState:
    """The state of a request between two blocks: its residual stream and what every block reads."""

    x_BLD: Tensor
    time_BD: Tensor
    time_B6D: Tensor
    rope_L1P: Tensor
    shape_BCTYX: torch.Size
    given: GivenTokens | None = None

    def fork(self) -> BlockState:
        """Return a copy that can take another path through the remaining blocks."""
        return replace(self, x_BLD=self.x_BLD.clone())

    def apply(self, block: nn.Module, mix: Mix, checkpointed: bool) -> None:
        arguments = self.x_BLD, self.time_B6D, self.rope_L1P, mix, self.given
        if checkpointed:
            self.x_BLD = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            self.x_BLD = block(*arguments)


class WanModel(nn.Module):
    """Predicts the velocity (noise - video) of noisy latents. Parameter names are the official ones.

    Block i attends to `contexts[i]`; plain prompting passes the same mix to every block. Computes in the
    dtype of its weights; residual stream, modulation, time and head are fp32 throughout.
    """

    def __init__(self, config: WanConfig, kernels: ComputeOptions = ComputeOptions()) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = mlp(config.text_dim, dim, dim)
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = Blocks(Block(config, kernels) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_rows)

    def project(self, text_NE: Tensor) -> Context:
        """Project encoder rows [n <= 512, text_dim] to the context that the blocks attend to. Padding becomes
        one row.

        Raises ValueError if there are more rows than the model reads.
        """
        count, length = len(text_NE), self.config.text_len
        if count > length:
            raise ValueError(f"{count} text rows, the model takes {length}")
        padded_NE = F.pad(text_NE, (0, 0, 0, int(count < length)))
        rows_ND = self.text_embedding(padded_NE).float()
        return from_padded_rows(rows_ND, length, padded=count < length)

    def project_image(self, rows_NE: Tensor) -> Context:
        """Project the rows of CLIP, 257 of each picture, to the context that the blocks attend to.

        Raises ValueError if the model reads no pictures this way, or another number of them.
        """
        if self.config.image_dim is None:
            raise ValueError("the blocks of this model attend to no pictures")
        if self.config.image_rows not in (None, len(rows_NE)):
            raise ValueError(f"{len(rows_NE)} rows of CLIP, the model takes {self.config.image_rows}")
        return from_image_rows(self.img_emb(rows_NE.float()).float())

    def forward(
        self,
        x_BCTYX: Tensor,
        t: float | Tensor,
        contexts: Sequence[Mix],
        given: GivenFrames = NO_FRAMES,
        *,
        checkpointed: bool = False,
    ) -> Tensor:
        """Predict the velocity, fp32, of latents at timestep t in [0, 1000]: one t for all, or one per batch
        entry [B].

        With `checkpointed`, a backward pass recomputes the activations inside the blocks instead of keeping
        them.
        """
        (velocity_BCTYX,) = self._forward_group([Request(x_BCTYX, t, contexts, given)], checkpointed)
        return velocity_BCTYX

    def predict_velocities(
        self, requests: Sequence[Request], forwards_per_pass: int | None = None
    ) -> list[Tensor]:
        """Predict the velocity of each request, bit for bit equal to that of `forward`.

        `forwards_per_pass` requests, or all of them, share each pass over the blocks. Sharing pays if the
        weights of a block are fetched for each pass. Every request needs memory for its own residual stream.
        """
        forwards_per_pass = forwards_per_pass or max(1, len(requests))
        passes = [requests[i : i + forwards_per_pass] for i in range(0, len(requests), forwards_per_pass)]
        return [velocity_BCTYX for group in passes for velocity_BCTYX in self._forward_group(group)]

    def iterate_residuals(
        self,
        x_BCTYX: Tensor,
        t: float | Tensor,
        contexts: Sequence[Mix],
        given: GivenFrames = NO_FRAMES,
        *,
        checkpointed: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the residual stream [B, L, D], fp32, after each block. Without gradients each block
        overwrites the tensor yielded before.
        """
        state = self.embed(x_BCTYX, t, given)
        for block, mix in zip(self.blocks, contexts, strict=True):
            state.apply(block, mix, checkpointed)
            yield state.x_BLD

    def _forward_group(self, requests: Sequence[Request], checkpointed: bool = False) -> list[Tensor]:
        """Pass all requests through each block in turn, so that a block's weights are needed once."""
        states = [self.embed(request.x_BCTYX, request.t, request.given) for request in requests]
        for block, *mixes in zip(self.blocks, *(r.contexts for r in requests), strict=True):
            for state, mix in zip(states, mixes):
                state.apply(block, mix, checkpointed)
        for request, state in zip(requests, states):
            if request.kept is not None:
                before_BLD = self.embed(request.x_BCTYX, request.t, request.given).x_BLD
                request.kept.append(torch.sub(state.x_BLD, before_BLD, out=before_BLD))
        return [self.read_velocity(state) for state in states]

    def reuse_residual(self, request: Request, residual_BLD: Tensor) -> Tensor:
        """Predict the velocity, fp32, of a request that runs no block, with the residual of another one."""
        state = self.embed(request.x_BCTYX, request.t, request.given)
        state.x_BLD += residual_BLD
        return self.read_velocity(state)

    def embed(self, x_BCTYX: Tensor, t: float | Tensor, given: GivenFrames = NO_FRAMES) -> BlockState:
        """Return the state before the first block. To see more than velocities, a caller loops over `blocks`
        itself and ends with `read_velocity`.

        Raises ValueError if the channels of the latent and of the given frames are not those of the model.
        """
        shape_BCTYX, channels_CTYX = x_BCTYX.shape, given.channels_CTYX
        if channels_CTYX is not None:
            x_BCTYX = torch.cat((x_BCTYX, channels_CTYX.expand(len(x_BCTYX), -1, -1, -1, -1)), dim=1)
        if x_BCTYX.shape[1] != self.config.in_dim:
            raise ValueError(f"{x_BCTYX.shape[1]} channels, the model takes {self.config.in_dim}")
        time_BD, time_B6D = self._embed_time(t, x_BCTYX.device)
        first = None
        if given.first_CTYX is not None:
            _, frames, rows, columns = given.first_CTYX.shape
            first = GivenTokens(frames * (rows // 2) * (columns // 2), *self._embed_time(0.0, x_BCTYX.device))
        x_BLD, rope_L1P = self._embed_video(x_BCTYX)
        return BlockState(x_BLD, time_BD, time_B6D, rope_L1P, shape_BCTYX, first)

    def read_velocity(self, state: BlockState) -> Tensor:
        """Return the velocity, fp32, of a state after the last block."""
        return _unpatchify(self.head(state.x_BLD, state.time_BD, state.given), state.shape_BCTYX)

    def _embed_time(self, t: float | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        t_B = torch.as_tensor(t, dtype=torch.float64, device=device).reshape(-1)
        time_BD = self.time_embedding(timestep_vector(t_B, self.config.freq_dim)).float()
        return time_BD, self.time_projection(time_BD).float().view(-1, 6, self.config.dim)

    def _embed_video(self, x_BCTYX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, L, D], fp32, and their rotary table."""
        patches_BLF = _patchify(x_BCTYX)
        conv = self.patch_embedding
        assert conv.bias is not None
        # A convolution whose stride is its kernel is a Linear over the features of a patch.
        x_BLD = linear(patches_BLF, conv.weight.flatten(1), conv.bias).float()
        _, _, frames, rows, columns = x_BCTYX.shape
        return x_BLD, rope_table((frames, rows // 2, columns // 2), self.config.head_dim, x_BLD.device)


def _patchify(x_BCTYX: Tensor) -> Tensor:
    """Turn latents into the features of their 1x2x2 patches, ordered (c, y, x): [B, L, 4C]."""
    batch, channels, frames, rows, columns = x_BCTYX.shape
    x = x_BCTYX.reshape(batch, channels, frames, rows // 2, 2, columns // 2, 2)
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, 4 * channels)


def _unpatchify(y_BLF: Tensor, shape_BCTYX: torch.Size) -> Tensor:
    """Turn the features of each patch, ordered (y, x, c), back into [B, C, T, Y, X]."""
    batch, _, frames, rows, columns = shape_BCTYX
    y = y_BLF.view(batch, frames, rows // 2, columns // 2, 2, 2, -1)
    return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, rows, columns)
