"""PSNR, SSIM, motion, heat-map and the distance of latents, against arithmetic, scikit-image and ffmpeg."""

from __future__ import annotations

import base64
import math
import re
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from wancli.video import clip, metrics, mp4

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
Y, X = np.mgrid[0:40, 0:56]
SLOPES = (Y * 7 + X * 5) % 256
FLAT = np.full_like(SLOPES, 200)


def grey(values_YX: Any) -> Any:
    return np.repeat(np.asarray(values_YX, np.uint8)[..., None], 3, axis=2)


def noise(seed: int, shape: tuple[int, ...] = (40, 56, 3)) -> Any:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


# ---- PSNR and SSIM ----


@pytest.mark.parametrize(
    ("a_YX", "b_YX", "expected"),
    [
        # scikit-image 0.26.0, structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
        # use_sample_covariance=False, data_range=255) of float64
        (SLOPES, (SLOPES + (X * Y) % 23) % 256, 0.700591260483908),
        (SLOPES, np.clip(SLOPES + 10, 0, 255), 0.9924950903209698),
        (FLAT, FLAT + X % 2, 0.9957432063192482),
        (SLOPES, 255 - SLOPES, -0.5022573136259688),
    ],
    ids=["texture", "brighter", "nearly flat", "inverted"],
)
def test_ssim_is_that_of_scikit_image(a_YX: Any, b_YX: Any, expected: float) -> None:
    found = metrics.ssim(a_YX.astype(np.float32), b_YX.astype(np.float32))
    assert found == pytest.approx(expected, abs=1e-5)


def test_ssim_is_the_formula_of_the_paper_written_as_loops() -> None:
    a_YX, b_YX = (metrics.to_luma(noise(seed, (14, 13, 3))).astype(np.float64) for seed in (1, 2))
    window = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weights = np.outer(window, window) / sum(window) ** 2
    found = []
    for top in range(4):
        for left in range(3):
            a, b = (x[top : top + 11, left : left + 11] for x in (a_YX, b_YX))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
            found.append(light * (2 * both + 58.5225) / (var_a + var_b + 58.5225))
    assert metrics.ssim(a_YX.astype(np.float32), b_YX.astype(np.float32)) == pytest.approx(
        np.mean(found), abs=1e-6
    )


def test_ten_levels_brighter_is_28_decibels_and_a_flat_map() -> None:
    like = metrics.compare_frames([(grey(FLAT), grey(FLAT + 10))] * 3)
    assert like.psnr == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert (like.frames, like.identical) == (3, False)
    assert like.heatmap_YX == pytest.approx(10 / 255)


def test_psnr_is_that_of_all_squares_not_the_mean_of_the_frames() -> None:
    like = metrics.compare_frames([(grey(FLAT), grey(FLAT)), (grey(FLAT), grey(FLAT + 20))])
    assert like.psnr == pytest.approx(10 * math.log10(255**2 / 200), abs=1e-4)
    assert not like.identical


def test_psnr_inside_and_outside_of_an_area_are_of_the_pixels_there() -> None:
    """The left quarter differs by 10 in the first frame, the rest by 1 in both."""
    a_YX3, b_YX3 = grey(FLAT), grey(FLAT + 1)
    quarter = FLAT.shape[1] // 4
    other_YX3 = b_YX3.copy()
    other_YX3[:, :quarter] = a_YX3[:, :quarter] + 10
    is_left_YX = np.zeros(FLAT.shape[:2], bool)
    is_left_YX[:, :quarter] = True
    like = metrics.compare_frames(
        [(a_YX3, other_YX3), (a_YX3, b_YX3)], lambda frame: is_left_YX & (frame == 0)
    )
    assert like.psnr_inside == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert like.psnr_outside == pytest.approx(20 * math.log10(255), abs=1e-3)


def test_the_same_pictures_have_no_psnr_and_are_identical() -> None:
    like = metrics.compare_frames([(noise(1), noise(1))])
    assert (like.identical, like.psnr, like.ssim) == (True, None, pytest.approx(1))
    assert not like.heatmap_YX.any()


def test_a_picture_smaller_than_the_window_has_no_ssim() -> None:
    like = metrics.compare_frames([(noise(1, (10, 40, 3)), noise(2, (10, 40, 3)))])
    assert like.ssim is None
    assert like.psnr is not None


def test_a_comparison_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        metrics.compare_frames([])


def test_luma_is_that_of_bt709() -> None:
    picture = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert metrics.to_luma(picture)[0] == pytest.approx([54.213, 182.376, 18.411, 255], abs=1e-3)


# ---- against ffmpeg ----


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A test picture that moves, and the same coded so that one sees it."""
    folder = tmp_path_factory.mktemp("videos")
    paths = folder / "fine.mp4", folder / "coarse.mp4"
    for path, crf in zip(paths, ("5", "38")):
        source = ["-f", "lavfi", "-i", "testsrc2=size=128x96:rate=16", "-frames:v", "9"]
        tagged = ["-vf", "scale=out_color_matrix=bt709,setparams=colorspace=bt709:range=tv"]
        coded = ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-colorspace", "bt709", "-crf", crf]
        subprocess.run([FFMPEG, "-v", "error", *source, *tagged, *coded, path], check=True)
    return paths


@pytest.fixture(scope="module")
def judged(two: tuple[Path, Path]) -> Callable[[str], str]:
    def said(name: str) -> str:
        grey = "format=gray,scale=out_range=pc"
        graph = f"[0:v]{grey}[a];[1:v]{grey}[b];[a][b]{name}"
        inputs = [part for path in two for part in ("-i", path)]
        run = subprocess.run(
            [FFMPEG, "-hide_banner", *inputs, "-lavfi", graph, "-f", "null", "-"],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stderr

    return said


def test_psnr_of_videos_is_that_of_ffmpeg(two: tuple[Path, Path], judged: Callable[[str], str]) -> None:
    a, b = clip.read_clips(two)
    expected = re.search(r"PSNR.* average:([\d.]+)", judged("psnr"))
    assert expected
    found = metrics.compare_frames(zip(a.read_pictures(), b.read_pictures())).psnr
    # colours go through 8-bit RGB and back to luma here, and do not there
    assert found == pytest.approx(float(expected[1]), abs=0.3)


def test_ssim_of_videos_is_near_that_of_ffmpeg_which_has_blocks_of_8(
    two: tuple[Path, Path], judged: Callable[[str], str]
) -> None:
    a, b = clip.read_clips(two)
    expected = re.search(r"SSIM.* All:([\d.]+)", judged("ssim"))
    assert expected
    assert metrics.compare_frames(zip(a.read_pictures(), b.read_pictures())).ssim == pytest.approx(
        float(expected[1]), abs=0.03
    )


def test_a_video_one_frame_late_is_less_like_than_the_video_itself(two: tuple[Path, Path]) -> None:
    pictures = list(clip.read_clips(two)[0].read_pictures())
    late = metrics.compare_frames(pairwise(pictures))
    assert late.frames == 8
    assert late.psnr is not None
    assert late.psnr < 30
    assert not late.identical


# ---- motion and the map ----


def test_motion_is_the_mean_change_from_frame_to_frame() -> None:
    frames = [grey(FLAT), grey(FLAT + 10), grey(FLAT - 20), grey(FLAT - 20)]
    assert metrics.measure_motion(frames) == pytest.approx((10 + 30 + 0) / 3 / 255, rel=1e-4)


def test_a_single_frame_has_no_motion() -> None:
    assert metrics.measure_motion([noise(1)]) is None


def test_the_map_shows_where_colours_differ_even_where_luma_does_not() -> None:
    a_YX3 = grey(FLAT)
    b_YX3 = a_YX3.copy()
    b_YX3[:20, :28, 2] = 100  # blue, in the upper left quarter
    heat_YX = metrics.compare_frames([(a_YX3, b_YX3)]).heatmap_YX
    assert heat_YX.shape == (20, 28)
    assert heat_YX[:10, :14] == pytest.approx(100 / 3 / 255, abs=1e-5)
    assert not heat_YX[10:].any()
    assert not heat_YX[:, 14:].any()


@pytest.mark.parametrize("shape", [(3, 70), (45, 31), (97, 833), (1, 1)])
def test_squares_of_a_map_keep_its_mean_and_at_most_32_columns(shape: tuple[int, int]) -> None:
    map_YX = np.random.RandomState(3).rand(*shape).astype(np.float32)
    small_YX = metrics.average_cells(map_YX, 32)
    step = -(-shape[1] // 32)
    assert small_YX.shape == (-(-shape[0] // step), -(-shape[1] // step))
    assert small_YX.shape[1] <= 32
    assert small_YX[0, 0] == pytest.approx(map_YX[:step, :step].mean(), rel=1e-5)
    assert small_YX[-1, -1] == pytest.approx(
        map_YX[(shape[0] - 1) // step * step :, (shape[1] - 1) // step * step :].mean(), rel=1e-5
    )


# ---- latents ----


def latent(seed: int, shape: tuple[int, ...] = (16, 3, 8, 10)) -> Any:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def test_the_distance_of_latents_is_relative_to_the_baseline() -> None:
    z = latent(1)
    assert metrics.relative_distance(3 * z, z) == pytest.approx(2)
    assert metrics.relative_distance(z, z) == 0
    assert metrics.relative_distance(z, 0 * z) is None


def test_sketches_estimate_the_distance_to_a_few_percent() -> None:
    z = latent(0)
    errors = []
    for seed in range(1, 41):
        other = z + 0.1 * seed * latent(seed)
        exact = metrics.relative_distance(other, z)
        assert exact is not None
        found = metrics.sketched_relative_distance(metrics.sketch_latent(other), metrics.sketch_latent(z))
        assert found is not None
        errors.append(found / exact - 1)
    assert np.std(errors) == pytest.approx(1 / math.sqrt(2 * metrics.SKETCH_SIZE), rel=0.4)
    assert max(map(abs, errors)) < 4 / math.sqrt(2 * metrics.SKETCH_SIZE)


def test_a_change_that_is_the_same_everywhere_is_seen_too() -> None:
    z = latent(1)
    for change in (np.ones_like(z), np.arange(z.size).reshape(z.shape) % 256 == 7):
        exact = metrics.relative_distance(z + change, z)
        found = metrics.sketched_relative_distance(
            metrics.sketch_latent(z + change.astype(np.float32)), metrics.sketch_latent(z)
        )
        assert found == pytest.approx(exact, rel=0.2)


def test_a_sketch_never_changes_because_manifests_keep_it() -> None:
    found = metrics.sketch_latent(np.arange(6, dtype=np.float32).reshape(2, 3))
    values = np.frombuffer(base64.b64decode(found["sketch"]), "<f4")
    assert (found["shape"], found["norm"]) == ([2, 3], pytest.approx(math.sqrt(55)))
    assert [abs(v) for v in values[:7]] == [0, 1, 2, 3, 4, 5, 0]
    # the first byte of numpy's RandomState(0) is 44 = 0b00101100
    assert [math.copysign(1, v) for v in values[1:6]] == [-1, 1, -1, 1, 1]


def test_frames_come_one_by_one(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    real = mp4.read_frames

    def counted(path: Path) -> Any:
        for number, frame in enumerate(real(path)):
            alive.append(number)
            yield frame

    monkeypatch.setattr(mp4, "read_frames", counted)
    a, b = clip.read_clips(two)
    pairs = zip(a.read_pictures(), b.read_pictures())
    next(pairs)
    assert alive == [0, 0]
