"""The Wan 2.1 text-to-video transformer: video latents, a timestep and one text per block -> velocity.

Letters: B batch, C latent channels, T Y X latent frames, rows and columns, L video tokens (one per 1x2x2
patch, t-major), N context rows, D model width, E text encoder width, F = 4C features of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    rope_table,
    timestep_vector,
)
from wancli.models.text_context import Context, concat, from_padded_rows, lerp

__all__ = ["Context", "Mix", "Request", "WanModel", "concat", "lerp"]


@dataclass(frozen=True)
class Request:
    """The inputs of one forward: latents at timestep t, with block i attending to `contexts[i]`."""

    x_BCTYX: Tensor
    t: float | Tensor
    contexts: Sequence[Mix]


class Block(nn.Module):
    def __init__(self, config: WanConfig, kernels: ComputeOptions) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.chunk = kernels.chunk
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(dim, config.num_heads, config.eps, kernels.attention)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.eps)
        self.ffn = FeedForward(dim, config.ffn_dim)

    def forward(self, x_BLD: Tensor, time_B6D: Tensor, rope_L1P: Tensor, mix: Mix) -> Tensor:
        modulation = (self.modulation + time_B6D).chunk(6, dim=1)
        if self.chunk is None or self.chunk >= x_BLD.shape[1] or torch.is_grad_enabled():
            return self.forward_tokens(x_BLD, modulation, rope_L1P, mix)
        pieces = list(zip(torch.split(x_BLD, self.chunk, 1), torch.split(rope_L1P, self.chunk), strict=True))
        keys_values = self.keys_values(x_BLD, modulation, pieces)
        for piece_BLD, piece_L1P in pieces:
            self.forward_tokens(piece_BLD, modulation, piece_L1P, mix, keys_values)
        return x_BLD

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

    def keys_values(
        self, x_BLD: Tensor, modulation: Sequence[Tensor], pieces: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Compute the self-attention keys and values of all tokens, chunk by chunk."""
        shift1, scale1, *_ = modulation
        buffers = [torch.empty_like(x_BLD, dtype=self.self_attn.o.dtype) for _ in range(2)]
        k_BHLK, v_BHLK = map(self.self_attn.split_heads, buffers)
        start = 0
        for piece_BLD, piece_L1P in pieces:
            kv = self.self_attn.keys_values(modulate(piece_BLD, shift1, scale1, self.eps), piece_L1P)
            end = start + piece_BLD.shape[1]
            k_BHLK[:, :, start:end], v_BHLK[:, :, start:end] = kv
            start = end
        return k_BHLK, v_BHLK


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, 4 * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x_BLD: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_BD[:, None]).chunk(2, dim=1)
        y: Tensor = self.head(modulate(x_BLD, shift, scale, self.eps))
        return y.float()


@dataclass
class BlockState:
    """The state of a request between two blocks: its residual stream and what every block reads."""

    x_BLD: Tensor
    time_BD: Tensor
    time_B6D: Tensor
    rope_L1P: Tensor
    shape_BCTYX: torch.Size

    def fork(self) -> BlockState:
        """Return a copy that can take another path through the remaining blocks."""
        return replace(self, x_BLD=self.x_BLD.clone())

    def apply(self, block: nn.Module, mix: Mix, checkpointed: bool) -> None:
        arguments = self.x_BLD, self.time_B6D, self.rope_L1P, mix
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

    def project(self, text_NE: Tensor) -> Context:
        """Project encoder rows [n <= 512, text_dim] to the context that the blocks attend to. Padding becomes
        one row.

        Raises ValueError if there are more rows than the model reads.
        """
        count, length = len(text_NE), self.config.text_len
        if count > length:
            raise ValueError(f"{count} text rows, the model takes {length}")
        padded_NE = F.pad(text_NE, (0, 0, 0, int(count < length)))
        return from_padded_rows(self.text_embedding(padded_NE).float(), length)

    def forward(
        self, x_BCTYX: Tensor, t: float | Tensor, contexts: Sequence[Mix], *, checkpointed: bool = False
    ) -> Tensor:
        """Predict the velocity, fp32, of latents at timestep t in [0, 1000]: one t for all, or one per batch
        entry [B].

        With `checkpointed`, a backward pass recomputes the activations inside the blocks instead of keeping
        them.
        """
        (velocity_BCTYX,) = self._forward_group([Request(x_BCTYX, t, contexts)], checkpointed)
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
        self, x_BCTYX: Tensor, t: float | Tensor, contexts: Sequence[Mix], *, checkpointed: bool = False
    ) -> Iterator[Tensor]:
        """Yield the residual stream [B, L, D], fp32, after each block. Without gradients each block
        overwrites the tensor yielded before.
        """
        state = self.embed(x_BCTYX, t)
        for block, mix in zip(self.blocks, contexts, strict=True):
            state.apply(block, mix, checkpointed)
            yield state.x_BLD

    def _forward_group(self, requests: Sequence[Request], checkpointed: bool = False) -> list[Tensor]:
        """Pass all requests through each block in turn, so that a block's weights are needed once."""
        states = [self.embed(request.x_BCTYX, request.t) for request in requests]
        for block, *mixes in zip(self.blocks, *(r.contexts for r in requests), strict=True):
            for state, mix in zip(states, mixes):
                state.apply(block, mix, checkpointed)
        return [self.read_velocity(state) for state in states]

    def embed(self, x_BCTYX: Tensor, t: float | Tensor) -> BlockState:
        """Return the state before the first block. To see more than velocities, a caller loops over `blocks`
        itself and ends with `read_velocity`.
        """
        time_BD, time_B6D = self._embed_time(t, x_BCTYX.device)
        x_BLD, rope_L1P = self._embed_video(x_BCTYX)
        return BlockState(x_BLD, time_BD, time_B6D, rope_L1P, x_BCTYX.shape)

    def read_velocity(self, state: BlockState) -> Tensor:
        """Return the velocity, fp32, of a state after the last block."""
        return _unpatchify(self.head(state.x_BLD, state.time_BD), state.shape_BCTYX)

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
