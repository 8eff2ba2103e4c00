"""The attention and fp8 backends of a transformer: what the job requests, and what this machine can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wancli.errors import JobError
from wancli.models.config import ComputeOptions

if TYPE_CHECKING:
    from wancli.job.loader import Item
    from wancli.plan.model_spec import ModelSpec


def read_compute_options(item: Item) -> ComputeOptions:
    """Read the compute options of a job. `chunk: auto` means all tokens at once.

    Raises JobError if the options contradict each other.
    """
    memory = item.job.memory
    if memory.fp8_matmul:
        if memory.dtype not in ("auto", "fp8"):
            message = f"weights in {memory.dtype} cannot be multiplied in fp8"
            raise JobError(message, where=item.location("memory", "dtype"), hint="Leave out memory.dtype.")
        if memory.residency not in ("auto", "resident"):
            raise JobError(
                f"{memory.residency} weights cannot be multiplied in fp8; resident weights can",
                where=item.location("memory", "residency"),
                hint="Leave out memory.residency.",
            )
        if item.job.loras:
            raise JobError(
                "LoRAs cannot be added to weights that are multiplied in fp8",
                where=item.location("loras"),
                hint="Leave out memory.fp8_matmul; memory.dtype: fp8 takes LoRAs.",
            )
    return ComputeOptions(
        memory.attention, None if memory.chunk == "auto" else memory.chunk, memory.fp8_matmul
    )


def check_backends(model: ModelSpec) -> None:
    """Raise MachineError if this machine lacks a backend, before anything is loaded."""
    if model.kernels.attention != "auto":
        describe_attention(model)
    if model.kernels.fp8_matmul:
        from wancli.weights.fp8_linear import check_fp8_matmul

        sizes = model.checkpoint.transformer_config
        check_fp8_matmul(model.device, (sizes.dim, sizes.ffn_dim))


def describe_attention(model: ModelSpec) -> dict[str, Any]:
    """Name the attention backends that really run, for the self-attention and for the cross-attention."""
    from wancli.models.attention import DTYPES, choose_backend

    dtype = DTYPES[model.compute_dtype]
    width, asked = model.checkpoint.transformer_config.head_dim, model.kernels.attention
    return {
        "asked": asked,
        "self": choose_backend(model.device, dtype, width, requested=asked),
        "cross": choose_backend(model.device, dtype, width, bias=True),
    }
