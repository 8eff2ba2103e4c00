"""Videos from pictures, rendered from a job, against the official code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_cases import CLIP, FIXTURES, LAST, PICTURE, Case, assemble, case_keys, cases, load, numbers
from jobs import (
    KEPT,
    NETWORKS,
    T5,
    VAE,
    CommandResult,
    count_forwards,
    latents_of,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)
from oracles import relative_error
from PIL import Image
from safetensors.torch import load_file

from wancli.engine import picture_stage
from wancli.engine.manifest_body import checkpoint_location
from wancli.errors import ErrorCapture, ShotError
from wancli.job.loader import load as load_job
from wancli.models import given_frames
from wancli.models.clip import CLIPVision
from wancli.models.dit import lerp
from wancli.models.given_frames import GivenFrames
from wancli.models.vae22 import WanVAE22
from wancli.plan import disk_estimate, memory_policy
from wancli.plan.planner import build_plan
from wancli.report.html.rerun_job import build_job, rerun_command
from wancli.sampling.solvers import build_sigma_schedule
from wancli.storage import manifest
from wancli.storage.cache import Entry, Store, read_entry
from wancli.video import mp4
from wancli.weights import loader
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_vae
from wancli.weights.single_files import SingleFiles

Render = Callable[..., CommandResult]


def count_clip_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pictures of all forwards of CLIP from now on."""
    calls: list[int] = []
    real = CLIPVision.forward

    def counted(self: CLIPVision, pixels_PCYX: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels_PCYX))
        return real(self, pixels_PCYX)

    monkeypatch.setattr(CLIPVision, "forward", counted)
    return calls


@pytest.fixture
def ti2v(quick_for_pictures: Callable[[str], Path]) -> Path:
    return quick_for_pictures("wan22-ti2v-tiny")


@pytest.fixture
def render(ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Render:
    def rendered(*options: object, **keys: Any) -> CommandResult:
        job = tiny_job(ti2v, image=str(PICTURE), video=KEPT, frames=5) | {"size": {"area": 4096}} | keys
        path = write_job(tmp_path, job)
        return run_wancli(capsys, "render", path, "--cache-dir", tmp_path / "cache", *options)

    return rendered


@pytest.mark.parametrize(
    ("of", "name", "fit", "roles"),
    [
        ("wan22-ti2v-tiny", "image_unipc_cfg5", "crop", ["first"]),
        ("wan22-ti2v-tiny", "image_dpmpp_cfg5", "crop", ["first"]),
        ("wan21-i2v-tiny", "dpmpp_cfg5", "stretch", ["first"]),
        ("wan21-flf2v-tiny", "unipc_cfg55", "stretch", ["first", "last"]),
        ("wan21-flf2v-tiny", "dpmpp_other_size", "stretch", ["first", "last"]),
        ("wan22-i2v-tiny", "unipc_pair", "stretch", ["first"]),
        ("wan22-ti2v-tiny", "inject_cond_steps", "crop", ["first"]),
        ("wan21-i2v-tiny", "inject_cond_27_39", "stretch", ["first"]),
        ("wan21-flf2v-tiny", "inject_cond_27_39", "stretch", ["first", "last"]),
        ("wan22-i2v-tiny", "inject_cond_steps", "stretch", ["first"]),
    ],
)
def test_a_job_with_pictures_gives_the_latents_of_the_official_code(
    of: str, name: str, fit: str, roles: list[str], render: Render, tmp_path: Path
) -> None:
    model = assemble(of, tmp_path / "model")
    said = render(model=str(model), **case_keys(of, name))
    assert said.code == 0, said.err
    expected = load_file(FIXTURES / of / "reference.safetensors")[f"{name}.latents"][-1]
    assert relative_error(latents_of(tmp_path), expected) < 5e-5
    record = manifest_of(tmp_path)
    assert [picture["role"] for picture in record["pictures"]] == roles
    for picture in record["pictures"]:
        size = (120, 140) if picture["path"].endswith("last_other.png") else (157, 111)
        assert (picture["width"], picture["height"]) == size
        assert picture["cached"] is False
        assert (picture["preprocess"], picture["fit"]) == ("official", fit)
    assert [phase["name"] for phase in record["phases"]][:2] == ["encode", "pictures"]
    assert {"encode", "sample", "decode", "pictures"} == {phase["name"] for phase in record["predicted"]}


def test_the_official_crop_of_a_last_picture_of_another_size_is_told_recorded_and_repeated(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = case_keys("wan21-flf2v-tiny", "dpmpp_other_size") | {"sampler": {"steps": 1}}
    model = str(assemble("wan21-flf2v-tiny", tmp_path / "model"))
    said = render(model=model, **keys)
    assert said.code == 0
    assert "last_other.png: it has not the size of the first picture" in said.err
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert [picture.crop for picture in record.pictures] == [None, (183, 157)]
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    cache = ("--cache-dir", tmp_path / "cache")
    (shot,) = json.loads(run_wancli(capsys, "plan", path, "--json", *cache).out)["shots"]
    assert shot["key"] == record.key
    assert shot["pictures"][1]["sha256"] == record.pictures[1].sha256
    said = render(model=model, **keys | {"image": keys["image"] | {"fit": "crop"}})
    assert "already exists" in said.err
    assert "another image.last" in said.err
    assert "it has not the size" not in said.err


@pytest.fixture
def quick_i2v(quick_for_pictures: Callable[[str], Path]) -> Path:
    return quick_for_pictures("wan21-i2v-tiny")


@pytest.fixture
def i2v(tmp_path: Path) -> Path:
    return assemble("wan21-i2v-tiny", tmp_path / "i2v")


@torch.inference_mode()
def sample_by_hand(rule: dict[str, Any], sampler: dict[str, Any]) -> torch.Tensor:
    """Euler steps written out, on what the official code gives for texts, frames and CLIP of both pictures.

    `rule` has its blocks and steps as first and last number.
    """
    of = load_file(FIXTURES / "wan21-i2v-tiny/reference.safetensors")
    both = load_file(FIXTURES / "wan21-flf2v-tiny/reference.safetensors")["clip.input+last.features"]
    model = load(FIXTURES / "wan21-i2v-tiny")
    own = model.project_image(of["clip.input.features"].flatten(0, -2))
    other = model.project_image(both.view(2, 257, -1)[1])
    if rule["gain"] != 1:
        other = lerp(own, other, rule["gain"])
    blended = lerp(own, other, rule["strength"])
    given = GivenFrames(torch.cat((of["dpmpp_cfg5.mask"], of["dpmpp_cfg5.y"])))
    schedule = build_sigma_schedule("euler", sampler["steps"], sampler["shift"])
    x = of["dpmpp_cfg5.noise"]
    (first, last), (start, stop) = rule["blocks"], rule["steps"]
    for step, t in enumerate(schedule.timesteps):
        v = {}
        for branch, text in (("cond", "main"), ("uncond", "negative")):
            context = model.project(of[f"context.{text}"])
            reads = start <= step <= stop and rule["branch"] in (branch, "both")
            mixes = [
                ((context, 1.0), (blended if reads and first <= block <= last else own, 1.0))
                for block in range(40)
            ]
            v[branch] = model(x[None], t, mixes, given)[0]
        guided = v["uncond"] + sampler["guidance"] * (v["cond"] - v["uncond"])
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * guided
    return x


EULER = {"solver": "euler", "steps": 3, "shift": 3.0, "guidance": 2.0}


@pytest.fixture
def render_i2v(i2v: Path, render: Render) -> Render:
    """Renders the frames of an official case, by Euler."""
    keys = case_keys("wan21-i2v-tiny", "dpmpp_cfg5") | {"model": str(i2v), "sampler": EULER}
    return lambda *options, **changes: render(*options, **keys | changes)


@pytest.mark.parametrize(
    ("branch", "gain", "steps"), [("cond", 1.0, [0, 2]), ("both", 1.5, [1, 1]), ("uncond", 1.0, [0, 1])]
)
def test_an_injected_picture_is_blended_into_what_chosen_blocks_read_of_pictures(
    branch: str, gain: float, steps: list[int], render_i2v: Render, tmp_path: Path
) -> None:
    rule = {"blocks": [5, 20], "steps": steps, "strength": 0.6, "branch": branch, "gain": gain}
    written = rule | {"image": str(LAST), "blocks": "5-20", "steps": f"{steps[0]}-{steps[1]}"}
    said = render_i2v(inject=[written])
    assert said.code == 0, said.err
    assert relative_error(latents_of(tmp_path), sample_by_hand(rule, EULER)) < 5e-5
    plain = sample_by_hand(rule | {"strength": 0.0}, EULER)
    assert relative_error(latents_of(tmp_path), plain) > 1e-3
    (record,) = manifest_of(tmp_path)["injection"]
    cells = 16 * (steps[1] - steps[0] + 1)
    reached = ["cond", "uncond"] if branch == "both" else [branch]
    assert record["hits_by_branch"] == dict.fromkeys(reached, cells)
    assert record["hits"] == record["planned"] == cells * len(reached)
    assert (record["picture"]["width"], record["picture"]["cached"]) == (157, False)
    assert "difference" not in record


def test_prompts_and_pictures_are_injected_side_by_side_and_a_rerun_has_the_same_key(
    render_i2v: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inject = [{"image": str(LAST), "blocks": "early"}, rule(), {"image": str(PICTURE), "blocks": 39}]
    keys = {"inject": inject, "image": {"first": str(PICTURE), "alpha": "white"}, "measure": True}
    assert render_i2v(**keys).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert record.negative
    assert record.effects
    assert [rule.hits for rule in record.injection] == [42, 39, 3]
    assert [rule.difference is None for rule in record.injection] == [True, False, True]
    assert [rule.picture and rule.picture.cached for rule in record.injection] == [False, None, False]
    cache = ["--cache-dir", tmp_path / "cache"]
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    shot = json.loads(run_wancli(capsys, "plan", path, "--json", *cache).out)["shots"][0]
    assert shot["key"] == record.key
    assert [rule["picture"] and Path(rule["picture"]["path"]).name for rule in shot["inject"]] == [
        "last.png", None, "input.png"
    ]  # fmt: skip
    said = run_wancli(capsys, "plan", tmp_path / "job.yaml", "-v", *cache)
    assert "inject.0  last.png, 157x111, read by CLIP as official" in said.out
    assert "cond 0-2 image  ████" in said.out
    changed = keys | {"inject": [{"image": str(PICTURE), "blocks": "early"}, *inject[1:]]}
    assert "another inject.0.image" in render_i2v(**changed).err
    report = run_wancli(capsys, "report", tmp_path / "out", *cache)
    assert report.code == 0


def test_an_injected_picture_is_read_by_clip_once_ever_and_the_own_one_changes_nothing(
    render_i2v: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_clip_reads(monkeypatch)
    mine = tmp_path / "mine.png"
    shutil.copy(LAST, mine)
    inject = [{"image": str(mine), "blocks": "early"}]
    items = [{"id": "a"}, {"id": "b", "inject": [{"image": str(LAST)}], "seed": 3}]
    assert render_i2v(items=items, inject=inject, output="out/{id}.mp4").code == 0
    assert calls == [1, 1]
    assert manifest_of(tmp_path, "b")["injection"][0]["picture"]["cached"] is True
    shutil.copy(PICTURE, mine)  # as the shot's own, whose rows are known
    said = render_i2v(inject=inject, output="out/c.mp4")
    assert said.code == 0
    assert calls == [1, 1]
    assert "the injected picture is the shot's own; nothing will change" in said.err


@pytest.mark.parametrize("of", ["wan22-i2v-tiny", "wan22-ti2v-tiny"])
def test_models_without_image_tokens_refuse_an_injected_picture(
    of: str, render: Render, tmp_path: Path
) -> None:
    said = render(model=str(assemble(of, tmp_path / of)), inject=[{"image": str(LAST)}])
    assert said.code == 2
    assert "inject.0.image" in said.err
    assert "attend to text alone, not to pictures" in said.err


def test_flf2v_reads_an_injected_picture_in_both_places(render: Render, tmp_path: Path) -> None:
    model = assemble("wan21-flf2v-tiny", tmp_path / "model")
    keys = {"model": str(model), "sampler": EULER | {"steps": 1}, "output": "out/{id}.mp4"}
    twice = {"first": str(PICTURE), "last": str(PICTURE)}
    items = [
        {"id": "plain", "image": twice},
        {"id": "other", "image": {"first": str(PICTURE), "last": str(LAST)}},
        {"id": "same", "image": {**twice}, "inject": [{"image": str(PICTURE), "blend": "replace"}]},
        {"id": "injected", "image": {**twice}, "inject": [{"image": str(LAST), "blend": "replace"}]},
    ]
    assert render(items=items, **keys).code == 0
    assert torch.equal(latents_of(tmp_path, "plain"), latents_of(tmp_path, "same"))
    assert not torch.equal(latents_of(tmp_path, "plain"), latents_of(tmp_path, "injected"))


def test_clip_reads_a_picture_once_ever_and_its_preprocessing_changes_the_video(
    quick_i2v: Path, render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_clip_reads(monkeypatch)
    keys = {"model": str(quick_i2v), "output": "out/{id}.mp4"}
    items = [{"id": "a"}, {"id": "b", "seed": 3}, {"id": "c", "frames": 9}]
    assert render(items=items, **keys).code == 0
    assert calls == [1]
    comfy = {"first": str(PICTURE), "preprocess": "comfy", "fit": "stretch"}
    assert render(items=[{"id": "d", "image": comfy}, {"id": "e", "seed": 4}], **keys).code == 0
    assert calls == [1, 1]
    assert not torch.equal(latents_of(tmp_path, "a"), latents_of(tmp_path, "d"))
    assert manifest_of(tmp_path, "e")["pictures"][0]["cached"] is True


def test_a_model_for_pictures_needs_one(render: Render, tmp_path: Path) -> None:
    model = str(assemble("wan21-i2v-tiny", tmp_path / "model"))
    said = render(model=model, image=None, size="64x64")
    assert said.code == 2
    assert "makes a video from a picture, and the job names none" in said.err


def test_a_picture_is_encoded_once_ever_and_a_hit_loads_no_vae(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = given_frames.encode_picture

    def counted(vae: WanVAE22, picture_CYX: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(vae, picture_CYX)

    monkeypatch.setattr(given_frames, "encode_picture", counted)
    copy = tmp_path / "copy.bmp"
    Image.open(PICTURE).save(copy)
    items = [{"id": "a"}, {"id": "b", "seed": 5}, {"id": "c", "image": str(copy), "prompt": "A fish"}]
    assert render(items=items, output="out/{id}.mp4").code == 0
    assert len(calls) == 1
    assert [manifest_of(tmp_path, id)["pictures"][0]["cached"] for id in "abc"] == [False, True, True]
    assert render(output="out/{id}.mp4", items=[{"id": "d", "seed": 6}]).code == 0
    assert len(calls) == 1
    assert manifest_of(tmp_path, "d")["pictures"][0]["cached"] is True
    assert (
        render(
            output="out/{id}.mp4", items=[{"id": "e", "image": {"first": str(PICTURE), "fit": "pad"}}]
        ).code
        == 0
    )
    assert len(calls) == 2


def picture_entries(cache: Path) -> list[Entry]:
    """The entries of a cache that are made of pictures."""
    store = Store(cache / "embeddings")
    return [entry for entry in store.entries() if picture_stage.read_label(read_entry(entry.path, entry.key))]


THREE: dict[str, Any] = {
    "output": "out/{id}.mp4",
    "items": [
        {"id": "a"},
        {"id": "b", "image": str(LAST), "seed": 2},
        {"id": "c", "image": {"first": str(PICTURE), "preprocess": "comfy"}, "seed": 3},
    ],
}


def test_a_round_encodes_the_pictures_of_the_shots_that_were_claimed_for_it(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    real = picture_stage.encode_frames

    def watched(shots: Any, *rest: Any, **options: Any) -> Any:
        calls.append([shot.id for shot in shots])
        claims = tmp_path / "out/.wancli/claims"
        assert {path.stem for path in claims.glob("*.json")} == {*calls[-1], "b"}
        assert not any((tmp_path / f"out/{shot.id}.mp4").exists() for shot in shots)
        return real(shots, *rest, **options)

    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", watched)
    claim = tmp_path / "out/.wancli/claims/b.json"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"host": "other", "pid": 7, "born": "1", "started": "now", "token": "x"}))
    said = render("--no-wait", **THREE)
    assert said.code == 75, said.err
    assert [shots for shots in calls if shots] == [["a"], ["c"]]
    claim.unlink()
    calls.clear()
    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", real)
    assert render(**THREE).code == 0
    assert len(picture_entries(tmp_path / "cache")) == 3


@pytest.mark.parametrize(("fits", "loads"), [(True, 1), (False, 3)])
def test_clip_is_loaded_for_every_round_only_if_it_does_not_fit_beside_sampling(
    quick_i2v: Path, render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, loads: int
) -> None:
    loads_of: Counter[str] = Counter()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def load(*arguments: Any) -> Any:
            loads_of[real.__name__] += 1
            return real(*arguments)

        return load

    real = loader.load_clip
    for function in (loader.load_clip, loader.load_transformer):
        monkeypatch.setattr(loader, function.__name__, counted(function))
    if not fits:
        monkeypatch.setattr(memory_policy, "headroom", lambda _: 0)
        monkeypatch.setattr(memory_policy, "require", lambda *_, **__: None)
    NETWORKS.clear()
    keys = THREE | {"model": str(quick_i2v), "sampler": {"steps": 1}}
    assert render(**keys).code == 0
    assert loads_of == {"load_clip": loads, "load_transformer": loads}
    predicted = [
        {phase["name"]: phase["model"] for phase in manifest_of(tmp_path, id)["predicted"]} for id in "abc"
    ]
    clip = sum(weight.nbytes for weight in real(identify(quick_i2v), "cpu").parameters())
    a, b, c = predicted
    assert a["sample"] - c["sample"] == (clip if fits else 0)
    assert a["decode"] - c["decode"] == (clip if fits else 0)
    assert b["pictures"] - a["pictures"] == (c["sample"] if fits else 0)


def test_the_disk_space_of_encoded_pictures_is_predicted(
    quick_i2v: Path, render: Render, tmp_path: Path
) -> None:
    keys = THREE | {"model": str(quick_i2v), "sampler": {"steps": 1}}
    shared = {"image": str(PICTURE), "frames": 5, "size": {"area": 4096}}
    path = write_job(tmp_path, tiny_job(quick_i2v) | shared | keys)
    plan = build_plan(load_job(path), tmp_path / "memo.json")
    store = Store(tmp_path / "cache" / "embeddings")
    said = disk_estimate.picture_bytes(plan.shots, store)
    assert render(**keys).code == 0
    written = picture_entries(tmp_path / "cache")
    assert len(written) == 6
    assert 0 <= said - sum(entry.bytes for entry in written) < 6 * 2**16
    assert disk_estimate.picture_bytes(plan.shots, store) == 0


def test_plan_and_cache_name_pictures(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(**OF_CHAIN).code == 0
    cache = ["--cache-dir", tmp_path / "cache"]
    said = run_wancli(capsys, "plan", tmp_path / "job.yaml", "-v", *cache)
    assert "image  input.png, 157x111, crop as official" in said.out
    assert "image  frame 4 of shot a, 64x64, crop as official" in said.out
    shots = json.loads(run_wancli(capsys, "plan", tmp_path / "job.yaml", "--json", *cache).out)["shots"]
    assert [shot["pictures"][0].get("shot") for shot in shots] == ["b", None, "a"]
    texts = [row["text"] for row in json.loads(run_wancli(capsys, "cache", "ls", "--json", *cache).out)]
    assert {"input.png at 64x64", "frame 4 of shot a at 64x64"} <= {*texts}
    assert not any("damaged" in text for text in texts)


def test_another_picture_is_named_as_the_difference_of_an_output(render: Render, tmp_path: Path) -> None:
    assert render().code == 0
    said = render(image={"first": str(PICTURE), "preprocess": "comfy"})
    assert said.code == 2
    assert "made with another image" in said.err
    assert render().code == 0  # the same again is done


def test_a_rerun_of_a_manifest_has_the_same_key(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(image={"first": str(PICTURE), "alpha": "white"}).code == 0
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    said = run_wancli(capsys, "plan", path, "--json", "--cache-dir", tmp_path / "cache")
    assert json.loads(said.out)["shots"][0]["key"] == record.key


def test_without_a_picture_the_same_model_makes_a_video_from_text(render: Render, tmp_path: Path) -> None:
    assert render(image=None, size="64x64").code == 0
    assert manifest_of(tmp_path)["pictures"] == []


# ---- chains ----

CHAIN = [
    {"id": "c", "image": {"shot": "b"}, "seed": 3},
    {"id": "a", "image": str(PICTURE)},
    {"id": "b", "image": {"shot": "a", "frame": "last"}, "seed": 2},
]
OF_CHAIN: dict[str, Any] = {"image": None, "output": "out/{id}.mp4", "items": CHAIN}


def statuses(folder: Path) -> dict[str, str]:
    """What became of the shots by their ids, by the report."""
    report = json.loads((folder / "out/job.report.json").read_text())
    return {shot["id"]: shot["status"] for shot in report["shots"]}


def decoded(path: Path) -> np.ndarray:
    return np.array([np.frombuffer(frame.rgb, np.uint8) for frame in mp4.read_frames(path)])


def test_a_chain_begins_with_the_exact_last_frame_and_is_joined_without_it(
    render: Render, ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = render(**OF_CHAIN, join="out/all.mp4", video=KEPT | {"crf": 4})
    assert said.code == 0, said.err
    assert [Path(line).stem for line in said.out.split()] == ["a", "b", "c"]
    kept = np.asarray(Image.open(tmp_path / "out/a.frame4.png"))
    *_, last = load_vae(identify(ti2v), "cpu").decode(latents_of(tmp_path, "a"))
    assert (kept == np.asarray(mp4.to_rgb24(last))[-1]).all()
    record = manifest_of(tmp_path, "b")["pictures"][0]
    assert record["link"] == {"shot": "a", "frame": 4}
    digest = hashlib.sha256(b"64x64\n" + kept.tobytes()).hexdigest()
    assert (record["pixels_sha256"], record["sha256"] == digest) == (digest, False)
    joined = decoded(tmp_path / "out/all.mp4")
    assert len(joined) == 5 + 4 + 4
    parts = [decoded(tmp_path / f"out/{id}.mp4") for id in "abc"]
    expected = np.concatenate([parts[0], parts[1][1:], parts[2][1:]])
    assert np.abs(joined.astype(int) - expected).mean() < 8
    before = (tmp_path / "out/all.mp4").stat().st_mtime_ns
    assert render(**OF_CHAIN, join="out/all.mp4", video=KEPT | {"crf": 4}).code == 0  # all is done
    assert (tmp_path / "out/all.mp4").stat().st_mtime_ns == before
    same = render(image=str(tmp_path / "out/a.frame4.png"), seed=2, output="out/alone.mp4", size="64x64")
    assert same.code == 0
    assert torch.equal(latents_of(tmp_path, "alone"), latents_of(tmp_path, "b"))
    linked = manifest.read(tmp_path / "out/b.manifest.json")
    assert linked
    command = rerun_command(linked, str(tmp_path / "out/again.mp4"))
    assert '# begins with a frame of shot "a" as a file: the same pixels, under another key' in command
    job = write_job(tmp_path, command.split("<<'JOB'\n")[1].removesuffix("JOB\n"), "again.yaml")
    assert run_wancli(capsys, "render", job, "--set", "video.keep_latents=true").code == 0
    assert torch.equal(latents_of(tmp_path, "again"), latents_of(tmp_path, "b"))


def test_a_failed_link_fails_what_hangs_on_it_and_the_same_command_goes_on_from_there(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = picture_stage.encode_frames

    def broken(shots: Any, *rest: Any, **options: Any) -> Any:
        frames, errors, record = real(shots, *rest, **options)
        for shot in shots:
            if shot.id == "b":
                errors[shot.index] = ErrorCapture()
                errors[shot.index].record(ShotError("is broken", where="shot b"))
        return frames, errors, record

    with monkeypatch.context() as patch:
        patch.setattr("wancli.engine.pipeline.encode_frames", broken)
        said = render(**OF_CHAIN, join="out/all.mp4")
    assert said.code == 1
    assert [Path(line).stem for line in said.out.split()] == ["a"]
    assert "shot c: shot b, which it continues, failed" in said.err
    assert "all.mp4 is not written" in said.err
    said = render(**OF_CHAIN, join="out/all.mp4")
    assert said.code == 0, said.err
    assert [Path(line).stem for line in said.out.split()] == ["a", "b", "c"]
    assert (tmp_path / "out/all.mp4").exists()


def test_shots_that_only_continue_a_failed_one_do_not_count_as_failures(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = picture_stage.encode_frames

    def broken(shots: Any, *rest: Any, **options: Any) -> Any:
        frames, errors, record = real(shots, *rest, **options)
        for shot in (shot for shot in shots if shot.id in "ae"):
            errors[shot.index] = ErrorCapture()
            errors[shot.index].record(ShotError("is broken", where=f"shot {shot.id}"))
        return frames, errors, record

    monkeypatch.setattr("wancli.engine.pipeline.encode_frames", broken)
    first = str(PICTURE)
    chains = [
        {"id": "a", "image": first},
        {"id": "b", "image": {"shot": "a"}},
        {"id": "c", "image": {"shot": "b"}},
        {"id": "d", "image": first, "seed": 2},
        {"id": "e", "image": {"shot": "d"}},
        {"id": "f", "image": {"shot": "d"}, "seed": 5},
    ]
    for limit, not_started in (("3", 0), ("1", 5)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        said = render("--max-failures", limit, **OF_CHAIN | {"items": chains})
        assert said.code == 1
        assert [*statuses(tmp_path).values()].count("not started") == not_started
        assert ("2 of them only because the shot that they continue failed" in said.err) == (limit == "3")


@pytest.mark.parametrize("keeps_latents", [True, False])
def test_a_finished_shot_without_the_kept_frame_is_decoded_or_rendered_again_for_a_shot_that_continues_it(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_latents: bool
) -> None:
    a, b = CHAIN[1], CHAIN[2]
    keys = OF_CHAIN | {"video": {"keep_latents": keeps_latents}, "sampler": {"steps": 2}}
    assert render(**keys | {"items": [a, b]}).code == 0
    expected = np.asarray(Image.open(tmp_path / "out/a.frame4.png"))
    videos = {id: (tmp_path / f"out/{id}.mp4").read_bytes() for id in "ab"}
    kept = tmp_path / "out/a.frame4.png"
    damages: dict[str, Callable[[], object]] = {
        "missing": kept.unlink,
        "no picture": lambda: kept.write_bytes(b"no"),
        "another": lambda: shutil.copy(PICTURE, kept),
    }
    forwards = count_forwards(monkeypatch)
    for number, (id, damage) in enumerate(damages.items()):
        damage()
        shutil.rmtree(tmp_path / "cache")
        forwards.clear()
        said = render(**keys | {"items": [a, b, {"id": id, "image": {"shot": "a"}, "seed": 9 + number}]})
        assert said.code == 0, said.err
        again = "decoded" if keeps_latents else "rendered"
        assert f"shot a is done, and is {again} again: shot {id} begins with a frame of it" in said.err
        assert len(forwards) == 2 * 2 * (1 if keeps_latents else 2)
        assert (np.asarray(Image.open(kept)) == expected).all()
        assert {id: (tmp_path / f"out/{id}.mp4").read_bytes() for id in "ab"} == videos
    kept.unlink()
    assert render(**keys | {"items": [a, b]}).code == 0  # nobody needs the frame
    assert not kept.exists()


def test_a_kept_frame_that_cannot_be_read_fails_the_shot_that_begins_with_it_alone(
    render: Render, tmp_path: Path
) -> None:
    a, b = CHAIN[1], CHAIN[2]
    keys = OF_CHAIN | {"video": {}, "sampler": {"steps": 1}}
    assert render(**keys | {"items": [a]}).code == 0
    kept = tmp_path / "out/a.frame4.png"
    kept.mkdir()
    others = [{"id": "c", "image": {"shot": "b"}}, {"id": "d", "image": str(PICTURE), "seed": 4}]
    said = render(**keys | {"items": [a, b, *others]})
    assert said.code == 3, said.err
    assert f"shot b: {kept}: cannot be read" in said.err
    assert statuses(tmp_path) == {"a": "already done", "b": "failed", "c": "failed", "d": "rendered"}
    kept.rmdir()
    assert render(**keys | {"items": [a, b, *others]}).code == 0
    assert statuses(tmp_path) == {"a": "rendered", "b": "rendered", "c": "rendered", "d": "already done"}


@pytest.mark.parametrize("change", ["damaged latent", "maps wanted"])
def test_a_missing_frame_is_made_for_a_shot_whose_latent_is_not_enough(
    render: Render, tmp_path: Path, change: str
) -> None:
    a, b = CHAIN[1], CHAIN[2]
    keys = OF_CHAIN | {"sampler": {"steps": 1}}
    assert render(**keys | {"items": [a, b]}).code == 0
    (tmp_path / "out/a.frame4.png").unlink()
    shutil.rmtree(tmp_path / "cache")
    if change == "damaged latent":
        latent = tmp_path / "out/b.latents.safetensors"
        latent.write_bytes(latent.read_bytes()[:-8] + bytes(8))
        (tmp_path / "out/b.mp4").unlink()
    else:
        b = b | {"attention": {"words": ["cat"]}}
    said = render(**keys | {"items": [a, b]})
    assert said.code == 0, said.err
    assert "shot a is done, and is decoded again: shot b begins with a frame of it" in said.err
    assert statuses(tmp_path) == {"a": "rendered", "b": "rendered"}


def test_a_shot_in_the_middle_of_a_chain_is_rendered_again_with_those_before_that_it_needs(
    render: Render, tmp_path: Path
) -> None:
    keys = OF_CHAIN | {"video": {}, "sampler": {"steps": 1}}
    assert render(**keys).code == 0
    shutil.rmtree(tmp_path / "cache")
    for id in "ab":
        (tmp_path / f"out/{id}.frame4.png").unlink()
    more = {"id": "d", "image": {"shot": "b"}, "seed": 7}
    said = render("--items", "3", **keys | {"items": [*CHAIN, more]})
    assert said.code == 4, said.err
    assert "Render shot b, too" in said.err
    said = render(**keys | {"items": [*CHAIN, more]})
    assert said.code == 0, said.err
    assert [Path(line).stem for line in said.out.split()] == ["c", "a", "b", "d"]
    assert statuses(tmp_path) == {"a": "rendered", "b": "rendered", "c": "already done", "d": "rendered"}


def test_the_workers_of_ray_refuse_a_chain_before_they_start(render: Render) -> None:
    said = render("--engine", "ray", **OF_CHAIN)
    assert said.code == 2
    assert "continues another one" in said.err


def test_a_job_may_say_which_variant_a_checkpoint_is_and_plan_says_what_decided(
    i2v: Path, render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "transformer": str(i2v / "diffusion_pytorch_model.safetensors"), "text_encoder": str(i2v / T5),
        "vae": str(i2v / VAE), "image_encoder": str(i2v / CLIP.name), "heads": 2,
        "tokenizer": str((i2v / "google").resolve() / "umt5-xxl/spiece.model"), "variant": "wan2.1-i2v-720p",
    }  # fmt: skip
    said = render(model=files, frames=1, negative="fog", sampler={"steps": 1})
    assert said.code == 0, said.err
    record = manifest.read(tmp_path / "out/clip.manifest.json")
    assert record
    assert (record.model.variant, record.shot.shift) == ("Wan2.1-I2V-720P", 3.0)
    assert checkpoint_location(record.model) == SingleFiles(
        **{key: Path(value) for key, value in files.items() if key not in ("heads", "variant")},
        heads=2,
        variant="wan2.1-i2v-720p",
    )
    cache = ["--cache-dir", tmp_path / "cache"]
    said = run_wancli(capsys, "plan", tmp_path / "job.yaml", *cache)
    assert "variant: Wan2.1-I2V-720P, the job says so" in said.out
    path = write_job(tmp_path, build_job(record, "again.mp4"), "again.yaml")
    document = json.loads(run_wancli(capsys, "plan", path, "--json", *cache).out)
    assert document["shots"][0]["key"] == record.key
    assert document["models"][0]["variant_reason"] == "the job says so"
    said = render(model=files | {"variant": "FLF2V"})
    assert said.code == 2
    assert "are not those of 'FLF2V'" in said.err
    assert "Wan2.1-I2V-480P or Wan2.1-I2V-720P" in said.err


@torch.inference_mode()
def change_by_hand(case: Case, blocks: range) -> float:
    """How much the velocity of the first step changes if some blocks read the injected prompt."""
    of, model = numbers(case.set), load(FIXTURES / case.set)
    if case.has("z_image"):
        given = GivenFrames(first_CTYX=case["z_image"])
    else:
        given = GivenFrames(torch.cat((case["mask"], case["y"])))
    x, t = given.put_into(case["noise"])[None], float(case["timesteps"][0])
    images = ((model.project_image(case.clip_rows), 1.0),) if case.clip else ()
    main, other = (((model.project(of[f"context.{name}"]), 1.0), *images) for name in ("main", "injection"))
    plain = model(x, t, [main] * 40, given)
    changed = model(x, t, [other if block in blocks else main for block in range(40)], given)
    return float((changed - plain).norm() / plain.norm())


@pytest.mark.parametrize(
    ("of", "name"), [("wan22-ti2v-tiny", "image_unipc_cfg1"), ("wan21-i2v-tiny", "dpmpp_cfg5")]
)
def test_a_probe_measures_the_text_of_a_shot_with_a_picture(
    of: str, name: str, render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = assemble(of, tmp_path / "model")
    prompt = json.loads((FIXTURES / of / "reference.json").read_text())["prompts"]["injection"]
    inject = [{"prompt": prompt}]
    if of == "wan21-i2v-tiny":  # the first rule that injects a prompt is measured
        inject.insert(0, {"image": str(LAST)})
    path = write_job(tmp_path, tiny_job(model) | case_keys(of, name) | {"inject": inject})
    options = ("--levels", "1", "--ranges", "2", "--cache-dir", tmp_path / "cache")
    said = run_wancli(capsys, "probe", path, "--json", *options)
    assert said.code == 0, said.err
    (case,) = (case for case in cases(of) if case.name == name)
    expected = [change_by_hand(case, range(start, start + 20)) for start in (0, 20)]
    assert json.loads(said.out)["total"] == pytest.approx(expected, rel=1e-3)
    said = run_wancli(capsys, "probe", path, "--json", "--method", "gradient", *options)
    if of == "wan22-ti2v-tiny":
        assert said.code == 2
        assert "gradient is not available with a given first frame in place of noise" in said.err
    else:
        assert said.code == 0, said.err
        assert all(value > 0 for value in json.loads(said.out)["total"])


def test_a_probe_of_a_shot_that_continues_another_is_refused(
    ti2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inject = [rule(blocks="late")]
    items = [{"id": "a", "image": str(PICTURE)}, {"id": "b", "image": {"shot": "a"}, "inject": inject}]
    path = write_job(tmp_path, tiny_job(ti2v, size="64x64", items=items, output="out/{id}.mp4"))
    said = run_wancli(capsys, "probe", path, "--cache-dir", tmp_path / "cache")
    assert said.code == 2
    assert "shot b continues shot a; a probe measures one shot alone" in said.err
