"""Predict the memory of a shot: its sizes and settings put into the formulas of `memory_model`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from wancli.models.config import Dtype, T5Config, VAE22Config, VAEConfig, WanConfig, compute_dtype
from wancli.resources import encoder_memory, memory_model
from wancli.resources.memory_model import (
    DecodeCoefficients,
    EncodeCoefficients,
    Phase,
    SampleCoefficients,
)
from wancli.storage import disk
from wancli.weights.checkpoint import clip_config
from wancli.weights.component import Component

if TYPE_CHECKING:
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.shot import Shot
    from wancli.weights.checkpoint import Checkpoint

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_MATRICES = "block matrices"


@dataclass(frozen=True)
class StoredMatrices:
    """How a file stores the matrices of a network: whether as plain floats, and bytes."""

    plain: bool
    matrices: int
    largest: int
    scales: int


def predict_phases(
    shot: Shot, sample: Phase | None = None, pictures: Phase | None = None
) -> tuple[Phase, ...]:
    """Predict the memory of encoding, sampling, decoding and, if there are any, of encoding pictures; the
    transformer stays while decoding.

    `sample` is the prediction for the batch of the shot, None if the shot is sampled alone; `pictures` that
    of encoding its pictures beside other networks. On CUDA bytes are those of the device.
    """
    if sample is None:
        sample = predict_alone(shot)
    vae = decode_coefficients(
        shot.model.vae_sizes,
        device=shot.model.device,
        stored_in_fp32=_is_only_fp32(shot.model.checkpoint.vae),
    )
    decode = vae.phase(shot.latent_shape, chunk=shot.decode_chunk, resident_bytes=sample.model)
    encode = predict_encoding(shot.model, [len(text.tokens.ids) for text in shot.prompts])
    if not shot.pictures:
        return encode, sample, decode
    return encode, sample, decode, pictures or predict_pictures(shot)


def predict_alone(shot: Shot) -> Phase:
    """Predict the memory of sampling a shot that shares no pass with others."""
    forwards = 1 if shot.model.residency == "resident" else shot.forwards_per_step
    return predict_sampling(shot, sum(shot.context_rows.values()), forwards)


def predict_pictures(shot: Shot, resident_bytes: int = 0) -> Phase:
    """Predict the memory of encoding the pictures of a shot: CLIP is loaded beside the VAE.

    `resident_bytes` are those of other networks in memory.
    """
    clip = _predict_clip(shot)
    phase = encoder_memory.given_frames_phase(
        shot.model.vae_sizes, shot.latent_shape, resident_bytes=clip.model + resident_bytes
    )
    return replace(phase, activation=max(phase.activation, clip.activation))


def clip_bytes(shot: Shot) -> int:
    """Predict the bytes of CLIP in memory; 0 if no block reads pictures."""
    return _predict_clip(shot).model


def _predict_clip(shot: Shot) -> Phase:
    if not shot.clip_id:
        return Phase("clip", 0, 0, 0)
    element = ELEMENT_BYTES["fp16" if shot.model.device == "cuda" else "fp32"]
    count = max(len(read.sources) for read in shot.clip_pictures)
    sizes = clip_config(shot.model.checkpoint)
    return memory_model.clip_phase(sizes, pictures=count, element_bytes=element)


def peak_of(model: ModelSpec, phases: Iterable[Phase]) -> int:
    """Return the bytes of the whole process at the peak of these phases, on CUDA those of the device."""
    return process_bytes(model) + max(phase.total for phase in phases)


def process_bytes(model: ModelSpec) -> int:
    """Return the bytes of the process itself, which come on top of every phase."""
    return memory_model.PROCESS if model.device == "cpu" else 0


def predict_encoding(model: ModelSpec, tokens: Sequence[int]) -> Phase:
    """Predict the memory of UMT5 on prompts of these token counts."""
    coefficients = encode_coefficients(
        model.text_encoder,
        stored_matrices(model.checkpoint.text_encoder),
        device=model.device,
        dtype=model.encoder.dtype,
        residency=model.encoder.residency,
    )
    return coefficients.phase(max(tokens), len(tokens))


def predict_sampling(shot: Shot, rows: int, forwards: int) -> Phase:
    """Predict the memory of sampling a shot alone, with `rows` of contexts and `forwards` on a pass."""
    model = shot.model
    coefficients = sample_coefficients(
        model.checkpoint.transformer_config,
        stored_matrices(model.checkpoint.experts[0]),
        device=model.device,
        dtype=model.dtype,
        residency=model.residency,
    )
    phase = coefficients.phase(
        shot.latent_shape,
        text_rows=rows,
        forwards_per_pass=forwards,
        chunk=model.kernels.chunk,
        lora_bytes=sum(disk.size(file) for file in {use.path for use in shot.loras}),
    )
    return replace(phase, buffer=phase.buffer + _attention_bytes(shot) + residual_bytes(shot))


def residual_bytes(shot: Shot) -> int:
    """Predict the bytes of the residuals that the step cache of a shot keeps: one for each branch."""
    width = shot.model.checkpoint.transformer_config.dim
    return len(shot.cache.branches) * shot.tokens * width * memory_model.FP32 if shot.cache else 0


def _attention_bytes(shot: Shot) -> int:
    """Predict the bytes of recording the attention maps of a shot."""
    if shot.attention is None:
        return 0
    return memory_model.attention_bytes(
        shot.model.checkpoint.transformer_config,
        shot.tokens,
        maps=shot.attention.count,
        rows=shot.prompt.rows,
        device=shot.model.device,
    )


def encode_coefficients(
    t5: T5Config, stored: StoredMatrices, *, device: str, dtype: str, residency: str
) -> EncodeCoefficients:
    """Return the coefficients of UMT5 as it is loaded; `stored` is how its file has it."""
    element = ELEMENT_BYTES[dtype]
    found = memory_model.encode_coefficients(t5, element_bytes=element, streamed=residency == "streamed")
    weights = found.model
    if residency == "packed":
        embedding = t5.vocab_size * t5.d_model * element
        weights = memory_model.t5_bytes(t5, element_bytes=element, streamed=True) + embedding
        weights += _packed_bytes(stored, device)
    if dtype == "fp16":  # its widest products overflow, so one matrix of each layer stays fp32
        held = t5.num_layers if residency == "resident" else 2
        weights += held * t5.d_model * t5.d_ff * 2
    return replace(found, model=weights, buffer=_unpack_bytes(stored, device, residency))


def sample_coefficients(
    wan: WanConfig, stored: StoredMatrices, *, device: str, dtype: Dtype, residency: str
) -> SampleCoefficients:
    """Return the coefficients of the transformer as it is loaded; `stored` is how its file has it."""
    is_resident = residency == "resident"
    weights = 0
    if dtype == "fp8" and stored.plain:
        weights = memory_model.fp8_bytes(wan)
    elif dtype == "fp8":
        weights = stored.matrices + stored.scales
    elif residency == "packed":
        weights = _packed_bytes(stored, device)
    fetched = None if is_resident else 2
    found = memory_model.sample_coefficients(
        wan,
        element_bytes=ELEMENT_BYTES[compute_dtype(dtype, device)],
        blocks_in_memory=0 if is_resident and dtype == "fp8" else fetched,
    )
    buffer = 0 if dtype == "fp8" else _unpack_bytes(stored, device, residency)
    return replace(found, model=weights + found.model, buffer=buffer)


def decode_coefficients(
    vae: VAEConfig | VAE22Config, *, device: str, stored_in_fp32: bool
) -> DecodeCoefficients:
    """Return the coefficients of the VAE as it is loaded."""
    return memory_model.decode_coefficients(vae, mapped=device == "cpu" and stored_in_fp32)


def _packed_bytes(stored: StoredMatrices, device: str) -> int:
    """Return the bytes of matrices as stored: mapped for a CPU; for a GPU they are in host memory."""
    return stored.matrices if device == "cpu" else 0


def _unpack_bytes(stored: StoredMatrices, device: str, residency: str) -> int:
    """Return the bytes of the largest matrix as stored, which a GPU receives whole; a CPU reads pieces."""
    return stored.largest if device == "cuda" and residency != "resident" else 0


def stored_matrices(part: Component) -> StoredMatrices:
    """Return how a component's file stores its matrices."""
    matrices = part.precision_of(_MATRICES)
    scales = part.precision_of("scales, markers")
    return StoredMatrices(part.scheme.name == "plain", matrices.nbytes, matrices.largest, scales.nbytes)


def network_sizes(model: ModelSpec) -> dict[str, Any]:
    """Return what these formulas read of a checkpoint beside the config of its transformer, as manifests
    keep it."""
    return checkpoint_sizes(model.checkpoint, model.text_encoder, model.vae_sizes)


def checkpoint_sizes(
    checkpoint: Checkpoint, text_encoder: T5Config, vae: VAEConfig | VAE22Config
) -> dict[str, Any]:
    """Return the configs of the networks, and in bytes their stored matrices: all, largest, scales."""
    stored = {}
    for name, part in (("transformer", checkpoint.experts[0]), ("text_encoder", checkpoint.text_encoder)):
        matrices = stored_matrices(part)
        stored[name] = {
            "plain": matrices.plain,
            "dtype": _single_dtype(part),
            "matrices": matrices.matrices,
            "largest": matrices.largest,
            "scales": matrices.scales,
        }
    return {
        "text_encoder": asdict(text_encoder),
        "vae": asdict(vae),
        "vae_in_fp32": _is_only_fp32(checkpoint.vae),
        "stored": stored,
    }


def stored_dtype(model: ModelSpec) -> str | None:
    """Return the dtype of the transformer's matrices in their file, None if they are quantized or mixed."""
    return _single_dtype(model.checkpoint.experts[0])


def _single_dtype(part: Component) -> str | None:
    dtypes = [name for name, _ in part.precision_of(_MATRICES).dtypes]
    return _DTYPES.get(dtypes[0]) if len(dtypes) == 1 else None


def _is_only_fp32(part: Component) -> bool:
    return {dtype for found in part.precision for dtype, _ in found.dtypes} == {"F32"}
