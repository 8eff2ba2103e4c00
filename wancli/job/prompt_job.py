"""The job that `wancli render --prompt` means, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wancli.errors import JobError
from wancli.job.cli_overrides import CliOverrides
from wancli.storage import atomic


def prompt_values(prompt: str, image: str | None, output: str) -> dict[str, Any]:
    """Return the keys of a job that a prompt, a picture and an output on the command line are."""
    return {"prompt": prompt, "output": output} | ({} if image is None else {"image": image})


def save_prompt_job(path: Path, prompt: str, image: str | None, output: str, overrides: CliOverrides) -> None:
    """Write the job to a new file in the current folder, to which the paths on the command line are relative.

    Raises JobError for another folder, and OutputExists if another file is there.
    """
    if path.absolute().parent != Path.cwd():
        hint = "Give the name of a file here: paths in it are relative to its folder."
        raise JobError("is not in the current folder", where=f"--save-job {path}", hint=hint)
    job = prompt_values(prompt, image, output)
    for setting in overrides.parse_settings():
        *parents, name = setting.key.split(".")
        place = job
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = setting.layer.value
    if axes := overrides.parse_axes():
        job["matrix"] = {axis[0][0].key: [point[0].layer.value for point in axis] for axis in axes}
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=110)
    atomic.publish_bytes(path, text.encode(errors="surrogateescape"))
