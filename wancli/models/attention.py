"""Scaled dot-product attention, and the choice of its backend.

Letters: B batch, H heads, L queries, N keys, K head width.

Every backend computes softmax(q k' / sqrt(K)) v up to rounding; SageAttention also rounds q and k to 8 bits.
flash-attn and SageAttention are used only if the user requests them, and are not dependencies.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wancli.errors import MachineError
from wancli.models.config import AttentionBackend

# The floats that networks compute in, by the names that users know.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TORCH_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Package:
    """A package that implements attention in half precision on CUDA, with its requirements."""

    module: str
    install: str
    capability: tuple[int, int]
    head_dim: int


PACKAGES = {
    "flash-attn-2": Package("flash_attn", "pip install flash-attn", (8, 0), 256),
    "flash-attn-3": Package(
        "flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention", (9, 0), 256
    ),
    "sage": Package("sageattention", "pip install sageattention", (8, 0), 128),
}


def attend(
    q_BHLK: Tensor,
    k_BHNK: Tensor,
    v_BHNK: Tensor,
    backend: AttentionBackend = "auto",
    bias_N: Tensor | None = None,
) -> Tensor:
    """Compute attention with the given backend. `bias_N` is added to the scores of each key.

    Only `auto` accepts a bias: no single backend of torch takes one on every device.
    """
    if backend == "auto":
        mask_111N = None if bias_N is None else bias_N[None, None, None]
        return F.scaled_dot_product_attention(q_BHLK, k_BHNK, v_BHNK, attn_mask=mask_111N)
    if bias_N is not None:
        raise ValueError(f"{backend} takes no bias")
    if backend in TORCH_BACKENDS:
        with sdpa_kernel(TORCH_BACKENDS[backend]):
            return F.scaled_dot_product_attention(q_BHLK, k_BHNK, v_BHNK)
    package = importlib.import_module(PACKAGES[backend].module)
    if backend == "sage":
        y_BHLK: Tensor = package.sageattn(q_BHLK, k_BHNK, v_BHNK, tensor_layout="HND")
        return y_BHLK
    output = package.flash_attn_func(*(x.transpose(1, 2) for x in (q_BHLK, k_BHNK, v_BHNK)))
    y_BLHK: Tensor = output[0] if isinstance(output, tuple) else output  # some versions add the log-sum-exp
    return y_BLHK.transpose(1, 2)


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    bias: bool = False,
    requested: AttentionBackend = "auto",
) -> str:
    """Return the backend that runs: flash_attention, efficient_attention, cudnn_attention or math of torch,
    or flash-attn-2, flash-attn-3 or sage.

    `bias` stands for cross-attention, where pad rows have a bias and torch always chooses. Asks torch with a
    few tokens and runs nothing. Raises MachineError if this machine cannot run the requested backend.
    """
    if requested in PACKAGES and not bias:
        _check_package(requested, PACKAGES[requested], torch.device(device), dtype, head_dim)
        return requested
    q_BHLK = torch.empty(1, 1, 16, head_dim, dtype=dtype, device=device)
    bias_111N = q_BHLK.new_zeros(1, 1, 1, 16) if bias else None
    restriction = nullcontext() if requested == "auto" or bias else sdpa_kernel(TORCH_BACKENDS[requested])
    try:
        with restriction, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about each backend that it rejects
            choice = SDPBackend(torch._fused_sdp_choice(q_BHLK, q_BHLK, q_BHLK, attn_mask=bias_111N))
    except RuntimeError:
        choice = SDPBackend.ERROR
    if choice == SDPBackend.ERROR:
        raise _unavailable_error(
            requested,
            f"torch does not support it for {DTYPE_NAMES[dtype]} on {device}, head_dim {head_dim}",
        )
    return choice.name.lower()


def _check_package(
    requested: AttentionBackend, package: Package, device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    if find_spec(package.module) is None:
        raise _unavailable_error(
            requested, f"{package.module} is not installed", f"To install it: {package.install}"
        )
    if device.type != "cuda":
        raise _unavailable_error(requested, f"it runs on CUDA only, not on {device}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise _unavailable_error(requested, f"it computes in bf16 or fp16, not in {DTYPE_NAMES[dtype]}")
    if head_dim > package.head_dim or head_dim % 8:
        widths = f"up to {package.head_dim} in steps of 8"
        raise _unavailable_error(requested, f"it supports head_dim {widths}, the model has {head_dim}")
    if (capability := torch.cuda.get_device_capability(device)) < package.capability:
        need, have = (".".join(map(str, pair)) for pair in (package.capability, capability))
        card = torch.cuda.get_device_name(device)
        raise _unavailable_error(requested, f"it needs compute capability {need}, {card} has {have}")


def _unavailable_error(
    backend: str, why: str, hint: str = "Leave out memory.attention to let torch choose."
) -> MachineError:
    what = f"attention backend {backend!r} is not available: {why}"
    return MachineError(what, where="memory.attention", hint=hint)
