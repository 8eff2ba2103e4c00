"""The shot that a manifest or a latent records, planned again on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wancli.engine import manifest_body
from wancli.errors import EntryError, JobError
from wancli.job import loader
from wancli.plan import planner
from wancli.report.html import rerun_job
from wancli.storage import disk, manifest
from wancli.storage.manifest_schema import ShotRecord

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.plan.shot import Shot

_LATENTS = ".latents.safetensors"


class Recorded(NamedTuple):
    """A record, the video that it is of, and the latent, or the video itself if no latent was kept."""

    record: ShotRecord
    video: Path
    latent: Tensor | Path


def read_recorded(path: Path) -> Recorded:
    """Read a latent, or a video with its manifest and the latent that was kept beside it.

    Raises JobError for another file, EntryError if a file is damaged.
    """
    with disk.reading_for_job(str(path)):
        exists = disk.exists(path)
    if not exists:
        raise JobError("no such file", where=str(path))
    if path.name.endswith(_LATENTS):
        z_CTYX, record = manifest_body.load_latent(path)
        return Recorded(record, path.with_name(record.shot.output), z_CTYX)
    found = manifest.read(manifest.manifest_path(path))
    if found is None:
        hint = (
            "wancli attention takes videos and latents that wancli made; the manifest has prompt and model."
        )
        raise JobError("has no manifest beside it", where=str(path), hint=hint)
    latents = path.with_suffix(_LATENTS)
    if disk.exists(latents):
        z_CTYX, record = manifest_body.load_latent(latents)
        if record.latents_key == found.latents_key:
            return Recorded(found, path, z_CTYX)
    if found.model.sizes.out_dim != 16:
        hint = "The VAE of Wan 2.2 5B encodes pictures only: video.keep_latents: true keeps the latent."
        raise EntryError("no latent was kept beside it", where=str(path), hint=hint)
    return Recorded(found, path, path)


def plan_recorded(
    recorded: Recorded, words: Sequence[str], blocks: Sequence[str], prompt: str | None, memo: Path
) -> Shot:
    """Plan the recorded shot with attention maps of these words. Raises JobError and CheckpointError."""
    job = rerun_job.build_job(recorded.record, str(recorded.video.absolute()))
    job |= {"attention": {"words": [*words], "blocks": [*blocks]}}
    job |= {"prompt": prompt} if prompt else {}
    data = json.dumps(job, ensure_ascii=False).encode(errors="surrogateescape")
    jobs = loader.parse(data, "the record", recorded.video.stem, Path.cwd())
    (shot,) = planner.build_plan(jobs, memo).shots
    return shot
