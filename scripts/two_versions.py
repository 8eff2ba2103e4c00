"""Checks that two versions of wancli share outputs, states and claims: `two_versions.py OTHER/bin/wancli`.

What one version finished is already done for the other, which checks it and shows it on a page. What the
other version saved when it was stopped, this one resumes to the same latent. A latent that the other version
left is decoded. A worker of each, started on one job at once, divide its shots. All share one cache.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

THIS = [sys.executable, "-m", "wancli"]
JOB: dict[str, Any] = {
    "output": "{id}.mp4",
    "prompt": "A red circle drifts to the left across dark stripes",
    "size": "64x64",
    "frames": 9,
    "sampler": {"steps": 6},
    "video": {"keep_latents": True},
    "measure": True,
    "compare": True,
}
RULE = {"prompt": "A blue triangle moves up in front of a white background", "blocks": "late"}
ITEMS: list[dict[str, Any]] = [{"id": "plain"}, {"id": "injected", "inject": [RULE]}]


def write_job(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    return path


def render(wancli: list[str], job: Path) -> list[tuple[str, str]]:
    """Render a job; return the id and the status of each shot."""
    done = subprocess.run([*wancli, "render", str(job), "--json"], capture_output=True, text=True, check=True)
    return [(shot["id"], shot["status"]) for shot in json.loads(done.stdout)["shots"]]


def latent(job: Path, name: str) -> torch.Tensor:
    return load_file(job.parent / f"{name}.latents.safetensors")["latents"]


def check_finished(first: list[str], second: list[str], job: Path) -> None:
    """What the first version rendered, the second one need not render again, and can read in full."""
    render(first, job)
    found = render(second, job)
    assert found == [(item["id"], "already done") for item in ITEMS], found
    for words in (["check", job.parent], ["check", job], ["status", job], ["report", job.parent]):
        subprocess.run([*second, *map(str, words)], stdout=subprocess.DEVNULL, check=True)


def check_decoded(other: list[str], job: Path) -> None:
    """A latent of the other version becomes the same video again."""
    video = job.parent / "injected.mp4"
    before = video.read_bytes()
    video.unlink()
    video.with_suffix(".manifest.json").unlink()
    assert ("injected", "rendered") in render(THIS, job)
    assert video.read_bytes() == before
    assert ("injected", "already done") in render(other, job)


def check_resumed(other: list[str], folder: Path, whole: Path) -> None:
    """The state that the other version saved leads to the latent of an undisturbed render."""
    job = write_job(folder / "stopped", items=ITEMS[1:], save_every=1)
    process = subprocess.Popen([*other, "render", str(job), "-q"])
    state = job.parent / "injected.state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    assert code == 75, f"stopped with {code}"
    assert state.exists()
    render(THIS, job)
    assert torch.equal(latent(job, "injected"), latent(whole, "injected"))


def check_shared(other: list[str], folder: Path) -> None:
    """A worker of each version render every shot once between them."""
    job = write_job(folder / "shared", matrix={"seed": list(range(6))}, output="{seed}.mp4", save_every=1)
    commands = [[*wancli, "render", str(job), "--json"] for wancli in (THIS, other)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    rendered = []
    for worker in workers:
        text, _ = worker.communicate()
        assert worker.returncode == 0, f"a worker ended with {worker.returncode}"
        shots = json.loads(text)["shots"]
        rendered.append({shot["id"] for shot in shots if shot["status"] == "rendered"})
    assert all(rendered), f"one worker rendered nothing: {rendered}"
    assert [len(ids) for ids in (set.union(*rendered), set.intersection(*rendered))] == [6, 0], rendered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the wancli command of the other version")
    other = [str(parser.parse_args().other.absolute())]
    with tempfile.TemporaryDirectory() as place:
        os.environ["WANCLI_CACHE"] = str(Path(place) / "cache")
        whole = write_job(Path(place) / "finished", items=ITEMS)
        check_finished(other, THIS, whole)
        print("what the other version finished is already done, and can be read")
        check_finished(THIS, other, write_job(Path(place) / "new", items=ITEMS))
        print("what this version finished is already done for the other, and can be read")
        check_decoded(other, whole)
        print("a latent that the other version left is decoded to the same video")
        check_resumed(other, Path(place), whole)
        print("what the other version saved is resumed to the same latent")
        check_shared(other, Path(place))
        print("a worker of each version divide one job")


if __name__ == "__main__":
    main()
