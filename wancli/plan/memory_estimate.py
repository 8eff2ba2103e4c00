"""What a shot takes of the memory: its sizes and settings put into the formulas of `memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wancli.models.config import T5Config, VAE22Config, VAEConfig
from wancli.resources import memory_model
from wancli.resources.memory_model import FP32, Phase
from wancli.weights.component import Part

if TYPE_CHECKING:
    from wancli.plan.shot import ModelSpec, Shot
    from wancli.weights.checkpoint import Checkpoint

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_MATRICES = "block matrices"


def predict_phases(shot: Shot) -> tuple[Phase, ...]:
    """Encoding, sampling and decoding, while which the transformer stays. On CUDA the bytes of the device."""
    alone = 1 if shot.model.residency == "resident" else shot.forwards_per_step
    rows = sum(text.rows for text in shot.prompts)
    sample = shot.shared.sample if shot.shared else predict_sampling(shot, rows, alone)
    decode = memory_model.decode_phase(
        shot.model.vae_sizes,
        shot.latent_shape,
        chunk=shot.decode_chunk,
        resident_bytes=sample.model,
        mapped=shot.model.device == "cpu" and _is_only_fp32(shot.model.checkpoint.vae),
    )
    return predict_encoding(shot.model, [len(text.tokens.ids) for text in shot.prompts]), sample, decode


def process_bytes(model: ModelSpec) -> int:
    """Bytes of the process itself, which come on top of every phase."""
    return memory_model.PROCESS if model.device == "cpu" else 0


def predict_encoding(model: ModelSpec, tokens: Sequence[int]) -> Phase:
    """UMT5 on prompts of so many tokens."""
    t5 = model.text_encoder
    dtype, residency = model.encoder.dtype, model.encoder.residency
    part, element = model.checkpoint.text_encoder, ELEMENT_BYTES[dtype]
    phase = memory_model.encode_phase(
        t5,
        prompt_tokens=max(tokens),
        element_bytes=element,
        streamed=residency == "streamed",
        prompts=len(tokens) if residency == "streamed" else 1,
    )
    weights = phase.model
    if residency == "packed":
        embedding = t5.vocab_size * t5.d_model * element
        weights = (
            memory_model.t5_bytes(t5, element_bytes=element, streamed=True)
            + embedding
            + _packed_bytes(model, part)
        )
    if dtype == "fp16":  # whose widest products overflow, so that one matrix of a layer stays fp32
        held = t5.num_layers if residency == "resident" else 2
        weights += held * t5.d_model * t5.d_ff * 2
    return Phase("encode", weights, phase.activation, _unpack_bytes(model, part, residency))


def predict_sampling(shot: Shot, rows: int, riders: int) -> Phase:
    """A shot alone, with `rows` of text and that many forwards on a pass."""
    model, wan = shot.model, shot.model.checkpoint.transformer
    part, element = model.checkpoint.experts[0], ELEMENT_BYTES[model.compute_dtype]
    resident = model.residency == "resident"
    weights = 0
    if model.dtype == "fp8" and part.scheme.name == "plain":
        weights = memory_model.fp8_bytes(wan)
    elif model.dtype == "fp8":
        weights = part.stored(_MATRICES).nbytes + part.stored("scales, markers").nbytes
    elif model.residency == "packed":
        weights = _packed_bytes(model, part)
    fetched = None if resident else 2
    phase = memory_model.sample_phase(
        wan,
        shot.latent_shape,
        context_rows=rows,
        element_bytes=element,
        extra_weight_bytes=weights + sum(file.stat().st_size for file in {use.path for use in shot.loras}),
        blocks_in_memory=0 if resident and model.dtype == "fp8" else fetched,
        forwards_per_pass=riders,
        chunk=model.kernels.chunk,
    )
    scratch = 0 if model.dtype == "fp8" else _unpack_bytes(model, part, model.residency)
    if shot.loras and element != FP32:  # a sum is made in fp32
        scratch += max(wan.dim, wan.ffn_dim) * wan.dim * FP32
    return Phase("sample", phase.model, phase.activation, phase.buffer + scratch)


def _packed_bytes(model: ModelSpec, part: Part) -> int:
    """Matrices as they are stored: on a CPU mapped, for a GPU in pinned memory of the host."""
    return part.stored(_MATRICES).nbytes if model.device == "cpu" else 0


def _unpack_bytes(model: ModelSpec, part: Part, residency: str) -> int:
    """For a GPU, the largest matrix as it is stored, on its way; for a CPU it is read in pieces."""
    return part.stored(_MATRICES).largest if model.device == "cuda" and residency != "resident" else 0


def network_sizes(model: ModelSpec) -> dict[str, Any]:
    """What these formulas read of a checkpoint beside the sizes of its transformer, as manifests keep it."""
    return checkpoint_sizes(model.checkpoint, model.text_encoder, model.vae_sizes)


def checkpoint_sizes(
    checkpoint: Checkpoint, text_encoder: T5Config, vae: VAEConfig | VAE22Config
) -> dict[str, Any]:
    """Sizes of the networks, and how their matrices are stored: in bytes: all, largest, scales."""
    stored = {}
    for name, part in (("transformer", checkpoint.experts[0]), ("text_encoder", checkpoint.text_encoder)):
        matrices = part.stored(_MATRICES)
        stored[name] = {
            "plain": part.scheme.name == "plain",
            "dtype": _single_dtype(part),
            "matrices": matrices.nbytes,
            "largest": matrices.largest,
            "scales": part.stored("scales, markers").nbytes,
        }
    return {
        "text_encoder": asdict(text_encoder),
        "vae": asdict(vae),
        "vae_in_fp32": _is_only_fp32(checkpoint.vae),
        "stored": stored,
    }


def stored_dtype(model: ModelSpec) -> str | None:
    """The dtype of the transformer's matrices in their file, None where they are quantized or mixed."""
    return _single_dtype(model.checkpoint.experts[0])


def _single_dtype(part: Part) -> str | None:
    dtypes = [name for name, _ in part.stored(_MATRICES).dtypes]
    return _DTYPES.get(dtypes[0]) if len(dtypes) == 1 else None


def _is_only_fp32(part: Part) -> bool:
    return {dtype for found in part.precision for dtype, _ in found.dtypes} == {"F32"}
