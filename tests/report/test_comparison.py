"""`wancli compare`, and `compare:` in a job: figures, files, and what happens to those that are there."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import manifests
import numpy as np
import pytest
from jobs import (
    CAT,
    KEPT,
    CommandResult,
    files_in,
    forbid_calls,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)
from PIL import Image
from plain_video import plain_video as plain

from wancli.engine import pipeline
from wancli.engine.context import RenderContext
from wancli.errors import FfmpegError, NotFinite, Stopped
from wancli.progress import Progress
from wancli.report import comparison, comparison_files, comparison_metrics
from wancli.report.comparison_areas import find_inside
from wancli.storage import manifest
from wancli.video import clip, contact_sheet, metrics, mp4

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
ITEMS = [
    {"id": "plain"},
    {"id": "early", "inject": [rule(blocks="early")]},
    {"id": "late", "inject": [rule(blocks="late", strength=1.0)]},
]
BATCH = {"output": "out/{id}.mp4", "items": ITEMS, "frames": 5}


def pattern(path: Path, size: str = "128x96", frames: int = 6, skip: int = 0) -> Path:
    path.write_bytes(_pattern(size, frames, skip))
    return path


@cache
def _pattern(size: str, frames: int, skip: int) -> bytes:
    source = f"testsrc2=size={size}:rate=8,trim=start_frame={skip},setpts=PTS-STARTPTS"
    coded = ["-frames:v", str(frames), "-pix_fmt", "yuv420p", "-crf", "4"]
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        subprocess.run(
            [FFMPEG, "-y", "-v", "error", "-f", "lavfi", "-i", source, *coded, file.name], check=True
        )
        return file.read()


@pytest.fixture
def loud(tmp_path: Path, known: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """As `render`, with all that is said on the way."""

    def said(*options: str, **changes: Any) -> CommandResult:
        return run_wancli(capsys, "render", write_job(tmp_path, tiny_job(known, **changes)), *options)

    return said


def compared(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "job.compare.json").read_text()))


# ---- the command ----


def test_it_prints_what_it_made_and_figures_as_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pattern(tmp_path / "a.mp4"), pattern(tmp_path / "b.mp4", skip=1)
    sheet, side = tmp_path / "sheet.png", tmp_path / "side.mp4"
    said = run_wancli(capsys, "compare", a, b, "-o", sheet, "--video", side, "-q")
    assert (said.code, said.out.split(), said.err) == (0, [str(sheet), str(side)], "")
    assert mp4.read_info(side).frame_count == 6
    said = run_wancli(capsys, "compare", a, b, "-o", sheet, "--json", "-q")
    found = json.loads(said.out)
    assert {k: found[k] for k in ("schema", "job", "baseline", "sheet", "video")} == {
        "schema": "wancli/compare/1",
        "job": None,
        "baseline": "a",
        "sheet": str(sheet),
        "video": None,
    }
    first, second = found["shots"]
    assert (first["id"], first["identical"], first["psnr"], first["heatmap"]) == ("a", True, None, None)
    assert (second["output"], second["identical"], second["frames"]) == (str(b), False, 6)
    assert 0 < second["ssim"] < 0.99
    assert 5 < second["psnr"] < 40
    assert second["baseline_motion"] == first["motion"] == pytest.approx(second["motion"], rel=0.5)
    heat = second["heatmap"]
    assert len(heat["values"]) == heat["width"] * heat["height"]
    assert (heat["width"], heat["height"]) == (32, 24)
    assert 0 < max(heat["values"]) <= 1
    assert second["latent_distance"] is None
    assert second["why"]["latent_distance"]


def test_a_copy_is_identical_and_its_psnr_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = pattern(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(a.read_bytes())
    said = run_wancli(capsys, "compare", a, tmp_path / "b.mp4", "-o", tmp_path / "s.png", "--json", "-q")
    copy = json.loads(said.out)["shots"][1]
    assert (copy["identical"], copy["psnr"], copy["ssim"]) == (True, None, 1.0)
    assert copy["why"]["psnr"] == "no pixel differs"
    assert not any(copy["heatmap"]["values"])


@pytest.mark.parametrize("said", ["b", "1"])
def test_the_baseline_is_an_id_or_a_number_from_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    videos = [plain(tmp_path / f"{name}.mp4", [(9, 9, 9)]) for name in "abc"]
    out = run_wancli(capsys, "compare", *videos, "-o", tmp_path / "s.png", "--baseline", said, "--json", "-q")
    assert json.loads(out.out)["baseline"] == "b"


def test_an_id_comes_before_a_number(tmp_path: Path) -> None:
    clips = clip.read_clips([plain(tmp_path / f"{name}.mp4", [(9, 9, 9)]) for name in ("1", "0")])
    assert comparison.select_baseline(clips, "0").path.name == "0.mp4"
    assert comparison.select_baseline(clips, "1").path.name == "1.mp4"


def test_one_video_alone_has_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = plain(tmp_path / "a.mp4", [(9, 9, 9)])
    said = run_wancli(capsys, "compare", a, "-o", tmp_path / "s.png", "--video", tmp_path / "s.mp4", "--json")
    assert said.code == 0
    assert json.loads(said.out)["shots"][0]["why"]["motion"] == "a single frame"
    assert (tmp_path / "s.png").exists()
    assert (tmp_path / "s.mp4").exists()


def test_other_sizes_and_lengths_are_said_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = pattern(tmp_path / "a.mp4")
    small, short = pattern(tmp_path / "small.mp4", size="64x48"), pattern(tmp_path / "short.mp4", frames=4)
    said = run_wancli(capsys, "compare", a, small, short, "-o", tmp_path / "s.png", "--json", "-q")
    _, small_found, short_found = json.loads(said.out)["shots"]
    assert (small_found["psnr"], small_found["ssim"], small_found["heatmap"]) == (None, None, None)
    assert small_found["why"]["psnr"] == small_found["why"]["ssim"] == "64x48 beside 128x96"
    assert small_found["motion"] > 0
    assert (short_found["frames"], short_found["identical"]) == (4, False)


def test_files_of_one_name_in_two_folders_have_their_paths_as_ids(tmp_path: Path) -> None:
    paths = [plain(tmp_path / folder / "x.mp4", [(9, 9, 9)]) for folder in "ab"]
    assert [one.id for one in clip.read_clips(paths)] == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a.mp4", "--baseline", "z"], 2, "--baseline: 'z' is none of the videos\n  0 to 0, or a"),
        (["a.mp4", "--baseline", "1"], 2, "--baseline: '1' is none of the videos"),
        (["a.mp4", "a.mp4"], 2, "a.mp4: given twice"),
        (["a.mp4", "no.mp4"], 2, "no.mp4: no such file"),
        (["a.mp4", "."], 2, ".: no such file"),
        (["a.mp4", "cut.mp4"], 3, "cut.mp4: ffmpeg failed"),
        (["a.mp4", "text.mp4"], 2, "text.mp4: is not an MP4\n  It takes MP4 files"),
        (["a.latents.safetensors", "a.mp4"], 2, "a.latents.safetensors: is not an MP4\n  It takes MP4 files"),
        (["a.mp4", "sound.mp4"], 3, "sound.mp4: ffmpeg failed"),
        (["a.mp4", "--video", "a.mp4"], 2, "a.mp4: is a video that is compared, or named twice"),
        (["a.mp4", "-o", "./a.mp4"], 2, "a.mp4: is a video that is compared, or named twice"),
        (["a.mp4", "-o", "x.mp4", "--video", "x.mp4"], 2, "x.mp4: is a video that is compared, or"),
        (["a.mp4", "-o", "folder"], 2, "folder: a folder has the name of an output"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_one_message_and_nothing_is_touched(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = pattern(Path("a.mp4")).read_bytes()
    Path("cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    Path("text.mp4").write_text("no video")
    Path("a.latents.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"__metadata__":{}}')
    Path("folder").mkdir()
    sound = ["-f", "lavfi", "-i", "sine=duration=0.2", "sound.mp4"]
    subprocess.run([FFMPEG, "-v", "error", *sound], check=True)
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    said = run_wancli(capsys, "compare", *arguments, "-q")
    assert said.code == code
    assert said.out == ""
    assert said.err.startswith(f"wancli: {message}")
    assert sum(line.startswith("wancli:") for line in said.err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_a_manifest_does_not_speak_for_another_video(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render().code == 0
    output = tmp_path / "out" / "clip.mp4"
    (known,) = clip.read_clips([output])
    assert known.manifest_body
    assert known.manifest_body.prompt.text == CAT
    output.unlink()
    plain(output, [(9, 9, 9)])
    assert clip.read_clips([output])[0].manifest_body is None


def test_a_video_that_goes_on_where_the_baseline_ends_is_not_identical(tmp_path: Path) -> None:
    long, short = (plain(tmp_path / f"{n}.mp4", [(9, 90, 200)] * n) for n in (3, 2))
    baseline, one = clip.read_clips([long, short])
    found = list(comparison_metrics.measure_clips([baseline, one], {"3": baseline, "2": baseline}))[1]
    assert (found["frames"], found["psnr"], found["identical"]) == (2, None, False)


def test_many_videos_go_onto_pages_with_the_baseline_on_each(tmp_path: Path) -> None:
    one = clip.Clip(Path("x.mp4"), "x", None, mp4.VideoInfo(1, 8, 64, 64))
    clips = [clip.Clip(Path(f"{n}.mp4"), str(n), None, one.info) for n in range(8)]
    found = comparison_files.split_into_files(
        Path("s.png"), clips, dict.fromkeys(map(str, range(8)), clips[2]), 4, None
    )
    assert [(str(file.path), [one.id for one in file.clips]) for file in found] == [
        ("s.png", ["2", "0", "1", "3"]),
        ("s-2.png", ["2", "4", "5", "6"]),
        ("s-3.png", ["2", "7"]),
    ]
    (alone,) = comparison_files.split_into_files(
        Path("s.png"), clips[:4], dict.fromkeys("0123", clips[2]), 4, None
    )
    assert [one.id for one in alone.clips] == ["0", "1", "2", "3"]


def test_a_sheet_says_what_blocks_read_and_not_what_has_strength_0() -> None:
    rules = [manifests.rule("fish", blocks={"2": strength, "3": strength}) for strength in (0.0, 0.5)]
    prompts = [manifests.prompt("cat", "a cat"), manifests.prompt("fish", "a fish")]
    record = manifests.record(prompts=prompts, injection=rules)
    one = clip.Clip(Path("x.mp4"), "x", record, mp4.VideoInfo(1, 8, 64, 64))
    assert [*contact_sheet._caption_lines(one, "")] == ["x: a cat", "  blocks 2-3 at 0.5 read: a fish"]


def test_on_pages_of_many_videos_each_has_its_own_baseline(tmp_path: Path) -> None:
    about = mp4.VideoInfo(1, 8, 64, 64)
    clips = {name: clip.Clip(Path(f"{name}.mp4"), name, None, about) for name in "aAbBcC"}
    beside = {name: clips[name.lower()] for name in clips}
    found = comparison_files.split_into_files(Path("s.png"), [*clips.values()], beside, 3, None)
    assert [[one.id for one in each.clips] for each in found] == [
        ["a", "A", "b"],
        ["b", "B", "c"],
        ["c", "C"],
    ]


# ---- a job ----


def test_a_job_compares_its_shots_beside_the_outputs(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = render(**BATCH, compare=True, video=KEPT)
    assert (said.code, said.err) == (0, "")
    assert len(said.out.split()) == 3
    assert {"job.compare.json", "job.compare.png", "job.compare.mp4"} <= set(files_in(tmp_path))
    found = compared(tmp_path)
    assert (found["job"], found["baseline"]) == ("job", "plain")
    assert (found["sheet"], found["video"]) == ("job.compare.png", "job.compare.mp4")
    assert [shot["id"] for shot in found["shots"]] == ["plain", "early", "late"]
    assert [shot["output"] for shot in found["shots"]] == ["plain.mp4", "early.mp4", "late.mp4"]
    for shot in found["shots"][1:]:
        z, base = (latents_of(tmp_path, name).double() for name in (shot["id"], "plain"))
        assert shot["latent_distance"] == pytest.approx(float((z - base).norm() / base.norm()), rel=1e-4)
        assert shot["latent_from"] == "latents"
        kept = [manifest_of(tmp_path, name)["latent"] for name in (shot["id"], "plain")]
        estimate = metrics.sketched_relative_distance(*kept)
        assert estimate == pytest.approx(shot["latent_distance"], rel=0.2)
    # and what is there and was made of the same videos stays
    forbid_calls(monkeypatch, (comparison_metrics, "measure_clips"), (comparison, "write_outputs"))
    before = (tmp_path / "out" / "job.compare.json").stat().st_mtime_ns
    assert render(**BATCH, compare=True, video=KEPT).code == 0
    assert (tmp_path / "out" / "job.compare.json").stat().st_mtime_ns == before


def test_shots_of_two_seeds_are_each_beside_that_of_their_own(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    items = [
        {"id": f"{name}{seed}", "seed": seed, "inject": inject}
        for seed in (0, 1)
        for name, inject in (("plain", []), ("early", [rule(blocks="early")]))
    ]
    assert render(**BATCH | {"items": items}, compare={"video": False}, video=KEPT).code == 0
    found = {shot["id"]: shot for shot in compared(tmp_path)["shots"]}
    assert {id: shot["baseline"] for id, shot in found.items()} == {
        "plain0": "plain0", "early0": "plain0", "plain1": "plain1", "early1": "plain1",
    }  # fmt: skip
    z, base = (latents_of(tmp_path, name).double() for name in ("early1", "plain1"))
    assert found["early1"]["latent_distance"] == pytest.approx(
        float((z - base).norm() / base.norm()), rel=1e-4
    )
    assert found["early1"]["baseline_motion"] == found["plain1"]["motion"]
    assert comparison_metrics.format_captions(compared(tmp_path), name_baseline=True)[3].endswith(
        "%  beside plain1"
    )
    assert comparison_metrics.format_captions(compared(tmp_path), name_baseline=False)[3].endswith("%")


def test_a_job_without_a_plain_shot_gets_one_and_is_compared_with_it(
    loud: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = loud(**BATCH | {"items": ITEMS[1:]}, compare={"video": False})
    assert said.code == 0
    assert (
        "compare adds 1 shot without injection: plain (compare: {add_baseline: false} adds none)\n"
        in said.err
    )
    assert "compare videos: started, 3 videos\n" in said.err
    assert manifest_of(tmp_path, "plain")["injection"] == []
    assert [(shot["id"], shot["baseline"]) for shot in compared(tmp_path)["shots"]] == [
        ("plain", "plain"),
        ("early", "plain"),
        ("late", "plain"),
    ]


def test_shots_that_differ_in_more_than_the_injection_have_no_figures(
    loud: Callable[..., CommandResult], tmp_path: Path
) -> None:
    items = [{"id": id, "seed": seed, "inject": [rule(blocks="early")]} for id, seed in (("a", 1), ("b", 2))]
    said = loud(**BATCH | {"items": items}, compare={"video": False, "add_baseline": False})
    assert said.code == 0
    assert "warning: shots a, b: no figures, because no compared shot differs" in said.err
    found = compared(tmp_path)
    for shot in found["shots"]:
        figures = ("baseline", "ssim", "psnr", "latent_distance", "heatmap", "baseline_motion")
        assert [shot[name] for name in figures] == [None] * 6
        assert shot["why"]["ssim"] == "no figures: no shot differs in the injection alone"
    captions = comparison_metrics.format_captions(found, name_baseline=True)
    assert [text.split("  ")[0] for text in captions] == [
        "no figures: no shot differs in the injection alone"
    ] * 2
    assert compared(tmp_path)["shots"][0]["baseline"] is None


def test_a_shot_that_was_rendered_under_another_id_is_compared(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    items = [{"id": "plain", "output": "out/plain.mp4"}, {**ITEMS[1], "output": "out/early.mp4"}]
    assert render(**BATCH | {"items": items}).code == 0
    items[0]["id"] = "renamed"
    said = render(**BATCH | {"items": items}, compare={"video": False})
    assert (said.code, said.err) == (0, "")
    assert [shot["id"] for shot in compared(tmp_path)["shots"]] == ["renamed", "early"]


def test_without_latents_on_disk_the_manifests_tell_their_distance(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render(**BATCH, compare={"video": False}).code == 0
    found = compared(tmp_path)
    assert found["video"] is None
    assert "job.compare.mp4" not in files_in(tmp_path)
    assert [shot["latent_from"] for shot in found["shots"]] == [None, "sketch", "sketch"]
    assert all(shot["latent_distance"] > 0 for shot in found["shots"][1:])


def test_distances_rest_on_the_latents_that_these_videos_were_made_of(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render(**BATCH, compare=True, video=KEPT).code == 0
    assert compared(tmp_path)["shots"][1]["latent_from"] == "latents"
    early, late = (tmp_path / "out" / f"{name}.latents.safetensors" for name in ("early", "late"))
    late.unlink()  # which is reason enough to compare again
    assert render(**BATCH, compare=True, video=KEPT).code == 0
    assert [shot["latent_from"] for shot in compared(tmp_path)["shots"]] == [None, "latents", "sketch"]
    late.write_bytes(early.read_bytes())  # another shot's
    before = compared(tmp_path)["shots"][2]["latent_distance"]
    assert render(**BATCH, compare=True, video=KEPT).code == 0
    shot = compared(tmp_path)["shots"][2]
    assert (shot["latent_from"], shot["latent_distance"]) == ("sketch", before)


def test_an_item_that_stays_out_is_in_no_figure(render: Callable[..., CommandResult], tmp_path: Path) -> None:
    items = [ITEMS[0], ITEMS[1] | {"compare": False}, ITEMS[2]]
    assert render(**BATCH | {"items": items}, compare=True).code == 0
    assert [shot["id"] for shot in compared(tmp_path)["shots"]] == ["plain", "late"]


def test_a_finished_job_is_compared_when_asked_later_and_again_when_a_file_is_gone(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(**BATCH).code == 0
    assert "job.compare.json" not in files_in(tmp_path)
    forbid_calls(monkeypatch)
    assert render("--set", "compare={baseline: late}", **BATCH).code == 0
    assert compared(tmp_path)["baseline"] == "late"
    (tmp_path / "out" / "job.compare.png").unlink()
    assert render("--set", "compare={baseline: late}", **BATCH).code == 0
    assert "job.compare.png" in files_in(tmp_path)
    assert not [name for name in files_in(tmp_path) if ".old-" in name]


def test_parts_of_a_job_are_compared_with_what_is_done_of_the_others(
    loud: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert "the baseline, shot plain, is not done" in loud("--items", "1", **BATCH, compare=True).err
    assert "job.compare.json" not in files_in(tmp_path)
    said = loud("--items", "0", **BATCH, compare=True)
    assert (said.code, "1 of 3 shots are not done" in said.err) == (0, True)
    assert [shot["id"] for shot in compared(tmp_path)["shots"]] == ["plain", "early"]


def test_baselines_that_are_not_done_are_one_warning(
    loud: Callable[..., CommandResult], tmp_path: Path
) -> None:
    sweep = {"seed": [7, 8, 9], "inject.0.strength": [0, 1.0]}
    changes = {"inject": [rule(blocks="early")], "matrix": sweep, "output": "out/{seed}-{strength}.mp4"}
    said = loud("--items", "1-5:2", **changes, compare=True)
    assert said.code == 0, said.err
    (told,) = [line for line in said.err.splitlines() if "compared" in line]
    assert told == (
        "warning: 3 shots are not compared: their baselines, seed7-strength0 and 2 more, are not done"
    )
    assert "job.compare.json" not in files_in(tmp_path)


def test_a_comparison_that_fails_fails_no_shot(
    loud: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> Any:
        raise FfmpegError("went wrong", where=str(path))

    monkeypatch.setattr(mp4, "read_frames", fails)
    said = loud(**BATCH, compare=True)
    assert said.code == 0
    assert len(said.out.split()) == 3
    assert "not compared: " in said.err
    assert "went wrong" in said.err


def test_what_another_program_left_under_these_names_moves_aside(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for end in ("json", "png", "mp4"):
        (tmp_path / "out" / f"job.compare.{end}").write_text("mine")
    assert render(**BATCH, compare=True).code == 0
    for end in ("json", "png", "mp4"):
        assert (tmp_path / "out" / f"job.compare.old-1.{end}").read_text() == "mine"


def test_who_asks_for_an_end_gets_it_between_two_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clip.read_clips([plain(tmp_path / f"{name}.mp4", [(9, 9, 9)]) for name in "ab"])
    tools = RenderContext(None, Progress())
    seen: list[str] = []
    real = comparison_metrics._compared_row

    def asked(one: clip.Clip, *others: Any) -> Any:
        seen.append(one.id)
        tools.stop.reason = "SIGTERM"
        return real(one, *others)

    monkeypatch.setattr(comparison_metrics, "_compared_row", asked)
    with pytest.raises(Stopped, match="comparing them is not"):
        comparison.measure_document([*clips, clips[1]], clips[0], dict.fromkeys("ab", clips[0]), tools)
    assert seen == ["b"]


@pytest.mark.parametrize("first", ["0", "0-1"])
def test_a_shot_of_that_name_is_not_moved_aside(
    loud: Callable[..., CommandResult], tmp_path: Path, first: str
) -> None:
    items = [{"id": "a"}, {"id": "b", "output": "out/job.compare.mp4"}]
    assert (
        "job.compare.mp4: is a video that is compared"
        in loud("--items", first, items=items, compare=True).err
    )
    said = loud(items=items, compare=True)
    assert said.code == 0
    assert "job.compare.mp4: is a video that is compared" in said.err
    assert manifest_of(tmp_path, "job.compare")["files"][0]["path"] == "job.compare.mp4"
    assert "job.compare.old-1.mp4" not in files_in(tmp_path)


def test_figures_of_a_render_are_finite_numbers_and_the_document_is_strict_json(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    assert render(**BATCH, compare=True).code == 0
    text = (tmp_path / "out" / "job.compare.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    for shot in found["shots"][1:]:
        assert np.isfinite([shot[name] for name in ("latent_distance", "psnr", "ssim", "motion")]).all()


def test_what_is_done_is_compared_also_where_so_many_failed_that_it_was_enough(
    loud: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.decode_latent

    def finish(*arguments: Any) -> Any:
        if "late" in str(arguments[2]):
            raise NotFinite("NaN")
        return real(*arguments)

    monkeypatch.setattr(pipeline, "decode_latent", finish)
    said = loud("--fail-fast", **BATCH, compare={"baseline": "plain"})
    assert said.code == 1, said.err
    assert [shot["id"] for shot in compared(tmp_path)["shots"]] == ["plain", "early"]


def test_the_area_of_a_rule_is_scored_apart_from_the_rest(
    render: Callable[..., CommandResult], tmp_path: Path
) -> None:
    """Of a rule for the right half of frames 1 to 4, of one with a mask of it, and of one for the whole
    video.
    """
    right = rule(blocks="all", region=[0.5, 0, 1, 1], frames="1-4")
    mask = tmp_path / "right.png"
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, axis=0)).save(mask)
    masked = rule(blocks="all", mask=str(mask), frames="1-4")
    items = [
        {"id": "plain"},
        {"id": "right", "inject": [right]},
        {"id": "masked", "inject": [masked]},
        {"id": "all", "inject": [rule(blocks="all")]},
    ]
    assert render(output="out/{id}.mp4", frames=5, items=items, compare=True).code == 0
    rows = {shot["id"]: shot for shot in compared(tmp_path)["shots"]}
    assert rows["all"].get("psnr_inside") is None
    luma = {}
    for id in ("plain", "right"):
        frames = mp4.read_frames(tmp_path / f"out/{id}.mp4")
        rgb = [np.frombuffer(frame.rgb, np.uint8).reshape(frame.height, frame.width, 3) for frame in frames]
        luma[id] = np.stack(rgb) @ [0.2126, 0.7152, 0.0722]
    squares = (luma["plain"] - luma["right"]) ** 2
    inside = np.zeros(squares.shape, bool)
    inside[1:, :, 32:] = True
    for key, where in (("psnr_inside", inside), ("psnr_outside", ~inside)):
        expected = 10 * math.log10(255**2 / squares[where].mean())
        assert rows["right"][key] == pytest.approx(expected, abs=1e-3)
        assert rows["masked"][key] == rows["right"][key]
    Image.new("L", (2, 2), 255).save(mask)  # another mask than that of the render
    body = manifest.read(tmp_path / "out/masked.manifest.json")
    assert find_inside(body) is None
