"""Block maps as files, and the blocks that they suggest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from block_maps import TOTAL, measured_map

from wancli.errors import EntryError
from wancli.injection import block_map

IMAGE = block_map.MeasuredBranch(
    main="cat.png", injected="dog.png", ids=["cc", "dd"], values=[TOTAL[::-1]], total=TOTAL[::-1],
    suggestion="[3, 5]", hits=8,
)  # fmt: skip
NO_TEXT: dict[str, Any] = {"prompts": [], "values": [], "total": [], "suggestion": ""}


# ---- the file ----


def test_a_map_of_a_job_whose_name_is_not_utf8_is_written(tmp_path: Path) -> None:
    path = tmp_path / "job.map.inject.json"
    block_map.write(path, measured_map(job="caf\udce9"))
    assert block_map.read(path) == measured_map(job="caf\udce9")


def test_a_written_map_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "job.map.inject.json"
    block_map.write(path, measured_map())
    assert block_map.read(path) == measured_map()
    document = json.loads(path.read_text())
    assert (document["schema"], document["values"]) == ("wancli/map/1", [TOTAL])
    assert "image" not in document


def test_a_map_of_pictures_has_a_key_of_its_own_and_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "job.map.inject.json"
    both, alone = measured_map(image=IMAGE), measured_map(image=IMAGE, **NO_TEXT)
    for written in (both, alone):
        block_map.write(path, written)
        assert block_map.read(path) == written
        assert json.loads(path.read_text())["image"]["total"] == IMAGE.total
    assert len({both.key, alone.key, measured_map().key}) == 3
    assert [list(one.branches) for one in (both, alone)] == [["text", "image"], ["image"]]
    assert (both.block_totals("text"), both.block_totals("image")) == (TOTAL, IMAGE.total)
    assert alone.block_totals("text") is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "wancli/map/2"},
        {"total": TOTAL[1:]},
        {"values": [TOTAL, TOTAL]},
        {"total": ["0.3", *TOTAL[1:]]},
        {"prompts": []},
        {"method": "guess"},
        {"seed": None},
        {"image": IMAGE.model_dump() | {"total": TOTAL[1:]}},
        {"image": IMAGE.model_dump() | {"values": []}},
        {"image": IMAGE.model_dump() | {"hits": -1}},
    ],
)
def test_a_file_that_is_not_a_sound_map_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(measured_map().as_dict() | change))
    with pytest.raises(EntryError, match=r"damaged, or of another version|not wancli/map/1"):
        block_map.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "null", '{"schema": NaN}', "[" * 5000])
def test_a_file_that_is_not_a_json_object_is_damage(text: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(EntryError, match=r"damaged, or of another version|not wancli/map/1"):
        block_map.read(path)
    assert block_map.read(tmp_path / "absent.json") is None


def test_a_map_replaces_a_map_and_moves_anything_else_aside(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text("my notes")
    block_map.write(path, measured_map(seed=1))
    block_map.write(path, measured_map(seed=2))
    assert block_map.read(path) == measured_map(seed=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.json", "map.old-1.json"]
    assert (tmp_path / "map.old-1.json").read_text() == "my notes"


# ---- suggestions ----


def test_ranking_puts_the_largest_first_and_keeps_the_order_of_equal_values() -> None:
    assert block_map.rank(TOTAL) == [2, 4, 6, 7, 0, 3, 1, 5]


def test_a_quarter_of_the_blocks_is_suggested_or_the_strongest_range() -> None:
    assert block_map.suggest_blocks(TOTAL, None) == "[2, 4]"
    assert block_map.suggest_blocks([0.1, 0.7, 0.2], [[0, 1, 2], [3, 4, 5], [6, 7]]) == "3-5"
    assert block_map.suggest_blocks([0.5, 0.1], None) == "0"


@pytest.mark.parametrize(
    ("blocks", "text"), [([5], "5"), ([3, 2, 1], "1-3"), ([0, 2, 3], "[0, 2-3]"), ([7, 1], "[1, 7]")]
)
def test_blocks_are_written_as_a_job_reads_them(blocks: list[int], text: str) -> None:
    import yaml

    from wancli.injection.selectors import parse_blocks

    assert block_map.format_blocks(blocks) == text
    assert sorted(parse_blocks(yaml.safe_load(text), 8)) == sorted(blocks)
