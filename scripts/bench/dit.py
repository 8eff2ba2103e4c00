"""Compare the transformer with diffusers' WanTransformer3DModel: same weights, one process, fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from scripts.bench.machine import Row, peak_growth, time_alternately
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.weights.formats.key_mapping import transformer_from_diffusers

LAYERS = 3
PROMPT = 60  # tokens
CONFIG = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=LAYERS)  # the widths of 1.3B
SHAPES = {256: (1, 32, 32), 1248: (2, 48, 52), 7800: (5, 60, 104)}  # tokens -> latent (T, Y, X)
REPEATS = {256: 15, 1248: 7, 7800: 3}


def flop(tokens: int) -> float:
    """Count the multiplications and additions of one plain forward, as the official code does it, in fp32.

    Per block and token: 2*(4+2)*d^2 for the projections of q, k, v, o and cross q, o; 4*d*f for the
    feed-forward; 4*L*d for self-attention and 4*512*d for cross-attention. Per block once: 4*512*d^2
    for the text's k and v. Once: 2*512*(4096*d + d^2) for the text, and per token 2*d*(64+64) for
    patches and head. The count is the same for both, though ours skips the repeated text work.
    """
    d, f, rows = CONFIG.dim, CONFIG.ffn_dim, CONFIG.text_len
    block = tokens * (12 * d * d + 4 * d * f + 4 * tokens * d + 4 * rows * d) + 4 * rows * d * d
    return LAYERS * block + 2.0 * rows * (CONFIG.text_dim * d + d * d) + tokens * 2 * d * 128


@torch.inference_mode()
def rows() -> list[Row]:
    """Measure one row per token count. The warm-up computes our text keys and values, as in a render."""
    torch.manual_seed(0)
    ours, theirs = _build_pair()
    text_NE = torch.randn(PROMPT, CONFIG.text_dim)
    padded_BNE = F.pad(text_NE, (0, 0, 0, CONFIG.text_len - PROMPT))[None]
    contexts = [((ours.project(text_NE), 1.0),)] * LAYERS
    t = torch.tensor([500.0])
    table = []
    for tokens, grid in SHAPES.items():
        x_BCTYX = torch.randn(1, CONFIG.in_dim, *grid)
        run_ours = partial(ours, x_BCTYX, t, contexts)
        run_theirs = partial(theirs, x_BCTYX, t, padded_BNE)
        _check_agreement(run_ours(), run_theirs().sample)
        ours_s, theirs_s = time_alternately(run_ours, run_theirs, REPEATS[tokens])
        memory = peak_growth(run_ours), peak_growth(run_theirs)
        table.append(Row(f"DiT forward, {tokens:,} tokens", ours_s, theirs_s, flop(tokens), *memory))
    return table


def _build_pair() -> tuple[WanModel, Any]:
    """Build both networks on the same tensors."""
    theirs: Any = WanTransformer3DModel(  # type: ignore[no-untyped-call]
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        text_dim=CONFIG.text_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=LAYERS,
    )
    theirs.eval()
    with torch.device("meta"):
        ours = WanModel(CONFIG)
    tensors = {transformer_from_diffusers(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(tensors, assign=True)
    return ours.eval(), theirs


def _check_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    distance = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
    if distance > 1e-4:
        raise AssertionError(f"the two networks disagree: relative L2 {distance:.1e}")
