"""Tiny jobs, the command line in-process, checkpoints to be broken, and watchers of the transformer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from wancli.cli import run
from wancli.engine.networks import ModelCache
from wancli.farm.server import KEEPS_NETWORKS
from wancli.models.dit import Request, WanModel
from wancli.storage.manifest import read_json
from wancli.text import encoder
from wancli.text.tokenizer import Tokenizer

TINY = Path(__file__).parent / "fixtures" / "wan21-tiny"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
SPIECE = TINY / "google" / "umt5-xxl" / "spiece.model"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
KEPT = {"keep_latents": True}
CAT = "A gray tabby cat walks through a sunlit garden, its movement slow and graceful."
FISH = "Schools of tropical fish swim between vibrant coral formations, as the camera pans gently left."
NETWORKS = ModelCache()  # of the last test that rendered; most tests render one checkpoint


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str


def tiny_job(model: Path | dict[str, Any] = TINY, **changes: Any) -> dict[str, Any]:
    """A job that renders in half a second: one frame of 64x64, two steps."""
    job = {
        "model": model if isinstance(model, dict) else str(model),
        "output": "out/clip.mp4",
        "prompt": CAT,
        "negative": "fog",
        "size": "64x64",
        "frames": 1,
        "sampler": {"steps": 2},
    }
    return copy.deepcopy(job | changes)


def rule(**changes: Any) -> dict[str, Any]:
    return {"prompt": FISH, "blocks": "27-39", "strength": 0.6} | changes


def write_job(folder: Path, job: dict[str, Any] | str, name: str = "job.yaml") -> Path:
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(job if isinstance(job, str) else yaml.safe_dump(job, sort_keys=False))
    return path


def run_wancli(capsys: pytest.CaptureFixture[str], *arguments: object) -> CommandResult:
    """One command line, and what it said. As on a server, its networks stay for the next one."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments], NETWORKS)
    if code not in KEEPS_NETWORKS:
        NETWORKS.clear()
    return CommandResult(code, *capsys.readouterr())


def manifest_of(folder: Path, name: str = "clip") -> dict[str, Any]:
    body = read_json(folder / "out" / f"{name}.manifest.json")
    assert body is not None
    return body


def latents_of(folder: Path, name: str = "clip") -> torch.Tensor:
    return load_file(folder / "out" / f"{name}.latents.safetensors")["latents"]


def checkpoint(folder: Path, source: Path = TINY) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(source, folder / "model", ignore=shutil.ignore_patterns("reference.*"))


def change_tensors(path: Path, change: Any) -> None:
    """Rewrites a safetensors or .pth file after `change(tensors)`."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    else:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)


def cut_blocks(model: Path, depth: int = 4) -> None:
    """Leave a checkpoint only its first blocks, for tests in which depth does not matter."""

    def cut(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("blocks.")]:
            if int(name.split(".")[1]) >= depth:
                del tensors[name]

    for config in (path for path in model.rglob("config.json") if (path.parent / TRANSFORMER).exists()):
        change_tensors(config.parent / TRANSFORMER, cut)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": depth}))


def pickles_to_safetensors(model: Path) -> None:
    """Write the pickles of a checkpoint in the format that loads fastest."""
    for pickle in model.glob("*.pth"):
        tensors = torch.load(pickle, weights_only=True)
        copied = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(copied, pickle.with_suffix(".safetensors"))
        pickle.unlink()


def words(count: int) -> str:
    """A prompt of `count` tokens, `</s>` included."""
    text = " ".join(["a"] * (count - 1))
    assert len(Tokenizer(SPIECE).to_ids(text)) == count
    return text


def files_in(folder: Path) -> list[str]:
    """The outputs, but for the page that every render makes of them."""
    return sorted(path.name for path in (folder / "out").glob("*") if path.suffix != ".html")


def forbid_calls(monkeypatch: pytest.MonkeyPatch, *targets: tuple[object, str]) -> None:
    """Whoever calls one of these fails the test; whoever wants a network must load it."""
    NETWORKS.clear()

    def called(*_: object, **__: object) -> None:
        raise AssertionError("was called")

    for owner, name in targets or ((WanModel, "predict_velocities"), (encoder, "load_encoder")):
        monkeypatch.setattr(owner, name, called)


def count_forwards(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda _: None
) -> list[int]:
    """Counts the forwards of the transformer; `before(n)` runs at the start of the n-th."""
    real = WanModel.predict_velocities
    calls: list[int] = []

    def counted(self: WanModel, requests: Sequence[Request], riders: int | None = None) -> list[torch.Tensor]:
        for _ in requests:
            calls.append(len(calls))
            before(calls[-1])
        return real(self, requests, riders)

    monkeypatch.setattr(WanModel, "predict_velocities", counted)
    return calls


def break_videos_of_5_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer gives NaN for videos of 5 frames, and only for those."""
    real = WanModel.predict_velocities

    def sick(self: WanModel, requests: Sequence[Request], riders: int | None = None) -> list[torch.Tensor]:
        answers = zip(requests, real(self, requests, riders))
        return [v * (float("nan") if request.x_BCTYX.shape[2] == 2 else 1) for request, v in answers]

    monkeypatch.setattr(WanModel, "predict_velocities", sick)


def damaged_copies(whole: bytes) -> Iterator[bytes]:
    """These bytes cut at every length, and with each bit flipped."""
    yield from (whole[:length] for length in range(len(whole)))
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def shell_exit_code(returncode: int) -> int:
    """The exit code that a shell shows: of a process that died of a signal 128 and its number."""
    return 128 - returncode if returncode < 0 else returncode
