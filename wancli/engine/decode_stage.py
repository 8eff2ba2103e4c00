"""Stage 3: a latent to a video with its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.engine import manifest_body
from wancli.engine.context import RenderContext
from wancli.engine.manifest_body import Record
from wancli.errors import (
    CheckpointError,
    ClaimedElsewhere,
    JobError,
    NotFinite,
    OutOfMemory,
    OutputExists,
    strip_traceback,
)
from wancli.plan import model_registry
from wancli.resources.measure import PeakMemory, oom_as_error, release_memory
from wancli.storage import atomic, manifest, tensor_file
from wancli.video import mp4

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.vae import VAE


def decode_file(
    path: Path, output: Path | None, folder: Path | None, memo: Path, tools: RenderContext
) -> Path:
    """`wancli decode`: finishes a shot from its latent, into the output it was made for or another.

    The checkpoint is that of the record unless `folder` names it; the latent stays. Raises
    EntryError for a damaged latent, CheckpointError for another VAE than the shot was planned with.
    """
    from wancli.weights.checkpoint import fingerprint, identify
    from wancli.weights.loader import load_vae

    if not path.exists():
        raise JobError("no such file", where=str(path))
    z_CTYX, record = tensor_file.load_latent(path)
    output = output or path.with_name(record["shot"]["output"])
    if output.exists() and not tools.force:
        raise OutputExists(
            "already exists", where=str(output), hint="--force moves it aside; or give -o another name."
        )
    mp4.check_ffmpeg(record["shot"]["codec"])
    if folder:
        source = model_registry.resolve_model(str(folder), lambda *_: Path.cwd(), lambda *_: "--model")
    else:
        source = manifest_body.checkpoint_location(record["model"])
    checkpoint = identify(source)
    if fingerprint(checkpoint.vae_files, memo) != record["model"]["sha256"]["vae"]:
        raise CheckpointError(
            "not the VAE that this latent was planned with",
            where=str(checkpoint.vae_files[0]),
            hint="--model DIR names the checkpoint to decode with.",
        )
    decode_latent(z_CTYX, record, output, load_vae(checkpoint, record["model"]["device"]), tools)
    return output


def decode_latent(z_CTYX: Tensor, record: Record, output: Path, vae: VAE, tools: RenderContext) -> Record:
    """Stage 3: decodes a latent into `output` and writes its manifest; returns the manifest's body.

    Where decoding runs out of memory it is tried again with less, see `ways`, with a warning, and the
    manifest says so. Raises OutOfMemory after the last way, Stopped between two chunks of frames.
    """
    shot = record["shot"]
    home_device = next(vae.parameters()).device.type
    attempts = decode_attempts(home_device, shot["decode_chunk"])
    for number, (device, chunk) in enumerate(attempts):
        try:
            with oom_as_error("decode", f"shot {shot['id']}"), PeakMemory() as peak:
                vae.to(device)
                _write(z_CTYX, record, output, vae, chunk, tools)
            break
        except OutOfMemory as error:
            if number + 1 == len(attempts):
                raise
            ran_out = strip_traceback(error)
        finally:
            vae.to(home_device)
        release_memory()
        way = f"on {attempts[number + 1][0]} with decode_chunk {attempts[number + 1][1]}"
        tools.progress.warn(f"{ran_out}; decoding {way} instead, which may round pixels otherwise")
    body = record | {
        "phases": [*record["phases"], manifest_body.phase_record("decode", peak)],
        "decoded": {"device": device, "chunk": chunk, "fallback": number > 0},
        "files": [manifest.file_record(output, output.parent)],
    }
    manifest.write(manifest.manifest_path(output), body)
    return body


def decode_attempts(device: str, chunk: int) -> list[tuple[str, int]]:
    """Device and chunk to decode with, each in less memory than the one before: as planned, one latent frame
    at a time, and where a GPU has no room for that, on the CPU.

    A chunk of another size groups frames otherwise in the convolutions over time, and a CPU has other
    kernels: pixels are those of the plan but for rounding.
    """
    attempts = [(device, chunk), (device, 1)]
    return list(dict.fromkeys([*attempts, ("cpu", 1)] if device == "cuda" else attempts))


def _write(z_CTYX: Tensor, record: Record, output: Path, vae: VAE, chunk: int, tools: RenderContext) -> None:
    import torch

    shot = record["shot"]
    with torch.inference_mode(), tools.progress.phase("decode", [shot["id"]], shot["frames"]) as bar:

        def rgb() -> Iterator[memoryview]:
            for frames_CTYX in vae.decode(z_CTYX.to(next(vae.parameters()).device), chunk):
                if tools.stop.requested:
                    raise tools.stop.error(f"the latent of shot {shot['id']} is on disk")
                if not frames_CTYX.isfinite().all():
                    raise NotFinite("NaN or Inf in the decoded frames", where=f"shot {shot['id']}")
                yield mp4.to_rgb24(frames_CTYX)
                bar.advance(frames_CTYX.shape[1])
                if tools.lost_claim:
                    raise ClaimedElsewhere("another worker took it over", where=f"shot {shot['id']}")
            if tools.force:  # not before there is something to put in their place
                atomic.move_aside(output)
                atomic.move_aside(manifest.manifest_path(output))

        mp4.write_mp4(
            rgb(),
            output,
            width=shot["width"],
            height=shot["height"],
            fps=shot["fps"],
            frame_count=shot["frames"],
            crf=shot["crf"],
            codec=shot["codec"],
            comment=f"wancli {shot['id']} {record['key'][:16]}",
        )
