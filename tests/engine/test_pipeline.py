"""From a job to a verified MP4: once is enough, nothing is overwritten, no work is lost."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    CAT,
    KEPT,
    TINY,
    VAE,
    CommandResult,
    change_tensors,
    checkpoint,
    count_forwards,
    files_in,
    forbid_calls,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
)
from safetensors.torch import save_file

from wancli.models.dit import WanModel
from wancli.resources import machine
from wancli.storage.manifest import is_done, manifest_path
from wancli.storage.manifest import write as write_manifest
from wancli.text import encoder
from wancli.weights import loader

# ---- once is enough ----


def test_a_finished_job_is_not_rendered_again(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = render()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clip*")}
    forbid_calls(
        monkeypatch, (WanModel, "predict_velocities"), (loader, "load_transformer"), (loader, "load_vae")
    )
    second = render("--json")
    assert (first.code, second.code) == (0, 0)
    assert first.out == f"{tmp_path}/out/clip.mp4\n"
    assert [shot["status"] for shot in json.loads(second.out)["shots"]] == ["already done"]
    assert render().out == first.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("clip*")}
    assert files_in(tmp_path) == ["clip.manifest.json", "clip.mp4", "job.report.json"]


def test_only_unfinished_shots_are_rendered(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    assert render(output="out/{id}.mp4", items=items[::2]).code == 0
    calls = count_forwards(monkeypatch)
    result = render("--json", output="out/{id}.mp4", items=items)
    assert result.code == 0
    assert [shot["status"] for shot in json.loads(result.out)["shots"]] == [
        "already done",
        "rendered",
        "already done",
    ]
    assert len(calls) == 2 * 2


def test_a_prompt_is_encoded_once_ever_and_the_manifest_proves_it(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = f"{CAT} Nobody has asked for this one before."
    assert render(prompt=prompt, folder=tmp_path / "1").code == 0
    forbid_calls(monkeypatch, (encoder, "load_encoder"))
    assert render(prompt=prompt, folder=tmp_path / "2").code == 0
    first, second = manifest_of(tmp_path / "1"), manifest_of(tmp_path / "2")
    assert (first["encoder_loaded"], second["encoder_loaded"]) == (True, False)
    assert [text["cached"] for text in second["prompts"]] == [True, True]
    assert first["files"] == second["files"]


def test_the_same_job_gives_the_same_bytes(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    for name in "12":
        assert render(folder=tmp_path / name, frames=5, inject=[rule(blocks="late")], video=KEPT).code == 0
    for file in ("clip.mp4", "clip.latents.safetensors"):
        one, two = (tmp_path / name / "out" / file for name in "12")
        if file.endswith("mp4"):
            assert one.read_bytes() == two.read_bytes()
        else:
            assert torch.equal(latents_of(tmp_path / "1"), latents_of(tmp_path / "2"))


# ---- what is there already ----


def test_a_file_that_already_exists_is_never_touched(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "out" / f"{name}.mp4").write_bytes(b"holiday")
    result = render(output="out/{id}.mp4", items=[{"id": "a"}, {"id": "b"}])
    assert result.code == 2
    assert result.err.splitlines() == [
        f"wancli: {tmp_path}/out/a.mp4: already exists: no manifest",
        f"wancli: {tmp_path}/out/b.mp4: already exists: no manifest",
        "  This job did not make it: --force moves it aside; or change `output`.",
    ]
    assert result.out == ""
    assert files_in(tmp_path) == ["a.mp4", "b.mp4"]
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"holiday"


def test_a_video_of_another_seed_blocks_the_shot_and_force_moves_it_aside(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render().code == 0
    first = (tmp_path / "out" / "clip.mp4").read_bytes()
    result = render(seed=1)
    assert result.code == 2
    assert "out/clip.mp4: already exists: made with seed 0, now 1" in result.err
    assert render("--force", seed=1).code == 0
    second = (tmp_path / "out" / "clip.mp4").read_bytes()
    assert render("--force", seed=1).code == 0
    assert (tmp_path / "out" / "clip.old-1.mp4").read_bytes() == first
    assert (tmp_path / "out" / "clip.old-2.mp4").read_bytes() == second
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == second
    assert manifest_of(tmp_path)["shot"]["seed"] == 1


def test_a_file_that_blocks_one_shot_fails_that_shot_alone(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.mp4").write_bytes(b"holiday")
    items = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    result = render("--json", output="out/{id}.mp4", items=items)
    assert result.code == 1
    shots = json.loads(result.out)["shots"]
    assert [shot["status"] for shot in shots] == ["rendered", "failed", "rendered"]
    assert shots[1]["error"]["code"] == "job.output_exists"
    assert (tmp_path / "out" / "b.mp4").read_bytes() == b"holiday"
    assert render(output="out/{id}.mp4", items=items).code == 2  # nothing but that one is to do


@pytest.mark.parametrize("kept", [True, False], ids=["with its latent", "without"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "seal", "files"])
def test_an_output_of_this_very_job_that_no_longer_verifies_is_moved_aside_and_rendered_again(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    kept: bool,
) -> None:
    said = {"video": {"keep_latents": kept}}
    assert render(**said).code == 0
    path = tmp_path / "out" / "clip.mp4"
    whole, manifest = path.read_bytes(), path.with_name("clip.manifest.json")
    match damage:
        case "flipped":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "cut":
            path.write_bytes(whole[:-1])
        case "seal":
            manifest.write_text(manifest.read_text().replace('"seal": "', '"seal": "0'))
        case "files":
            manifest.write_text(manifest.read_text().replace('"bytes"', '"bytos"'))
    damaged, record = path.read_bytes(), manifest.read_bytes()
    calls = count_forwards(monkeypatch)
    assert render(**said).code == 0
    assert len(calls) == (0 if kept else 4)
    assert path.read_bytes() == whole
    assert path.with_name("clip.damaged-1.mp4").read_bytes() == damaged
    assert path.with_name("clip.manifest.damaged-1.json").read_bytes() == record
    assert is_done(path, manifest_of(tmp_path)["key"])


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "another manifest", "garbage for one"])
def test_a_file_not_proven_to_be_of_this_job_stays_where_it_is(
    render: Callable[..., CommandResult], tmp_path: Path, kind: str
) -> None:
    assert render().code == 0
    path = tmp_path / "out" / "clip.mp4"
    manifest = path.with_name("clip.manifest.json")
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            (tmp_path / "mine").write_bytes(b"mine")
            path.symlink_to(tmp_path / "mine")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case "another manifest":
            path.write_bytes(b"mine")
            manifest.write_text('{"key": "0"}')
        case "garbage for one":
            path.write_bytes(b"mine")
            manifest.write_text("{")
    before = sorted(path.parent.iterdir())
    assert render().code == 2
    assert sorted(path.parent.iterdir()) == before


# ---- the latent is safe ----


@pytest.mark.parametrize(
    "script",
    ["echo boom >&2; exit 7", "exec cat > /dev/null"],
    ids=["dies", "writes nothing"],
)
def test_when_ffmpeg_fails_the_latent_is_saved_and_the_next_run_only_decodes(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    fake_ffmpeg(script)
    result = render(inject=[rule(blocks="late")])
    assert result.code == 3
    assert result.err.startswith(f"wancli: shot 0000: {tmp_path}/out/")
    assert files_in(tmp_path) == ["clip.latents.safetensors", "job.report.json"]
    z_CTYX = latents_of(tmp_path)
    assert (z_CTYX.shape, z_CTYX.dtype) == ((16, 1, 8, 8), torch.float32)

    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    forbid_calls(
        monkeypatch, (WanModel, "predict_velocities"), (loader, "load_transformer"), (encoder, "load_encoder")
    )
    assert render(inject=[rule(blocks="late")]).code == 0
    assert files_in(tmp_path) == ["clip.manifest.json", "clip.mp4", "job.report.json"]
    assert manifest_of(tmp_path)["injection"][0]["hits_by_block"] == {"3": 2}


def test_decode_finishes_a_latent_that_a_render_left(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert render(folder=tmp_path / "whole").code == 0
    fake_ffmpeg("exit 1")
    assert render().code == 3
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    forbid_calls(monkeypatch)
    latent = tmp_path / "out" / "clip.latents.safetensors"
    result = run_wancli(capsys, "decode", latent, "-q")
    assert (result.code, result.out) == (0, f"{tmp_path}/out/clip.mp4\n")
    assert (tmp_path / "out/clip.mp4").read_bytes() == (tmp_path / "whole/out/clip.mp4").read_bytes()
    body, whole = manifest_of(tmp_path), manifest_of(tmp_path / "whole")
    for record in (body, whole):
        record["model"].pop("why")  # tells how much memory was free then
    assert {k: body[k] for k in ("key", "shot", "model", "files")} == {
        k: whole[k] for k in ("key", "shot", "model", "files")
    }
    # to the job it is done
    assert render().code == 0
    # what is there stays, and another name is as good
    assert run_wancli(capsys, "decode", latent, "-q").code == 2
    other = run_wancli(capsys, "decode", latent, "-q", "-o", tmp_path / "new" / "b.mp4")
    assert (other.code, other.out) == (0, f"{tmp_path}/new/b.mp4\n")
    assert is_done(tmp_path / "new" / "b.mp4", body["key"])
    assert run_wancli(capsys, "decode", latent, "-q", "--force").code == 0
    assert (tmp_path / "out" / "clip.old-1.mp4").exists()


def test_latents_are_kept_only_if_the_job_says_so(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render(output="out/{id}.mp4", items=[{"id": "kept", "video": KEPT}, {"id": "plain"}]).code == 0
    assert [name for name in files_in(tmp_path) if "latents" in name] == ["kept.latents.safetensors"]


def test_a_kept_latent_is_decoded_again_when_only_the_video_changes(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(video=KEPT).code == 0
    small = KEPT | {"crf": 51}
    assert render(video=small).code == 2  # the other video already exists
    before = (tmp_path / "out" / "clip.mp4").stat().st_size
    (tmp_path / "out" / "clip.mp4").unlink()
    forbid_calls(monkeypatch)
    assert render(video=small).code == 0
    assert (tmp_path / "out" / "clip.mp4").stat().st_size < before
    assert manifest_of(tmp_path)["shot"]["crf"] == 51
    assert render(video=small).code == 0


def test_outputs_that_share_only_the_root_have_their_report_beside_the_first(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:
        items = [{"output": "out/a.mp4"}, {"output": f"{elsewhere}/b.mp4"}]
        assert render(items=items).code == 0
        assert sorted(path.name for path in Path(elsewhere).iterdir()) == ["b.manifest.json", "b.mp4"]
    assert files_in(tmp_path) == ["a.manifest.json", "a.mp4", "job.report.json"]


@pytest.mark.parametrize("place", [0, 8, 60, -300, -1, "cut", "empty", "foreign", "missing"])
def test_a_damaged_latent_is_refused(
    render: Callable[..., CommandResult],
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
    result = run_wancli(capsys, "decode", path, "-q")
    assert result.code == (2 if place == "missing" else 4)
    assert result.err.startswith(f"wancli: {path}: ")
    assert [p.name for p in tmp_path.iterdir()] == ([] if place == "missing" else ["x.latents.safetensors"])


def test_a_shot_with_a_damaged_latent_is_sampled_again(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    fake_ffmpeg: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_ffmpeg("exit 1")
    assert render().code == 3
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    latent = tmp_path / "out" / "clip.latents.safetensors"
    latent.write_bytes(latent.read_bytes()[:-1])
    calls = count_forwards(monkeypatch)
    result = run_wancli(capsys, "render", tmp_path / "job.yaml", "--progress", "plain")
    assert result.code == 0
    assert len(calls) == 4
    assert "shot 0000 is sampled again" in result.err


def test_a_finished_shot_whose_record_lacks_a_figure_is_done_and_keeps_its_entry_in_the_report(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render().code == 0
    path = manifest_path(tmp_path / "out" / "clip.mp4")
    write_manifest(
        path, {name: value for name, value in manifest_of(tmp_path).items() if name != "predicted"}
    )
    report = tmp_path / "out" / "job.report.json"
    document = json.loads(report.read_text())
    document["shots"][0].pop("predicted", None)
    report.write_text(json.dumps(document))
    calls = count_forwards(monkeypatch)
    assert render().code == 0
    assert calls == []
    assert not list((tmp_path / "out").glob("*damaged*"))
    assert not list((tmp_path / "out").glob("*.old-*"))


def test_a_latent_is_not_decoded_with_another_vae(
    render: Callable[..., CommandResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path)
    assert render(model=str(model), video=KEPT).code == 0
    change_tensors(model / VAE, lambda tensors: tensors["conv2.bias"].add_(1))
    latent = tmp_path / "out" / "clip.latents.safetensors"
    result = run_wancli(capsys, "decode", latent, "-q", "-o", tmp_path / "b.mp4")
    assert result.code == 4
    assert result.err.startswith(f"wancli: {model / VAE}: not the VAE that this latent was planned with")
    assert run_wancli(capsys, "decode", latent, "-q", "-o", tmp_path / "b.mp4", "--model", TINY).code == 0


# ---- the machine ----


def test_a_disk_that_fills_up_at_any_moment_leaves_nothing_half_written(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run may sync one file more than the last before the disk is full; the next resumes."""
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
        result = render()
        codes.append(result.code)
        assert [p.name for p in tmp_path.rglob(".wancli-*")] == []
        if result.code == 0:
            break
        assert "No space left on device" in result.err
    assert set(codes[:-1]) == {3}
    assert codes[-1] == 0
    assert (tmp_path / "out/clip.mp4").read_bytes() == (tmp_path / "whole/out/clip.mp4").read_bytes()
    assert is_done(tmp_path / "out" / "clip.mp4", manifest_of(tmp_path)["key"])


def test_an_unwritable_folder_is_reported_before_anything_is_loaded(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    (tmp_path / "out").write_text("a file")
    result = render()
    assert result.code == 3
    assert result.err.startswith(f"wancli: {tmp_path}/out: ")


def test_a_missing_ffmpeg_is_reported_before_anything_is_loaded(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    result = render()
    assert result.code == 3
    assert "/no/ffmpeg: no such ffmpeg, or it is not executable" in result.err


def test_too_little_memory_is_reported_before_anything_is_loaded(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    monkeypatch.setattr(machine, "process_memory", lambda: 0)
    result = render()
    assert result.code == 5
    assert result.err.startswith("wancli: shot 0000: ")
    assert " of memory, 1000 B are free" in result.err


@pytest.mark.parametrize("change", [{"memory": {"device": "cuda"}}, {"noise": "cuda"}])
def test_cuda_without_a_device_is_a_machine_error(
    render: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    forbid_calls(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = render(**change)
    assert result.code == 3
    assert result.err.startswith("wancli: torch can use no CUDA device here\n")


def test_ctrl_c_keeps_finished_shots_and_leaves_no_debris(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(call: int) -> None:
        if call == 6:
            raise KeyboardInterrupt

    calls = count_forwards(monkeypatch, interrupt)
    items = [{"id": "a"}, {"id": "b", "seed": 1}, {"id": "c", "seed": 2}]
    result = render(output="out/{id}.mp4", items=items)
    assert result.code == 130
    assert result.out == f"{tmp_path}/out/a.mp4\n"
    assert result.err == "wancli: interrupted; finished shots are kept, run again to continue\n"
    assert files_in(tmp_path) == ["a.manifest.json", "a.mp4", "job.report.json"]
    report = json.loads((tmp_path / "out" / "job.report.json").read_text())
    assert [shot["status"] for shot in report["shots"]] == ["rendered", "not started", "not started"]
    assert render(output="out/{id}.mp4", items=items).code == 0
    assert len(calls) == 7 + 8
