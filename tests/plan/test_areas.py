"""`frames`, `during`, `region`, `mask` and `feather` of a rule become the area where it acts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from jobs import rule, run_wancli, tiny_job, write_job
from PIL import Image

from wancli.errors import JobError
from wancli.injection.area import Area, TokenGrid, compute_weights
from wancli.job.loader import load
from wancli.plan import planner as planning
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.video.mp4 import write_mp4

FRAMES = 13  # of 64x64: latent frames of 4 x 4 tokens


@pytest.fixture
def decide(tmp_path: Path, warm: Path) -> Callable[..., Plan]:
    """A job of one shot whose only rule has these keys, planned."""

    def decided(*, video: Any = None, **keys: Any) -> Plan:
        job = tiny_job(frames=FRAMES, inject=[rule(**keys)], video=video or {})
        return planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json")

    return decided


@pytest.fixture
def area(decide: Callable[..., Plan]) -> Callable[..., Area | None]:
    return lambda **keys: decide(**keys).shots[0].rules[0].area


@pytest.fixture
def problem(decide: Callable[..., Plan]) -> Callable[..., str]:
    def found(**keys: Any) -> str:
        with pytest.raises(JobError) as caught:
            decide(**keys)
        return f"{str(caught.value).partition('job.yaml')[2]} | {caught.value.hint}"

    return found


def save_mask(path: Path, grey_YX: numpy.ndarray) -> str:
    Image.fromarray(grey_YX.astype(numpy.uint8)).save(path)
    return path.name


def save_video(path: Path, greys: list[numpy.ndarray]) -> str:
    frames = [numpy.repeat(grey.astype(numpy.uint8)[:, :, None], 3, 2).tobytes() for grey in greys]
    height, width = greys[0].shape
    write_mp4(frames, path, width=width, height=height, fps=25, frame_count=len(frames), crf=10, codec="h264",
              comment="a mask")  # fmt: skip
    return path.name


@pytest.mark.parametrize(
    ("keys", "frames"),
    [
        ({"frames": "0-4"}, (0, 4)),
        ({"frames": 7}, (7, 7)),
        ({"frames": "8-end"}, (8, 12)),
        ({"frames": "0-50%"}, (0, 6)),  # 6/13 < 0.5 <= 7/13
        ({"frames": "50-100%"}, (7, 12)),
        ({"during": "0.25s-0.5s"}, (4, 7)),  # at 16 frames a second
        ({"during": "0.5s-end"}, (8, 12)),
        ({"during": "0.5-0.8125s"}, (8, 12)),
        ({"during": "0.5s-end", "video": {"fps": "24000/1001"}}, (12, 12)),
    ],
)
def test_frames_are_counted_in_numbers_in_shares_or_in_seconds(
    area: Callable[..., Area | None], keys: dict[str, Any], frames: tuple[int, int]
) -> None:
    assert area(**keys) == Area(frames=frames)


WHOLE: list[dict[str, Any]] = [
    {},
    {"frames": "0-12"},
    {"frames": "0-100%"},
    {"during": "0s-end"},
    {"region": [0, 0, 1, 1]},
    {"region": [0, 0, 1, 1], "feather": 0.2},
    {"mask": "white.png"},
]


def test_an_area_of_the_whole_video_is_none(decide: Callable[..., Plan], tmp_path: Path) -> None:
    save_mask(tmp_path / "white.png", numpy.full((5, 7), 255))
    shots = [decide(**keys).shots[0] for keys in WHOLE]
    assert [shot.rules[0].area for shot in shots] == [None] * len(WHOLE)
    assert len({shot.key for shot in shots}) == 1


def test_every_part_of_an_area_changes_the_key_and_the_path_of_a_mask_does_not(
    decide: Callable[..., Plan], tmp_path: Path
) -> None:
    half = numpy.zeros((64, 64))
    half[:, :32] = 255
    save_mask(tmp_path / "a.png", half)
    save_mask(tmp_path / "b.png", half)
    save_mask(tmp_path / "c.png", half.T)
    areas: list[dict[str, Any]] = [
        {},
        {"frames": "0-4"},
        {"region": [0, 0, 0.5, 1]},
        {"region": [0, 0, 0.5, 1], "frames": "0-4"},
        {"region": [0, 0, 0.5, 1], "feather": 0.1},
        {"mask": "a.png"},
        {"mask": "a.png", "feather": 0.1},
        {"mask": "a.png", "frames": "0-4"},
        {"mask": "c.png"},
    ]
    keys = [decide(**one).shots[0].key for one in areas]
    assert len({*keys}) == len(areas)
    assert decide(mask="b.png").shots[0].key == keys[5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frames": "0-13"}, "frames: 13 is past the last frame (12)"),
        ({"frames": "9-4"}, "frames: '9-4' is empty"),
        ({"frames": "half"}, "frames: 'half' is not a range of frames; write 0-40, 8, 40-end or 0-50%"),
        ({"frames": "50-50%"}, "frames: '50-50%' is not a range of the frames"),
        ({"frames": "1-2%"}, "frames: no frame begins in '1-2%'; the nearest, 0, begins at 0 %"),
        ({"during": "0.3-0.31s"},
         "during: no frame begins in '0.3-0.31s'; the nearest, 5, begins at 0.3125 s"),
        ({"during": "0.5s-2s"}, "during: 2 s is past the end of the video (0.8125 s)"),
        ({"during": "0.5s-0.25s"}, "during: '0.5s-0.25s' is empty"),
        ({"during": "soon"}, "during: 'soon' is not a time in the video; write 1s-3s or 2.5s-end"),
        ({"frames": 3, "during": "0s-0.2s"}, "during: has both `frames` and `during`"),
        ({"region": [0.5, 0, 0.5, 1]}, "region: is 0 wide: from 0.5 to 0.5"),
        ({"region": [0, 0.75, 1, 0.25]}, "region: is -0.5 high: from 0.75 to 0.25"),
        ({"region": [0, 0, 1.5, 1]}, "region.2: should be less than or equal to 1, got 1.5"),
        ({"region": [0, 0, 1]}, "region: expected at least 4 values, got 3"),
        ({"region": [0.9, 0.9, 0.9 + 1e-14, 1]},
         "region: reaches no token | The nearest token is [0.75, 0.75, 1, 1]"),
        ({"region": [0, 0, 1, 1], "mask": "m.png"}, "region: has both `region` and `mask`"),
        ({"feather": 0.1}, "feather: softens the edge of `region` or `mask`, and the rule has neither"),
        ({"mask": "m.png"}, "mask: 'm.png' cannot be read: No such file"),
        ({"mask": "."}, "mask: '.' is a folder | A mask is a picture, or an MP4."),
        ({"mask": "job.yaml"}, "mask: 'job.yaml' is not a picture, or a damaged one"),
        ({"mask": "black.png"}, "mask: reaches no token: the mask is black | White is where the rule acts."),
        ({"mask": "short.mp4"},
         "mask: 'short.mp4' has 9 frames, and the video has 13 | Its frames are those of"),
        ({"mask": "late.mp4", "frames": "1-2"},
         "mask: reaches no token: the mask is black in frames 1-2 | The nearest frame where it is not: 9."),
    ],
)  # fmt: skip
def test_one_message_says_what_is_wrong_with_an_area(
    problem: Callable[..., str], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    black, white = numpy.zeros((64, 64)), numpy.full((64, 64), 255)
    save_mask(tmp_path / "black.png", black)
    if "mp4" in str(keys.get("mask")):
        save_video(tmp_path / "short.mp4", [white] * 9)
        save_video(tmp_path / "late.mp4", [black] * 9 + [white] * 4)
    line, _, text = problem(**keys).partition(": inject.0.")
    assert line.startswith(":")
    assert text.startswith(message), text


def test_a_mask_is_averaged_over_the_pixels_of_each_token(
    area: Callable[..., Area | None], tmp_path: Path
) -> None:
    rng = numpy.random.default_rng(0)
    blocks = rng.integers(0, 2, (8, 8)) * 255  # each a quarter of a token
    save_mask(tmp_path / "mask.png", blocks.repeat(3, 0).repeat(5, 1))  # of another size and aspect
    found = area(mask="mask.png", frames="2-12")
    assert found
    spatial_YX = (blocks / 255).reshape(4, 2, 4, 2).mean((1, 3))
    expected = numpy.array([0, 3 / 4, 1, 1])[:, None, None] * spatial_YX
    numpy.testing.assert_allclose(compute_weights(found, TokenGrid(4, 4, 4)), expected, atol=1e-9)


def test_a_mask_video_moves_with_the_video(area: Callable[..., Area | None], tmp_path: Path) -> None:
    """Column 16 i of 64 is white in frame i; frame 13 and later are not read."""
    greys = []
    for i in range(16):
        grey = numpy.zeros((64, 64))
        grey[:, 16 * (i % 4) : 16 * (i % 4) + 16] = 255
        greys.append(grey)
    save_video(tmp_path / "mask.mp4", greys)
    found = area(mask="mask.mp4", frames="0-2")
    assert found
    expected = numpy.zeros((4, 4, 4))
    expected[0, :, 0] = 1
    expected[1, :, 1] = expected[1, :, 2] = 1 / 4
    numpy.testing.assert_allclose(compute_weights(found, TokenGrid(4, 4, 4)), expected, atol=0.02)


def test_a_mask_is_read_once_for_many_shots(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wancli.plan import areas

    calls = []
    real = areas.read_pixels
    monkeypatch.setattr(areas, "read_pixels", lambda *args: (calls.append(args), real(*args))[1])
    save_mask(tmp_path / "mask.png", numpy.eye(64) * 255)
    job = tiny_job(output="{id}.mp4", inject=[rule(mask="mask.png")], matrix={"seed": [*range(20)]})
    plan = planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json")
    assert len(calls) == 1
    assert len({shot.latents_key for shot in plan.shots}) == 20


def test_the_plan_tells_areas_and_their_tokens_to_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    job = tiny_job(frames=FRAMES, inject=[rule(region=[0, 0, 0.3, 1], frames="0-4"), rule()])
    said = run_wancli(capsys, "plan", write_job(tmp_path, job), "--json")
    first, second = json.loads(said.out)["shots"][0]["inject"]
    assert first["area"] == {"frames": [0, 4], "region": [0, 0, 0.3, 1], "tokens": 2 * 4 * 2}
    assert second["area"] is None


@pytest.mark.parametrize("flag", [("--set", "inject.0.frames=0-4"), ("--sweep", "inject.0.frames=0-4,5-12")])
def test_areas_can_be_set_and_swept(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], flag: tuple[str, str]
) -> None:
    import json

    job = tiny_job(frames=FRAMES, output="{id}.mp4", inject=[rule(region=[0, 0, 0.5, 1])])
    said = run_wancli(capsys, "plan", write_job(tmp_path, job), *flag, "--json")
    shots = json.loads(said.out)["shots"]
    assert [shot["inject"][0]["area"]["frames"] for shot in shots] == [[0, 4], [5, 12]][: len(shots)]
    assert len(shots) == (1 if flag[0] == "--set" else 2)


def test_a_matrix_sweeps_regions(tmp_path: Path, warm: Path) -> None:
    regions = [[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    job = tiny_job(output="{id}.mp4", inject=[rule()], matrix={"inject.0.region": regions})
    shots: tuple[Shot, ...] = planning.build_plan(load(write_job(tmp_path, job)), warm / "hashes.json").shots
    assert [shot.rules[0].area and shot.rules[0].area.region for shot in shots] == [
        None,
        (0, 0, 0.5, 1),
        (0.5, 0, 1, 1),
    ]
    assert len({shot.id for shot in shots}) == 3
