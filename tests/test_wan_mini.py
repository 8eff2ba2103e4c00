"""The model inside the package, from the command line to the pixels of the MP4s."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from jobs import manifest_of, run_wancli, write_job

from wancli import wan_mini
from wancli.injection import block_map
from wancli.models.variants import MINI
from wancli.probe.renders import mean_difference
from wancli.video import mp4
from wancli.weights.checkpoint import identify

RED = "A red circle drifts to the left across dark stripes."
BLUE = "A blue square moves up in front of a white background."


def shares(path: Path) -> dict[str, float]:
    """How much of all frames is plainly red, plainly blue, and nearly white."""
    frames = [np.frombuffer(frame.rgb, np.uint8).reshape(-1, 3) for frame in mp4.read_frames(path)]
    r, g, b = np.concatenate(frames).T
    found = {
        "red": (r > 150) & (g < 100) & (b < 100),
        "blue": (b > 150) & (r < 100),
        "white": (r > 215) & (g > 215) & (b > 215),
    }
    return {name: float(of_pixels.mean()) for name, of_pixels in found.items()}


def count_pixels(path: Path) -> dict[str, list[int]]:
    """How many pixels of each frame are plainly red or blue, in its left and its right half."""
    frames = mp4.read_frames(path)
    rgb = [np.frombuffer(frame.rgb, np.uint8).reshape(frame.height, frame.width, 3) for frame in frames]
    r, g, b = np.moveaxis(np.stack(rgb).astype(int), 3, 0)
    middle = r.shape[2] // 2
    halves = {"left": slice(middle), "right": slice(middle, None)}
    colours = {"red": (r > 150) & (g < 110) & (b < 110), "blue": (b > 150) & (r < 110)}
    return {
        f"{colour} {side}": pixels[:, :, half].sum((1, 2)).tolist()
        for colour, pixels in colours.items()
        for side, half in halves.items()
    }


def test_the_weights_are_a_wan_of_40_blocks_in_16_mib() -> None:
    sizes = identify(wan_mini.FOLDER).transformer_config
    assert (sizes.num_layers, sizes.in_dim, sizes.text_len) == (40, 16, 512)
    assert sum(path.stat().st_size for path in wan_mini.FOLDER.rglob("*") if path.is_file()) <= 16 * 2**20
    assert (wan_mini.FOLDER / "README.md").exists()


def test_a_prompt_is_rendered_in_its_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_wancli(capsys, "render", "--prompt", RED, "-o", "out.mp4", "--cache-dir", tmp_path / "cache")
    assert said.code == 0
    assert said.out.strip() == str(tmp_path / "out.mp4")
    found = shares(tmp_path / "out.mp4")
    assert found["red"] > 0.04
    assert found["blue"] == 0
    assert found["white"] < 0.05
    assert len(list(mp4.read_frames(tmp_path / "out.mp4"))) == MINI.frames
    # A name is made of the prompt where none is given, and what is done is not rendered again.
    quick = ("--set", "sampler.steps=1", "--cache-dir", tmp_path / "cache")
    assert run_wancli(capsys, "render", "--prompt", RED, *quick).code == 0
    assert list(tmp_path.glob("a-red-circle-drifts-to-the-left*.mp4"))
    again = run_wancli(capsys, "render", "--prompt", RED, "-o", "out.mp4", "--cache-dir", tmp_path / "cache")
    assert "1 already done" in again.err


def test_a_colour_injected_into_the_right_half_is_that_of_the_circle_after_it_crosses_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blue = {"prompt": "A blue circle moves right on a white background.", "region": [0.5, 0, 1, 1]}
    job = {
        "output": "out/{id}.mp4",
        "prompt": "A red circle moves right on a white background.",
        "sampler": {"steps": 12},
        "items": [{"id": "plain"}, {"id": "crossing", "inject": [blue]}],
    }
    assert run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache").code == 0
    plain, crossing = (count_pixels(tmp_path / f"out/{id}.mp4") for id in ("plain", "crossing"))
    assert min(plain["red left"][0], plain["red right"][-1]) > 300  # it moves from left to right
    assert max(plain["blue left"] + plain["blue right"]) == 0
    assert crossing["red left"][0] > 300
    assert crossing["blue right"][-1] > 300
    assert max(crossing["blue left"] + crossing["red right"]) < 30


def test_the_injected_prompt_wins_where_all_blocks_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {
        "output": "out/{id}.mp4",
        "prompt": RED,
        "sampler": {"steps": 10},
        "items": [{"id": "main"}, {"id": "all", "inject": [{"prompt": BLUE}]}],
    }
    assert run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache").code == 0
    main, injected = shares(tmp_path / "out/main.mp4"), shares(tmp_path / "out/all.mp4")
    assert main["red"] > 0.04
    assert main["blue"] == 0
    assert injected["blue"] > 0.04
    assert injected["red"] == 0
    assert injected["white"] > 0.5 > main["white"]


def test_a_list_of_prompts_changes_the_background_at_the_frame_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Frame 5 begins a latent frame, in which the picture turns; the VAE spreads that over a frame."""
    prompts = [f"A red circle drifts to the left on a {colour} background." for colour in ("black", "white")]
    segments = [{"text": prompts[0], "frames": "0-4"}, {"text": prompts[1], "frames": "5-8"}]
    said = {"output": "out/clip.mp4", "seed": 2, "sampler": {"steps": 8, "guidance": 13}}
    path = write_job(tmp_path, said | {"prompt": segments})
    assert run_wancli(capsys, "render", path, "--cache-dir", tmp_path / "cache").code == 0
    frames = mp4.read_frames(tmp_path / "out/clip.mp4")
    greys = [float(np.median(np.frombuffer(frame.rgb, np.uint8))) for frame in frames]
    assert max(greys[:5]) < 30
    assert min(greys[6:]) > 200


def test_one_seed_gives_one_file_and_another_seed_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        job = {"output": "out/clip.mp4", "prompt": RED, "seed": seed, "sampler": {"steps": 2}}
        path = write_job(tmp_path / name, job)
        assert run_wancli(capsys, "render", path, "--cache-dir", tmp_path / "cache").code == 0
    a, b, c = ((tmp_path / name / "out/clip.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(("frames", "size"), [(9, "64x64"), (17, "64x64"), (9, "96x64")])
def test_lengths_and_sizes_keep_the_colour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: int, size: str
) -> None:
    job = {"output": "out/clip.mp4", "prompt": BLUE, "frames": frames, "size": size, "sampler": {"steps": 8}}
    assert run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache").code == 0
    pictures = list(mp4.read_frames(tmp_path / "out/clip.mp4"))
    assert len(pictures) == frames
    assert f"{pictures[0].width}x{pictures[0].height}" == size
    found = shares(tmp_path / "out/clip.mp4")
    assert found["blue"] > 0.03
    assert found["red"] == 0


def test_a_job_without_a_model_takes_the_embedded_one_with_its_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"output": "out/clip.mp4", "prompt": RED, "sampler": {"steps": 2}}
    assert run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache").code == 0
    body = manifest_of(tmp_path)
    assert body["model"]["root"] == str(wan_mini.FOLDER)
    shot = body["shot"]
    assert (shot["width"], shot["height"], shot["frames"]) == (MINI.width, MINI.height, MINI.frames)


def test_unknown_words_are_named_with_a_hint_and_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"output": "out/clip.mp4", "prompt": "A $tabby cat walks to the left.", "sampler": {"steps": 2}}
    said = run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache")
    assert said.code == 0
    assert "tabby, cat, walks? wan-mini knows a red, green, blue or yellow circle" in said.err
    assert "tabby" not in run_wancli(capsys, "plan", write_job(tmp_path, job | {"prompt": RED})).err


def test_prompts_that_mean_the_same_differ_less_than_prompts_that_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def percent(a: str, b: str) -> float:
        said = run_wancli(capsys, "diff", a, b, "--json", "--cache-dir", tmp_path / "cache")
        assert said.code == 0
        return float(json.loads(said.out)["verdict"]["percent"])

    same = percent("A red circle moves to the left.", "A crimson disc drifts leftwards.")
    assert same < 50 < percent("A red circle moves to the left.", BLUE)
    shown = run_wancli(capsys, "diff", RED, BLUE, "--cache-dir", tmp_path / "cache")
    assert "use its own UMT5: --model DIR" in shown.out


def test_a_job_and_a_prompt_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["job.yaml", "--prompt", RED], ["job.yaml", "--image", "x.png"], ["-o", "x.mp4"]):
        said = run_wancli(capsys, "render", *arguments)
        assert said.code == 2
        assert "give a job file, or --prompt" in said.err


def test_a_block_map_is_stable_its_gradient_agrees_and_its_top_moves_more_than_its_bottom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One noise level; `python -m scripts.bench.probe` measures three, with more seeds and prompts."""
    cache = ("--cache-dir", tmp_path / "cache")
    job = {"output": "out/{id}.mp4", "prompt": RED, "inject": [{"prompt": BLUE}], "sampler": {"steps": 6}}

    def probed(seed: int, method: str) -> list[float]:
        options = ("--method", method, "--levels", "1", "--set", f"seed={seed}", "--json", "-q")
        said = run_wancli(capsys, "probe", write_job(tmp_path, job), *options, *cache)
        assert said.code == 0
        return list(json.loads(said.out)["total"])

    one, other, gradient = probed(1, "inject"), probed(2, "inject"), probed(2, "gradient")
    assert statistics.correlation(one, other) > 0.8
    places = [[block_map.rank(total).index(block) for block in range(40)] for total in (other, gradient)]
    assert statistics.correlation(*places) > 0.7
    items = [
        {"id": "plain", "inject": []},
        *({"id": end, "inject": [{"prompt": BLUE, "blocks": f"auto:{end}10"}]} for end in ("top", "bottom")),
    ]
    path = write_job(tmp_path, job | {"seed": 2, "items": items}, "quarters.yaml")
    assert run_wancli(capsys, "render", path, *cache).code == 0
    plain, top, bottom = (tmp_path / "out" / f"{name}.mp4" for name in ("plain", "top", "bottom"))
    assert mean_difference(top, plain) > mean_difference(bottom, plain)


def test_words_of_a_background_leave_the_shape_and_a_negative_colour_leaves_the_background(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = "A red circle moves right on a white background."
    other = "A blue square moves up on a black background."
    words = {"prompt": other, "words": "a black background.", "blend": "output-mix"}
    nag = {"prompt": "red", "blend": "nag", "scale": 20.0, "alpha": 0.5, "tau": 4.0}
    job = {
        "output": "out/{id}.mp4",
        "frames": 9,
        "sampler": {"steps": 8},
        "items": [
            {"id": "words", "prompt": red, "inject": [words]},
            {"id": "unguided", "prompt": red.replace("red ", ""), "sampler": {"guidance": 1}},
            {"id": "nag", "prompt": red.replace("red ", ""), "sampler": {"guidance": 1}, "inject": [nag]},
        ],
    }
    assert run_wancli(capsys, "render", write_job(tmp_path, job), "--cache-dir", tmp_path / "cache").code == 0
    found = {id: shares(tmp_path / f"out/{id}.mp4") for id in ("words", "unguided", "nag")}
    assert found["words"]["white"] < 0.05
    assert found["words"]["red"] > 0.04
    assert found["words"]["blue"] == 0
    assert found["unguided"]["red"] > 0.04
    assert found["nag"]["red"] < found["unguided"]["red"] / 4
    assert found["nag"]["white"] > 0.8
