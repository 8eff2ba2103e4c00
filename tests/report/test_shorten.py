"""In 80 columns two shots have different names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_cases import FIXTURES, assemble
from jobs import run_wancli, tiny_job, write_job
from rich.cells import cell_len

from wancli.report.shorten import shorten_unique

STORM = "a-rather-long-name-of-a-storm-at-{}-strength0.3"


@pytest.mark.parametrize(
    ("ids", "limit", "shown"),
    [
        (["a", "b"], 16, ["a", "b"]),
        ([STORM.format(x) for x in ("night", "noon")], 16, ["…night…", "…noon…"]),
        ([STORM.format(x) for x in ("night-seed1", "noon-seed22")], 10, ["…nig…eed1…", "…noo…ed22…"]),
        (["storm-12345678-aaaa", "storm-12345678"], 12, ["…1234…8-aaaa", "…12345678"]),
        (["abcdefghijklmnop" + x + "abcdefghijklmnop" for x in "xy"], 8, ["0…klmnop", "1…klmnop"]),
        (["abcdefghijklmnop" * 4] * 2, 8, ["abc…mnop"] * 2),
        (["猫" * 9 + "1", "猫" * 9 + "2"], 9, ["猫猫…猫1", "猫猫…猫2"]),
        (["alike-0123456789-x-tail", "alike-0123456780-x-tail"], 12, ["…0123456789…", "…0123456780…"]),
    ],
)
def test_names_lose_what_all_share_and_then_their_middles(
    ids: Sequence[str], limit: int, shown: list[str]
) -> None:
    assert shorten_unique(ids, limit) == shown


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.integers(8, 40))
def test_names_keep_to_their_room(ids: list[str], limit: int) -> None:
    shown = shorten_unique(ids, limit)
    assert len(shown) == len(ids)
    assert all(cell_len(name) <= limit for name in shown)


def test_a_plan_in_80_columns_shows_shared_values_once_and_cuts_no_name(
    tmp_path: Path, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    items: list[dict[str, Any]] = [
        {"id": STORM.format("night"), "seed": 123456789},
        {"id": STORM.format("noon"), "seed": 7},
    ]
    lines = run_wancli(
        capsys, "plan", write_job(tmp_path, tiny_job(quick, output="{id}.mp4", items=items))
    ).out
    alike, heads, *shots = lines.splitlines()[1:5]
    assert alike == "all: size 64x64, frames 1, tokens 16, solver unipc, steps 2, shift 5, guidance 5"
    assert heads.split() == ["#", "shot", "seed", "state"]
    assert [shot.split() for shot in shots] == [
        ["0", items[0]["id"], "123456789", "to", "do"],
        ["1", items[1]["id"], "7", "to", "do"],
    ]


def test_a_plan_in_80_columns_shows_the_pictures_of_its_shots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = assemble("wan22-i2v-tiny", tmp_path / "model")
    for folder in ("night", "noon"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            name = f"a-photo-with-a-rather-long-name-{number}.png"
            (tmp_path / folder / name).write_bytes((FIXTURES / "pictures" / "input.png").read_bytes())
    photo = "{}/a-photo-with-a-rather-long-name-{}.png"
    items: list[dict[str, Any]] = [
        {"id": STORM.format("night"), "image": photo.format("night", 1)},
        {
            "id": STORM.format("noon"),
            "image": {"first": photo.format("noon", 1), "last": photo.format("noon", 2)},
        },
        {"id": "on", "image": {"shot": STORM.format("night")}},
    ]
    job = tiny_job(model, output="{id}.mp4", frames=5, items=items) | {"size": {"area": 4096}}
    lines = run_wancli(capsys, "plan", write_job(tmp_path, job)).out.splitlines()
    heads = next(n for n, line in enumerate(lines) if line.startswith("#"))
    assert lines[heads].split() == ["#", "shot", "image", "state"]
    rows = [line.split("  ") for line in lines[heads + 1 : heads + 4]]
    shown = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[1] for row in shown] == [item["id"] for item in items]
    assert [len(row) for row in shown] == [4, 4, 4]
    assert len({row[2] for row in shown}) == 3
    assert all(len(line) <= 80 for line in lines[heads : heads + 4])
    job["items"] = [
        {"id": "a", "image": photo.format("night", 1)},
        {"id": "b", "image": photo.format("noon", 2)},
    ]
    lines = run_wancli(capsys, "plan", write_job(tmp_path, job)).out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.endswith("to do")][:2] == [
        "0 a a-photo-with-a-rather-long-name-1.png to do",
        "1 b a-photo-with-a-rather-long-name-2.png to do",
    ]
    job["items"] = [
        {"id": "a", "image": photo.format("night", 1)},
        {"id": "b", "image": photo.format("noon", 1)},
    ]
    lines = run_wancli(capsys, "plan", write_job(tmp_path, job)).out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.endswith("to do")][:2] == [
        "0 a night/a-photo-with-a-rather-long-name-1.png to do",
        "1 b noon/a-photo-with-a-rather-long-name-1.png to do",
    ]
