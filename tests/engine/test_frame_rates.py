"""Frame rates of film and television, from the job to the comparison."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from jobs import CommandResult, manifest_of, run_wancli

from wancli.video import mp4


def test_a_rate_that_is_no_whole_number_is_exact_in_the_video_the_manifest_and_the_comparison(
    render: Callable[..., CommandResult], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    items = [{"id": "a"}, {"id": "b", "seed": 1}]
    done = render(frames=5, video={"fps": 23.976}, items=items, output="out/{id}.mp4")
    assert done.code == 0, done.err
    a, b = (tmp_path / "out" / f"{name}.mp4" for name in "ab")
    assert mp4.read_info(a)[:2] == (5, Fraction(24000, 1001))
    assert manifest_of(tmp_path, "a")["shot"]["fps"] == "24000/1001"
    assert render(frames=5, video={"fps": "24000/1001"}, items=items, output="out/{id}.mp4").code == 0
    side = tmp_path / "side.mp4"
    made = run_wancli(capsys, "compare", a, b, "-o", tmp_path / "sheet.png", "--video", side)
    assert made.code == 0, made.err
    assert mp4.read_info(side)[:2] == (5, Fraction(24000, 1001))
    assert run_wancli(capsys, "check", "--deep", tmp_path / "out").code == 0
    assert run_wancli(capsys, "report", tmp_path / "out").code == 0
    assert "24000/1001" in (tmp_path / "out" / "report.html").read_text()
