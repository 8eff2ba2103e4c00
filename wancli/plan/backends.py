"""What a transformer computes with: as the job says it, and whether and how this machine does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wancli.errors import JobError
from wancli.models.config import Kernels

if TYPE_CHECKING:
    from wancli.job.loader import Item
    from wancli.plan.shot import ModelSpec


def read_compute_options(item: Item) -> Kernels:
    """The kernels of a job; `chunk: auto` is all tokens at once.

    Raises JobError for what does not go together.
    """
    memory = item.job.memory
    if memory.fp8_matmul:
        if memory.dtype not in ("auto", "fp8"):
            message = f"weights in {memory.dtype} do not multiply in fp8"
            raise JobError(message, where=item.location("memory", "dtype"), hint="Leave out memory.dtype.")
        if memory.residency not in ("auto", "resident"):
            raise JobError(
                f"{memory.residency} weights do not multiply in fp8, resident ones do",
                where=item.location("memory", "residency"),
                hint="Leave out memory.residency.",
            )
        if item.job.loras:
            raise JobError(
                "LoRAs cannot be added to weights that multiply in fp8",
                where=item.location("loras"),
                hint="Leave out memory.fp8_matmul; memory.dtype: fp8 takes LoRAs.",
            )
    return Kernels(memory.attention, None if memory.chunk == "auto" else memory.chunk, memory.fp8_matmul)


def check(model: ModelSpec) -> None:
    """Raises MachineError for kernels that this machine lacks, before anything is loaded."""
    if model.kernels.attention != "auto":
        describe_attention(model)
    if model.kernels.fp8_matmul:
        from wancli.weights.fp8_linear import check

        sizes = model.checkpoint.transformer
        check(model.device, (sizes.dim, sizes.ffn_dim))


def describe_attention(model: ModelSpec) -> dict[str, Any]:
    """Which attention really runs: that of video tokens among each other, and that to the text."""
    from wancli.models.attention import attention_backend
    from wancli.models.dtypes import DTYPES

    dtype = DTYPES[model.compute_dtype]
    width, asked = model.checkpoint.transformer.head_dim, model.kernels.attention
    return {
        "asked": asked,
        "self": attention_backend(model.device, dtype, width, asked=asked),
        "cross": attention_backend(model.device, dtype, width, bias=True),
    }
