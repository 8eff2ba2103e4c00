"""The whole way from job to verified MP4 on the tiny checkpoint, and everything that can stop it."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
from jobs import (
    CAT,
    FISH,
    TINY,
    TRANSFORMER,
    Said,
    change_tensors,
    checkpoint,
    command,
    latents_of,
    manifest_of,
    rule,
    tiny_job,
    words,
    written,
)
from safetensors.torch import load_file, save_file

from wancli import encode, memory, video
from wancli.job import load
from wancli.manifest import done
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.models.layers import Mix
from wancli.models.vae import WanVAE
from wancli.plan import plan
from wancli.solvers import schedule
from wancli.weights import readers

Forward = Callable[[WanModel, torch.Tensor, float, Sequence[Mix]], torch.Tensor]
KEPT = {"keep_latents": True}
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that keeps embeddings and digests from test to test."""
    return tmp_path_factory.mktemp("warm")


@pytest.fixture
def render(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """Renders the tiny job with some changes, with a cache that knows its prompts."""
    monkeypatch.setenv("WANCLI_CACHE", str(warm))

    def rendered(*options: str, folder: Path = tmp_path, **changes: Any) -> Said:
        return command(capsys, "render", written(folder, tiny_job(**changes)), "-q", *options)

    return rendered


def poison(monkeypatch: pytest.MonkeyPatch, *targets: tuple[object, str]) -> None:
    """Whoever calls one of these fails the test."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("was called")

    for owner, name in targets or ((WanModel, "forward"), (encode, "load_encoder")):
        monkeypatch.setattr(owner, name, called)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*")) if (folder / "out").exists() else []


def forwards(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda _: None) -> list[int]:
    """Counts the forwards of the transformer; `before(n)` runs at the start of the n-th."""
    real: Forward = WanModel.forward
    calls: list[int] = []

    def counted(self: WanModel, x: torch.Tensor, t: float, contexts: Sequence[Mix]) -> torch.Tensor:
        calls.append(len(calls))
        before(calls[-1])
        return real(self, x, t, contexts)

    monkeypatch.setattr(WanModel, "forward", counted)
    return calls


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """ffmpeg passes the preflight and then does as the shell script says."""
    real = imageio_ffmpeg.get_ffmpeg_exe()

    def install(script: str) -> None:
        path = tmp_path / "fake-ffmpeg"
        questions = f'case "$*" in *-version*|*-encoders*) exec {real} "$@";; esac'
        path.write_text(f"#!/bin/sh\n{questions}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return install


# ---- once is enough ----


def test_a_finished_job_is_not_rendered_again(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = render()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clip*")}
    poison(monkeypatch, (WanModel, "forward"), (readers, "load_transformer"), (readers, "load_vae"))
    second = render("--json")
    assert (first.code, second.code) == (0, 0)
    assert first.out == f"{tmp_path}/out/clip.mp4\n"
    assert [shot["status"] for shot in json.loads(second.out)["shots"]] == ["already done"]
    assert render().out == first.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clip*")}
    assert files_in(tmp_path) == ["clip.manifest.json", "clip.mp4", "report.json"]


def test_only_what_is_not_done_yet_is_rendered(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    assert render(output="out/{id}.mp4", items=items[::2]).code == 0
    calls = forwards(monkeypatch)
    said = render("--json", output="out/{id}.mp4", items=items)
    assert said.code == 0
    assert [shot["status"] for shot in json.loads(said.out)["shots"]] == [
        "already done",
        "rendered",
        "already done",
    ]
    assert len(calls) == 2 * 2


def test_a_prompt_is_encoded_once_ever_and_the_manifest_proves_it(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = f"{CAT} Nobody has asked for this one before."
    assert render(prompt=prompt, folder=tmp_path / "1").code == 0
    poison(monkeypatch, (encode, "load_encoder"))
    assert render(prompt=prompt, folder=tmp_path / "2").code == 0
    first, second = manifest_of(tmp_path / "1"), manifest_of(tmp_path / "2")
    assert (first["encoder_loaded"], second["encoder_loaded"]) == (True, False)
    assert [text["cached"] for text in second["prompts"]] == [True, True]
    assert first["files"] == second["files"]


def test_the_same_job_gives_the_same_bytes(render: Callable[..., Said], tmp_path: Path) -> None:
    for name in "12":
        assert render(folder=tmp_path / name, frames=5, inject=[rule()], video=KEPT).code == 0
    for file in ("clip.mp4", "clip.latents.safetensors"):
        one, two = (tmp_path / name / "out" / file for name in "12")
        if file.endswith("mp4"):
            assert one.read_bytes() == two.read_bytes()
        else:
            assert torch.equal(latents_of(tmp_path / "1"), latents_of(tmp_path / "2"))


# ---- what is there already ----


def test_a_file_that_is_in_the_way_is_never_touched(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "out" / f"{name}.mp4").write_bytes(b"holiday")
    items = [{"id": "a"}, {"id": "b"}, {"id": "c"}]
    said = render(output="out/{id}.mp4", items=items)
    assert said.code == 2
    assert said.err.splitlines() == [
        f"wancli: {tmp_path}/out/a.mp4 exists, and is not what this job makes now",
        f"wancli: {tmp_path}/out/b.mp4 exists, and is not what this job makes now",
        "  --force moves it aside; or change `output`.",
    ]
    assert said.out == ""
    assert files_in(tmp_path) == ["a.mp4", "b.mp4"]
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"holiday"


def test_a_video_of_another_seed_is_in_the_way_and_force_moves_it_aside(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    assert render().code == 0
    first = (tmp_path / "out" / "clip.mp4").read_bytes()
    assert render(seed=1).code == 2
    assert render("--force", seed=1).code == 0
    second = (tmp_path / "out" / "clip.mp4").read_bytes()
    assert render("--force", seed=1).code == 0
    assert (tmp_path / "out" / "clip.old-1.mp4").read_bytes() == first
    assert (tmp_path / "out" / "clip.old-2.mp4").read_bytes() == second
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == second
    assert manifest_of(tmp_path)["shot"]["seed"] == 1


def test_a_video_that_was_changed_afterwards_is_not_done_and_not_overwritten(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    assert render(video=KEPT).code == 0
    path = tmp_path / "out" / "clip.mp4"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    damaged = path.read_bytes()
    assert render(video=KEPT).code == 2
    assert path.read_bytes() == damaged


# ---- injection is proven ----


def test_the_hits_of_a_rule_are_those_of_its_table(render: Callable[..., Said], tmp_path: Path) -> None:
    rules = [rule(branch="both", steps="1-2"), rule(blocks=[3, "0-2"], blend="output-mix")]
    assert render(inject=rules, sampler={"steps": 3}).code == 0
    first, second = manifest_of(tmp_path)["injection"]
    late = {str(block): 4 for block in range(27, 40)}
    assert (first["planned"], first["hits"]) == (52, 52)
    assert first["hits_by_step"] == {"1": 26, "2": 26}
    assert first["hits_by_branch"] == {"cond": 26, "uncond": 26}
    assert first["hits_by_block"] == late
    assert (second["planned"], second["hits"]) == (12, 12)
    assert second["hits_by_branch"] == {"cond": 12}
    assert second["hits_by_block"] == {"0": 3, "1": 3, "2": 3, "3": 3}
    assert second["difference"]["a"]["text"] == CAT
    assert second["difference"]["b"]["text"] == FISH


def test_hits_count_what_blocks_read_and_not_what_was_planned(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    """A model that stops reading contexts is caught although the table is right: see the next test."""
    assert render(inject=[rule(strength=[0.5] * 12 + [0])]).code == 0
    (found,) = manifest_of(tmp_path)["injection"]
    assert found["planned"] == 2 * 12
    assert "39" not in found["hits_by_block"]


def test_a_rule_that_a_block_ignored_fails_its_shot_and_no_other(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Forward = WanModel.forward

    def deaf(self: WanModel, x: torch.Tensor, t: float, contexts: Any) -> torch.Tensor:
        """Block 30 always reads the main prompt."""
        return real(self, x, t, [contexts.base if i == 30 else contexts[i] for i in range(len(contexts))])

    monkeypatch.setattr(WanModel, "forward", deaf)
    items = [
        {"id": "lost", "inject": [rule()]},
        {"id": "early", "inject": [rule(blocks="early")]},
        {"id": "plain"},
    ]
    said = render("--json", output="out/{id}.mp4", items=items)
    assert said.code == 1
    assert said.err.splitlines() == [
        "wancli: shot lost: inject.0 reached 24 of 26 planned cells",
        "  This render would not show the injection, so it is not kept.",
    ]
    report = json.loads(said.out)
    assert [shot["status"] for shot in report["shots"]] == ["failed", "rendered", "rendered"]
    assert report["shots"][0]["error"]["code"] == "shot.injection_missed"
    assert [name for name in files_in(tmp_path) if "lost" in name] == []


def test_at_guidance_1_there_is_one_forward_a_step(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = forwards(monkeypatch)
    assert render(sampler={"steps": 3, "guidance": 1}, inject=[rule(branch="both")]).code == 0
    assert len(calls) == 3
    body = manifest_of(tmp_path)
    assert body["injection"][0]["hits_by_branch"] == {"cond": 39}
    assert [text["text"] for text in body["prompts"]] == [CAT, FISH]


def test_measuring_records_the_effect_on_injected_blocks_and_leaves_the_latent_alone(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    injected = {"inject": [rule(steps=1)], "video": KEPT}
    assert render(folder=tmp_path / "plain", **injected).code == 0
    assert render(folder=tmp_path / "measured", **injected, measure=True).code == 0
    assert render("--log-level", "verbose", folder=tmp_path / "verbose", **injected).code == 0
    assert manifest_of(tmp_path / "plain")["effects"] == []
    (effect,) = manifest_of(tmp_path / "measured")["effects"]
    assert (effect["step"], effect["branch"]) == (1, "cond")
    assert [int(block) for block in effect["blocks"]] == list(range(27, 40))
    assert all(value > 0 for value in effect["blocks"].values())
    assert effect["velocity"] > 0
    assert effect["changed_percent"].keys() == effect["blocks"].keys()
    assert manifest_of(tmp_path / "verbose")["effects"] == [effect]
    for name in ("measured", "verbose"):
        assert torch.equal(latents_of(tmp_path / name), latents_of(tmp_path / "plain"))


# ---- NaN ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.7.ffn.2.bias", "NaN or Inf at step 0, cond branch, first in block 7"),
        ("patch_embedding.weight", "NaN or Inf at step 0, cond branch, first in block 0"),
        ("head.head.bias", "NaN or Inf at step 0, after the last block"),
    ],
)
def test_nan_in_the_weights_is_named_and_nothing_is_written(
    render: Callable[..., Said], tmp_path: Path, name: str, message: str
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / TRANSFORMER, lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    said = render(model=str(model))
    assert said.code == 1
    assert said.err == f"wancli: shot 0000: {message}\n"
    assert files_in(tmp_path) == ["report.json"]


def test_nan_from_the_text_encoder_is_told_and_never_cached(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / T5, lambda tensors: tensors["norm.weight"].fill_(torch.nan))
    monkeypatch.setenv("WANCLI_CACHE", str(tmp_path / "cache"))
    said = render(model=str(model))
    assert said.code == 1
    assert "UMT5 gives NaN or Inf for 'A gray tabby cat" in said.err
    assert not list((tmp_path / "cache").rglob("*.entry"))
    assert [name for name in files_in(tmp_path) if name != "report.json"] == []


# ---- the latent is safe ----


@pytest.mark.parametrize(
    "script",
    ["echo boom >&2; exit 7", "exit 0", "exec cat > /dev/null", "head -c 100 > /dev/null; exit 1"],
    ids=["dies", "does nothing", "writes nothing", "stops reading"],
)
def test_when_ffmpeg_fails_the_latent_is_there_and_the_next_run_only_decodes(
    render: Callable[..., Said],
    tmp_path: Path,
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    fake_ffmpeg(script)
    said = render(inject=[rule()])
    assert said.code == 3
    assert said.err.startswith(f"wancli: {tmp_path}/out/")
    assert files_in(tmp_path) == ["clip.latents.safetensors"]
    z_CTYX = latents_of(tmp_path)
    assert (z_CTYX.shape, z_CTYX.dtype) == ((16, 1, 8, 8), torch.float32)

    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    poison(monkeypatch, (WanModel, "forward"), (readers, "load_transformer"), (encode, "load_encoder"))
    assert render(inject=[rule()]).code == 0
    assert files_in(tmp_path) == ["clip.manifest.json", "clip.mp4", "report.json"]
    assert manifest_of(tmp_path)["injection"][0]["hits"] == 26


def test_decode_finishes_what_a_render_left(
    render: Callable[..., Said],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert render(folder=tmp_path / "whole").code == 0
    fake_ffmpeg("exit 1")
    assert render().code == 3
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    poison(monkeypatch)
    latent = tmp_path / "out" / "clip.latents.safetensors"
    said = command(capsys, "decode", latent, "-q")
    assert (said.code, said.out) == (0, f"{tmp_path}/out/clip.mp4\n")
    assert (tmp_path / "out/clip.mp4").read_bytes() == (tmp_path / "whole/out/clip.mp4").read_bytes()
    body, whole = manifest_of(tmp_path), manifest_of(tmp_path / "whole")
    assert {k: body[k] for k in ("key", "shot", "model", "files")} == {
        k: whole[k] for k in ("key", "shot", "model", "files")
    }
    # to the job it is done
    assert render().code == 0
    # what is there stays, and another name is as good
    assert command(capsys, "decode", latent, "-q").code == 2
    other = command(capsys, "decode", latent, "-q", "-o", tmp_path / "new" / "b.mp4")
    assert (other.code, other.out) == (0, f"{tmp_path}/new/b.mp4\n")
    assert done(tmp_path / "new" / "b.mp4", body["key"])
    assert command(capsys, "decode", latent, "-q", "--force").code == 0
    assert (tmp_path / "out" / "clip.old-1.mp4").exists()


def test_latents_are_kept_when_asked_for_and_only_then(render: Callable[..., Said], tmp_path: Path) -> None:
    assert render(output="out/{id}.mp4", items=[{"id": "kept", "video": KEPT}, {"id": "plain"}]).code == 0
    assert [name for name in files_in(tmp_path) if "latents" in name] == ["kept.latents.safetensors"]


@pytest.mark.parametrize("place", [0, 8, 60, -300, -1, "cut", "empty", "foreign", "missing"])
def test_a_damaged_latent_is_refused(
    render: Callable[..., Said],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    warm: Path,
    place: int | str,
) -> None:
    source = warm / "whole" / "out" / "clip.latents.safetensors"
    if not source.exists():
        assert render(folder=warm / "whole", video=KEPT).code == 0
    path, data = tmp_path / "x.latents.safetensors", bytearray(source.read_bytes())
    match place:
        case int():
            data[place] ^= 1
        case "cut":
            data = data[:-1]
        case "empty":
            data = bytearray()
    path.write_bytes(data)
    if place == "foreign":
        save_file({"latents": torch.zeros(16, 1, 8, 8)}, path, {"wancli": "{}"})
    if place == "missing":
        path.unlink()
    said = command(capsys, "decode", path, "-q")
    assert said.code == (2 if place == "missing" else 4)
    assert said.err.startswith(f"wancli: {path}: ")
    assert [p.name for p in tmp_path.iterdir()] == ([] if place == "missing" else ["x.latents.safetensors"])


def test_a_damaged_latent_of_a_render_is_sampled_anew(
    render: Callable[..., Said],
    tmp_path: Path,
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_ffmpeg("exit 1")
    assert render().code == 3
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    latent = tmp_path / "out" / "clip.latents.safetensors"
    latent.write_bytes(latent.read_bytes()[:-1])
    calls = forwards(monkeypatch)
    assert render().code == 0
    assert len(calls) == 4


def test_a_latent_is_not_decoded_with_another_vae(
    render: Callable[..., Said], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path)
    assert render(model=str(model), video=KEPT).code == 0
    change_tensors(model / VAE, lambda tensors: tensors["conv2.bias"].add_(1))
    latent = tmp_path / "out" / "clip.latents.safetensors"
    said = command(capsys, "decode", latent, "-q", "-o", tmp_path / "b.mp4")
    assert said.code == 4
    assert said.err.startswith(f"wancli: {model / VAE}: not the VAE that this latent was planned with")
    assert command(capsys, "decode", latent, "-q", "-o", tmp_path / "b.mp4", "--model", TINY).code == 0


# ---- the machine ----


def test_a_disk_that_fills_up_at_any_moment_leaves_nothing_half_written(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run may sync one file more than the last before the disk is full; each goes on where it was."""
    assert render(folder=tmp_path / "whole").code == 0
    real = os.fsync
    codes = []
    for allowed in range(40):
        left = allowed

        def full(fd: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)

        monkeypatch.setattr(os, "fsync", full)
        said = render()
        codes.append(said.code)
        assert [p.name for p in tmp_path.rglob(".wancli-*") if "-proof" not in p.name] == []
        if said.code == 0:
            break
        assert "No space left on device" in said.err
    assert set(codes[:-1]) == {3}
    assert codes[-1] == 0
    assert (tmp_path / "out/clip.mp4").read_bytes() == (tmp_path / "whole/out/clip.mp4").read_bytes()
    assert [name for name in files_in(tmp_path) if "-proof" not in name] == [
        "clip.manifest.json",
        "clip.mp4",
        "report.json",
    ]


def test_a_folder_that_cannot_be_is_found_out_before_anything_is_loaded(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    (tmp_path / "out").write_text("a file")
    said = render()
    assert said.code == 3
    assert said.err.startswith(f"wancli: {tmp_path}/out/")


def test_a_missing_ffmpeg_is_found_out_before_anything_is_loaded(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    said = render()
    assert said.code == 3
    assert "/no/ffmpeg: no such ffmpeg, or it is not executable" in said.err


def test_too_little_memory_is_found_out_before_anything_is_loaded(
    render: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    said = render()
    assert said.code == 5
    assert said.err.startswith("wancli: shot 0000: ")
    assert "GiB of memory" in said.err


@pytest.mark.parametrize("change", [{"memory": {"device": "cuda"}}, {"noise": "cuda"}])
def test_cuda_where_there_is_none_is_an_error_of_the_machine(
    render: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    poison(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = render(**change)
    assert said.code == 3
    assert said.err.startswith("wancli: torch can use no CUDA device here\n")


def test_ctrl_c_keeps_what_is_done_and_leaves_no_debris(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(call: int) -> None:
        if call == 6:
            raise KeyboardInterrupt

    calls = forwards(monkeypatch, interrupt)
    items = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    said = render(output="out/{id}.mp4", items=items)
    assert said.code == 130
    assert said.out == f"{tmp_path}/out/a.mp4\n"
    assert said.err == "wancli: interrupted; finished shots are kept, run again to go on\n"
    assert files_in(tmp_path) == ["a.manifest.json", "a.mp4", "report.json"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [shot["status"] for shot in report["shots"]] == ["rendered", "not started", "not started"]
    assert render(output="out/{id}.mp4", items=items).code == 0
    assert len(calls) == 7 + 8


# ---- checkpoints ----


def test_several_models_in_one_job_are_loaded_once_each(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint(tmp_path)
    change_tensors(other / TRANSFORMER, lambda tensors: tensors["head.head.bias"].add_(0.1))
    loaded: list[Path] = []
    real = readers.load_transformer

    def counted(found: Any, *rest: Any) -> WanModel:
        loaded.append(found.root)
        return real(found, *rest)

    monkeypatch.setattr(readers, "load_transformer", counted)
    items = [{"id": "a"}, {"id": "b", "model": str(other)}, {"id": "c", "seed": 1}]
    assert render(output="out/{id}.mp4", items=items, video=KEPT).code == 0
    assert loaded == [TINY, other]
    assert not torch.equal(latents_of(tmp_path, "a"), latents_of(tmp_path, "b"))
    assert manifest_of(tmp_path, "b")["model"]["root"] == str(other)


@pytest.mark.parametrize(("layers", "heads", "head_dim"), [(30, 2, 24), (3, 3, 10), (2, 1, 22), (1, 5, 14)])
def test_a_model_of_any_depth_and_head_width_renders(
    render: Callable[..., Said], tmp_path: Path, layers: int, heads: int, head_dim: int
) -> None:
    model = checkpoint(tmp_path)
    torch.manual_seed(layers)
    config = WanConfig(heads * head_dim, 52, heads, layers, text_dim=64, freq_dim=32)
    save_file(WanModel(config).state_dict(), model / TRANSFORMER)
    (model / "config.json").write_text(json.dumps({"num_heads": heads, "eps": 1e-6, "model_type": "t2v"}))
    late = {30: "20-29", 3: "2", 2: "1", 1: "0"}[layers]
    assert render(model=str(model), inject=[rule(blocks="second_half")], video=KEPT).code == 0
    body = manifest_of(tmp_path)
    assert body["model"]["sizes"] | {"num_layers": layers, "num_heads": heads} == body["model"]["sizes"]
    assert [int(b) for b in body["injection"][0]["blocks"]] == list(range(layers // 2, layers)), late
    assert latents_of(tmp_path).isfinite().all()


def test_shards_are_one_model_and_each_must_be_whole(render: Callable[..., Said], tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    tensors = load_file(model / TRANSFORMER)
    (model / TRANSFORMER).unlink()
    names = sorted(tensors)
    shards = {
        "diffusion_pytorch_model-1.safetensors": names[::2],
        "diffusion_pytorch_model-2.safetensors": names[1::2],
    }
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (model / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert render(folder=tmp_path / "one", video=KEPT).code == 0
    assert render(folder=tmp_path / "two", video=KEPT, model=str(model)).code == 0
    assert torch.equal(latents_of(tmp_path / "one"), latents_of(tmp_path / "two"))

    second = model / "diffusion_pytorch_model-2.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    said = render(model=str(model))
    assert said.code == 4
    assert said.err.startswith(f"wancli: {second}: truncated or damaged: ")
    second.unlink()
    said = render(model=str(model))
    assert (said.code, said.err.splitlines()[0]) == (4, f"wancli: {second}: no such file")
    assert files_in(tmp_path) == []


def broken(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> None:
    """One tensor missing, one too many, one of another shape."""
    del tensors[names[0]]
    tensors["stranger"] = torch.zeros(1)
    tensors[names[1]] = torch.zeros(*tensors[names[1]].shape, 2)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (TRANSFORMER, ("blocks.5.cross_attn.q.weight", "blocks.6.norm3.bias")),
        (VAE, ("decoder.middle.0.residual.2.bias", "decoder.head.2.bias")),
        (T5, ("blocks.1.ffn.fc1.weight", "blocks.2.norm1.weight")),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_listed(
    render: Callable[..., Said], tmp_path: Path, file: str, names: tuple[str, str]
) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / file, lambda tensors: broken(tensors, names))
    said = render(model=str(model))
    assert said.code == 4
    line = said.err.splitlines()[0]
    assert str(model) in line
    assert "missing " in line
    assert "unexpected stranger" in line
    assert ", expected [" in line
    assert not list(tmp_path.rglob("*.mp4"))


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", [VAE, T5])
@pytest.mark.parametrize("plain", [True, False], ids=["bare pickle", "zip"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(
    render: Callable[..., Said], tmp_path: Path, file: str, plain: bool
) -> None:
    model, marker = checkpoint(tmp_path), tmp_path / "marker"
    if plain:
        (model / file).write_bytes(pickle.dumps({"a": Payload(marker)}))
    else:
        change_tensors(model / file, lambda tensors: tensors.update(evil=Payload(marker)))
    said = render(model=str(model))
    assert said.code == 4
    assert said.err.startswith(f"wancli: {model / file}: ")
    assert not marker.exists()


def test_an_embedding_of_another_width_is_refused(
    render: Callable[..., Said], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    tokens = encode.Tokenizer(TINY / "google/umt5-xxl/spiece.model").tokens("a fog", 256)
    encode.save_embeddings(out, [encode.Embedding.of(tokens, torch.zeros(len(tokens.ids), 32), "x")])
    said = render(prompt={"embedding": "a.safetensors"})
    assert said.code == 2
    assert said.err == f"wancli: {out}: its rows are 32 wide, the model reads 64\n"


def test_half_precision_renders_nearly_the_same(render: Callable[..., Said], tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        assert render(folder=tmp_path / dtype, memory={"dtype": dtype}, video=KEPT).code == 0
    full, half = latents_of(tmp_path / "fp32"), latents_of(tmp_path / "bf16")
    assert 0 < torch.linalg.vector_norm(full - half) / torch.linalg.vector_norm(full) < 0.1


# ---- what is written down ----


def test_the_manifest_says_what_was_decided_and_what_was_read(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    assert (
        render(
            id="one",
            labels={"take": 3},
            prompt=f"  {CAT}&amp;",
            negative="",
            sampler={"steps": 3, "solver": "dpm++"},
        ).code
        == 0
    )
    body = manifest_of(tmp_path)
    shot, official = body["shot"], schedule("dpm++", 3, 5.0)
    assert (shot["id"], shot["labels"], shot["output"]) == ("one", {"take": 3}, "clip.mp4")
    assert shot["timesteps"] == list(official.timesteps)
    assert shot["sigmas"] == list(official.sigmas)
    assert [text["text"] for text in body["prompts"]] == [f"{CAT}&", ""]
    assert body["prompts"][1]["tokens"] == 1
    assert body["model"]["sizes"]["num_layers"] == 40
    assert set(body["model"]["sha256"]) == {"transformer", "text_encoder", "vae"}
    assert {"wancli", "torch", "ffmpeg"} <= body["versions"].keys()
    assert {phase["name"] for phase in body["phases"]} == {"encode", "load", "sample", "decode"}
    assert {phase["name"] for phase in body["predicted"]} == {"encode", "sample", "decode"}
    (file,) = body["files"]
    assert (file["path"], file["bytes"]) == ("clip.mp4", (tmp_path / "out/clip.mp4").stat().st_size)
    decided = plan(load(tmp_path / "job.yaml"), tmp_path / "memo.json").shots[0]
    assert (body["key"], body["latents_key"]) == (decided.key, decided.latents_key)


def test_the_report_holds_every_shot_and_the_memory_of_every_phase(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    items = [{"id": "a", "inject": [rule()]}, {"id": "b"}]
    said = render("--json", output="out/{id}.mp4", items=items)
    report = json.loads(said.out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == "wancli/report/1"
    first, second = report["shots"]
    assert first["output"] == str(tmp_path / "out" / "a.mp4")
    assert first["injection"][0]["hits"] == 26
    assert 0 <= first["injection"][0]["difference"]["verdict"]["percent"] <= 100
    assert second["injection"] == []
    assert second["shot"]["sigmas"] == first["shot"]["sigmas"]
    memory_of = {phase["name"]: phase for phase in report["memory"]}
    assert memory_of.keys() == {"encode", "load", "sample", "decode"}
    for name in ("encode", "sample", "decode"):
        phase = memory_of[name]
        assert phase["total"] == phase["model"] + phase["activation"] + phase["buffer"] > 0
        assert phase["measured"] >= 0
        assert phase["seconds"] >= 0
    assert report["cache"]["hits"] + report["cache"]["misses"] == 3
    assert first["files"][0]["sha256"]


def test_the_summary_tells_hits_difference_and_memory(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], render: Callable[..., Said]
) -> None:
    job = written(tmp_path, tiny_job(inject=[rule()]))
    said = command(capsys, "render", job)
    assert said.code == 0
    for part in ("27-39", "26/26", "context-lerp", "sample", "decode", "1 rendered", "report: "):
        assert part in said.err, part
    silent = command(capsys, "render", job, "-q")
    assert silent.err == ""


def test_every_frame_of_the_plan_is_in_the_video(render: Callable[..., Said], tmp_path: Path) -> None:
    items = [{"id": "a", "frames": 9, "size": "80x48"}, {"id": "b", "video": {"codec": "h265", "fps": 24}}]
    assert render(output="out/{id}.mp4", items=items, memory={"decode_chunk": 2}).code == 0
    assert video.count_frames(tmp_path / "out" / "a.mp4") == 9
    (frame,) = video.read_frames(tmp_path / "out" / "b.mp4")
    assert (frame.width, frame.height) == (64, 64)


def test_the_decode_chunk_changes_no_pixel(
    render: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = WanVAE.decode

    def watched(self: WanVAE, z_CTYX: torch.Tensor, chunk: int) -> Any:
        seen.append([])
        for frames in real(self, z_CTYX, chunk):
            seen[-1].append(frames.shape[1])
            yield frames

    monkeypatch.setattr(WanVAE, "decode", watched)
    for chunk in (1, 3):
        assert render(folder=tmp_path / str(chunk), frames=9, memory={"decode_chunk": chunk}).code == 0
    assert [sum(counts) for counts in seen] == [9, 9]
    assert max(seen[0]) <= 4
    one, three = (video.read_frames(tmp_path / str(chunk) / "out/clip.mp4") for chunk in (1, 3))
    assert all(abs(a - b) <= 1 for f, g in zip(one, three, strict=True) for a, b in zip(f.rgb, g.rgb))


def test_a_prompt_at_the_edge_of_its_256_tokens_renders_and_one_more_does_not(
    render: Callable[..., Said], tmp_path: Path
) -> None:
    assert render(prompt=words(256)).code == 0
    assert manifest_of(tmp_path)["prompts"][0]["tokens"] == 256
    said = render(prompt=words(257))
    assert said.code == 2
    assert "job.yaml:3: prompt: the prompt has 257 tokens, text.max_tokens is 256" in said.err
    assert "text.max_tokens: 512" in said.err
    assert render(folder=tmp_path / "long", prompt=words(512), text={"max_tokens": 512}).code == 0
    assert render(folder=tmp_path / "cut", prompt=words(600), text={"truncate": True}).code == 0
    assert manifest_of(tmp_path / "cut")["prompts"][0]["truncated"]
