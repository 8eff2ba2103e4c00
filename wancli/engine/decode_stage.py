"""The decode stage: a latent to a video with its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from wancli.engine import attention_stage, manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.kept_frames import keep_frames
from wancli.engine.networks import prepare_device
from wancli.errors import (
    CheckpointError,
    ClaimedElsewhere,
    EntryError,
    JobError,
    NotFinite,
    OutOfMemory,
    OutputExists,
    Unreadable,
    strip_traceback,
)
from wancli.plan import model_registry
from wancli.resources.measure import PeakMemory, oom_as_error, release_memory
from wancli.storage import atomic, disk, manifest, records
from wancli.storage.manifest_schema import Manifest, ShotRecord, ShotSettings
from wancli.storage.model_schema import ModelRecord
from wancli.storage.paths import require_mp4
from wancli.video import mp4

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.vae import VAE
    from wancli.progress import Phase
    from wancli.weights.checkpoint import Checkpoint


def decode_file(
    path: Path,
    output: Path | None,
    folder: Path | None,
    hashes: Path,
    context: RenderContext,
    video: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Decode a latent file into `output`, or into the output that it was made for. The latent stays.

    `video` has other values of `fps`, `crf` and `codec` than those of the shot. The checkpoint is that of the
    record unless `folder` names another. Raises EntryError if the latent is damaged or cannot be read,
    CheckpointError if the VAE is not the one that the shot was planned with.
    """
    from wancli.weights.loader import load_vae

    try:
        if not disk.exists(path):
            raise JobError("no such file", where=str(path))
        z_CTYX, record = manifest_body.load_latent(path)
    except Unreadable as error:
        raise EntryError(error.message, where=error.where, hint=error.hint) from error
    if video:
        record = manifest_body.with_video_settings(record, video)
    output = output or path.with_name(record.shot.output)
    require_free(output, record.shot.codec, context)
    checkpoint = find_checkpoint(record.model, folder, hashes)
    require_decodable(z_CTYX.shape, record.shot, checkpoint, records.LATENT, path)
    prepare_device(record.model.device)
    decode_latent(z_CTYX, record, output, load_vae(checkpoint, record.model.device), context)
    return output


def require_free(output: Path, codec: str, context: RenderContext) -> None:
    """Raise unless a video can be written here: JobError for another suffix, OutputExists for a file that
    --force does not move aside, FfmpegError without ffmpeg."""
    require_mp4(output, output.name, "-o")
    if disk.exists(output) and not context.force:
        raise OutputExists(
            "already exists", where=str(output), hint="--force moves it aside; or give -o another name."
        )
    mp4.check_ffmpeg(codec)


def find_checkpoint(model: ModelRecord, folder: Path | None, hashes: Path) -> Checkpoint:
    """Find the checkpoint of a recorded model, or that of `folder`. Raises CheckpointError if its VAE is
    another one."""
    from wancli.weights.checkpoint import identify
    from wancli.weights.fingerprint import fingerprint

    if folder:
        source = model_registry.resolve_model(str(folder), lambda *_: Path.cwd(), lambda *_: "--model")
    else:
        source = manifest_body.checkpoint_location(model)
    checkpoint = identify(source)
    if fingerprint(checkpoint.vae_files, hashes) != model.sha256.vae:
        raise CheckpointError(
            "not the VAE that this latent was planned with",
            where=str(checkpoint.vae_files[0]),
            hint="--model DIR names the checkpoint to decode with.",
        )
    return checkpoint


def require_decodable(
    shape: Sequence[int], shot: ShotSettings, checkpoint: Checkpoint, kind: records.Kind, path: Path
) -> None:
    """Raise EntryError if the VAE does not decode a latent of this shape to the frames of the shot."""
    variant, frames = checkpoint.variant, (shot.frames - 1) // 4 + 1
    sides = (shot.height // variant.vae_stride, shot.width // variant.vae_stride)
    if tuple(shape) != (variant.latent_channels, frames, *sides):
        raise kind.damaged(path, f"the VAE reads no latent of {[*shape]}")


def decode_latent(
    z_CTYX: Tensor,
    record: ShotRecord,
    output: Path,
    vae: VAE,
    context: RenderContext,
    kept: Mapping[int, str] = MappingProxyType({}),
) -> Manifest:
    """Decode a latent into `output`, write its manifest, and return that.

    `kept` has the keys of the frames, by number, that are also written before compression.

    If decoding runs out of memory, warns and tries again with less, see `decode_attempts`; the manifest says
    so. Raises OutOfMemory after the last attempt, and Stopped between two chunks of frames.
    """
    attempts = decode_attempts(next(vae.parameters()).device.type, record.shot.decode_chunk)
    for attempt, fallback in zip(attempts, (*attempts[1:], None)):
        try:
            peak = _write_video(z_CTYX, record, output, vae, attempt, context, kept)
            record = _add_overlay(record, output, context)
            return _write_manifest(record, output, peak, attempt, fallback=attempt != attempts[0])
        except OutOfMemory as error:
            if fallback is None:
                raise
            ran_out = strip_traceback(error)
        release_memory()
        how = f"on {fallback.device} with decode_chunk {fallback.chunk}"
        context.progress.warn(f"{ran_out}; decoding {how} instead, which may round pixels otherwise")
    raise AssertionError("the last attempt returns or raises")


class DecodeAttempt(NamedTuple):
    """Where to decode, and how many latent frames at a time."""

    device: str
    chunk: int


def decode_attempts(device: str, chunk: int) -> list[DecodeAttempt]:
    """List the ways to decode, each using less memory than the one before: as planned, then one latent frame
    at a time, then (from a GPU) on the CPU.

    A chunk of another size groups frames otherwise in the convolutions over time, and a CPU has other
    kernels: pixels are those of the plan except for rounding.
    """
    attempts = [DecodeAttempt(device, chunk), DecodeAttempt(device, 1)]
    return list(dict.fromkeys([*attempts, DecodeAttempt("cpu", 1)] if device == "cuda" else attempts))


def _add_overlay(record: ShotRecord, output: Path, context: RenderContext) -> ShotRecord:
    """Write the overlay of a shot that has attention maps, and return its record with that."""
    if record.attention is None:
        return record
    found = attention_stage.write_overlay(record, output, context)
    return record.model_copy(update={"attention": found})


def _write_manifest(
    record: ShotRecord, output: Path, peak: PeakMemory, attempt: DecodeAttempt, *, fallback: bool
) -> Manifest:
    body = manifest_body.complete_record(record, output, peak, **attempt._asdict(), fallback=fallback)
    manifest.write(manifest.manifest_path(output), body.as_dict())
    return body


def _write_video(
    z_CTYX: Tensor,
    record: ShotRecord,
    output: Path,
    vae: VAE,
    attempt: DecodeAttempt,
    context: RenderContext,
    kept: Mapping[int, str],
) -> PeakMemory:
    """Decode into an MP4 and measure that. The VAE is moved to the device of the attempt and back."""
    shot = record.shot
    home = next(vae.parameters()).device.type
    try:
        with oom_as_error("decode", f"shot {shot.id}"), PeakMemory() as peak:
            vae.to(attempt.device)
            comment = mp4.shot_comment(shot.id, record.key)
            write_frames(z_CTYX, shot, output, vae, attempt, context, comment, kept)
    finally:
        vae.to(home)
    return peak


def write_frames(
    z_CTYX: Tensor,
    shot: ShotSettings,
    output: Path,
    vae: VAE,
    attempt: DecodeAttempt,
    context: RenderContext,
    comment: str,
    kept: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Decode a latent with a VAE that is on the device of the attempt, and write the MP4."""
    import torch

    with torch.inference_mode(), context.progress.phase("decode", [shot.id], shot.frames) as bar:
        chunks = vae.decode(z_CTYX.to(attempt.device), attempt.chunk)
        frames = _rgb_frames(chunks, shot.id, output, context, bar)
        mp4.write_mp4(
            keep_frames(frames, output, (shot.width, shot.height), kept),
            output,
            width=shot.width,
            height=shot.height,
            fps=shot.fps,
            frame_count=shot.frames,
            crf=shot.crf,
            codec=shot.codec,
            comment=comment,
        )


def _rgb_frames(
    chunks: Iterable[Tensor], shot_id: str, output: Path, context: RenderContext, bar: Phase
) -> Iterator[memoryview]:
    """Convert decoded frames to RGB, chunk by chunk. With --force an older output moves aside at the end."""
    for frames_CTYX in chunks:
        if context.stop.requested:
            raise context.stop.error(f"the latent of shot {shot_id} is on disk")
        if not frames_CTYX.isfinite().all():
            raise NotFinite("NaN or Inf in the decoded frames", where=f"shot {shot_id}")
        yield mp4.to_rgb24(frames_CTYX)
        bar.advance(frames_CTYX.shape[1])
        if context.lost_claim:
            raise ClaimedElsewhere("another worker took it over", where=f"shot {shot_id}")
    if context.force:
        atomic.move_aside(output)
        atomic.move_aside(manifest.manifest_path(output))
