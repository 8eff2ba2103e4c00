"""Where a shot is: the clean latent that its saved state predicts, decoded.

At each step a solver has x0 = x - sigma * v, its prediction of the finished latent, which the state keeps. It
is blurred at first and sharp at the end.
"""

from __future__ import annotations

from pathlib import Path

from wancli.engine.context import RenderContext
from wancli.engine.decode_stage import (
    DecodeAttempt,
    find_checkpoint,
    require_decodable,
    require_free,
    write_frames,
)
from wancli.engine.networks import prepare_device
from wancli.errors import EntryError, JobError
from wancli.sampling import state_file
from wancli.storage import disk, records
from wancli.storage.manifest_schema import SavedState


def preview_state(
    path: Path, output: Path | None, folder: Path | None, hashes: Path, context: RenderContext
) -> Path:
    """Decode the clean latent that a state predicts into `output`, or beside the state as
    `NAME.preview-STEP.mp4`; return the path. The state stays, and no manifest is written.

    Raises EntryError if the state is damaged or keeps no prediction, CheckpointError if the VAE is not the
    one that the shot was planned with.
    """
    from wancli.weights.loader import load_vae

    if not disk.exists(path):
        raise JobError("no such file", where=str(path))
    saved = state_file.load_state(path)
    record = SavedState.parse(saved.record, path)
    if record.shot is None or record.model is None or not saved.state.history:
        hint = "Render the job: the next state that is saved can be shown."
        raise EntryError(
            "an earlier version of wancli saved this state, without what a preview needs",
            where=str(path),
            hint=hint,
        )
    x0_CTYX, shot, device = saved.state.history[-1], record.shot, record.model.device
    name = path.name.removesuffix(".safetensors").removesuffix(".state")
    output = output or path.with_name(f"{name}.preview-{record.step}.mp4")
    require_free(output, shot.codec, context)
    checkpoint = find_checkpoint(record.model, folder, hashes)
    require_decodable(x0_CTYX.shape, shot, checkpoint, records.STATE, path)
    prepare_device(device)
    attempt = DecodeAttempt(device, shot.decode_chunk)
    comment = f"wancli preview of {shot.id}, step {record.step} of {shot.steps}"
    write_frames(x0_CTYX, shot, output, load_vae(checkpoint, device), attempt, context, comment)
    return output
