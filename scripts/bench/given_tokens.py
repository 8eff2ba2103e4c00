"""`python -m scripts.bench.given_tokens`: given tokens by two rows of modulation and by a row per token.

The official code of TI2V-5B keeps the embedding of a timestep for every token. wancli keeps one for the given
tokens and one for all others. Both run in turn in one process with the same random weights.

Letters of shapes: L tokens, D width, F features of a token's velocity.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.machine import peak_growth, time_alternately
from scripts.bench.markdown import describe_machine, table
from wancli.models.config import WanConfig
from wancli.models.dit import Block, BlockState, WanModel
from wancli.models.dit_layers import Mix
from wancli.models.given_frames import GivenFrames

CONFIG = WanConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=1, in_dim=48, out_dim=48, text_dim=4096, freq_dim=256
)
GRID = (6, 40, 44)  # of a latent: 2,640 tokens


def forward_by_rows(model: WanModel, state: BlockState, mix: Mix) -> Tensor:
    """Run blocks and head with a row of modulation per token, as wan/modules/model.py of Wan 2.2 does."""
    given = state.given
    assert given is not None
    is_given_L = torch.arange(state.x_BLD.shape[1]) < given.tokens
    time_1L6D = torch.where(is_given_L[:, None, None], given.time_16D[:, None], state.time_B6D[:, None])
    time_1LD = torch.where(is_given_L[:, None], given.time_1D[:, None], state.time_BD[:, None])
    x_1LD = state.x_BLD
    for block in model.blocks:
        assert isinstance(block, Block)
        rows = (block.modulation[:, None] + time_1L6D).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        x_1LD = x_1LD + block.self_attn(modulate(x_1LD, shift1, scale1), state.rope_L1P) * gate1
        x_1LD = x_1LD + block.cross_attn(block.norm3(x_1LD), mix)
        x_1LD = x_1LD + block.ffn(modulate(x_1LD, shift2, scale2)) * gate2
    shift, scale = (model.head.modulation[:, None] + time_1LD[:, :, None]).unbind(2)
    y_1LD: Tensor = model.head.head(modulate(x_1LD, shift, scale))
    return y_1LD


def forward_by_slices(model: WanModel, state: BlockState, mix: Mix) -> Tensor:
    for block in model.blocks:
        state.apply(block, mix, checkpointed=False)
    y_1LD: Tensor = model.head(state.x_BLD, state.time_BD, state.given)
    return y_1LD


def modulate(x_1LD: Tensor, shift_1LD: Tensor, scale_1LD: Tensor) -> Tensor:
    return F.layer_norm(x_1LD, x_1LD.shape[-1:], eps=CONFIG.eps) * (1 + scale_1LD) + shift_1LD


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = WanModel(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    mix: Mix = ((model.project(torch.randn(60, CONFIG.text_dim)), 1.0),)
    x_1CTYX, picture = torch.randn(1, 48, *GRID), GivenFrames(first_CTYX=torch.randn(48, 1, *GRID[1:]))

    def run(forward: Callable[[WanModel, BlockState, Mix], Tensor]) -> Tensor:
        return forward(model, model.embed(x_1CTYX, 500.0, picture), mix)

    by_rows, by_slices = partial(run, forward_by_rows), partial(run, forward_by_slices)
    rows_1LF, slices_1LF = by_rows(), by_slices()
    change = float(torch.linalg.vector_norm(rows_1LF - slices_1LF) / torch.linalg.vector_norm(rows_1LF))
    slices_s, rows_s = time_alternately(by_slices, by_rows, options.rounds)
    rows = [
        ["a row per token, as official", f"{rows_s:.2f}", f"{peak_growth(by_rows):.0f}"],
        ["two rows, over two slices", f"{slices_s:.2f}", f"{peak_growth(by_slices):.0f}"],
    ]
    print(table(["modulation", "seconds", "MiB"], rows))
    print(f"- one block of the widths of 5B and the head, {rows_1LF.shape[1]:,} tokens, fp32")
    print(f"- relative difference of the outputs: {change:.1e}")
    print(f"- {describe_machine()}; medians of {options.rounds} runs, in turn")


if __name__ == "__main__":
    main()
