"""Block maps as files, on the shelf, and as what `auto:top8` stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wancli.errors import JobError
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap, BlockMapStore, MapModel, PromptPair

SHA = "ab" * 32
TOTAL = [0.3, 0.1, 0.9, 0.2, 0.9, 0.0, 0.5, 0.4]


def made(**changes: Any) -> BlockMap:
    facts: dict[str, Any] = {
        "job": "reef",
        "shot": "0001",
        "model": MapModel(root="/models/wan", sha256=SHA, blocks=8),
        "loras": [],
        "method": "inject",
        "prompts": [PromptPair(main="A cat.", injected="A reef.", ids=["aa", "bb"])],
        "size": "64x64",
        "frames": 1,
        "seed": 0,
        "levels": [block_map.NoiseLevel(step=1, sigma=0.8)],
        "unit": "relative change of the velocity",
        "values": [TOTAL],
        "ranges": None,
        "total": TOTAL,
        "suggestion": "[2, 4]",
        "seconds": 1.5,
        "forwards": 5.5,
        "versions": {"wancli": "0.1.0"},
        "created": "2026-11-23T10:00:00+00:00",
    }
    return BlockMap(**(facts | changes))


# ---- the file ----


def test_a_map_of_a_job_whose_name_is_not_utf8_is_written(tmp_path: Path) -> None:
    path = tmp_path / "job.map.inject.json"
    block_map.write(path, made(job="caf\udce9"))
    assert block_map.read(path) == made(job="caf\udce9")


def test_a_map_that_is_written_is_the_map_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "job.map.inject.json"
    block_map.write(path, made())
    assert block_map.read(path) == made()
    document = json.loads(path.read_text())
    assert (document["schema"], document["values"]) == ("wancli/map/1", [TOTAL])


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
    ],
)
def test_what_is_no_whole_map_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(made().as_dict() | change))
    assert block_map.read(path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "null", '{"schema": NaN}', "[" * 5000])
def test_what_is_no_document_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    assert block_map.read(path) is None
    assert block_map.read(tmp_path / "absent.json") is None


def test_a_map_replaces_a_map_and_moves_anything_else_aside(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text("my notes")
    block_map.write(path, made(seed=1))
    block_map.write(path, made(seed=2))
    assert block_map.read(path) == made(seed=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.json", "map.old-1.json"]
    assert (tmp_path / "map.old-1.json").read_text() == "my notes"


# ---- what it suggests ----


def test_the_strongest_comes_first_and_of_equal_ones_the_earlier() -> None:
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

    from wancli.injection.table import parse_blocks

    assert block_map.format_blocks(blocks) == text
    assert sorted(parse_blocks(yaml.safe_load(text), 8)) == sorted(blocks)


# ---- the shelf ----


def chosen(shelf: BlockMapStore, said: str, ids: tuple[str, str] = ("aa", "bb"), sha: str = SHA) -> list[int]:
    return shelf.select_blocks(said, 0, sha, 8, ids)[0]


def test_top_and_bottom_are_the_ends_of_the_ranking(tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)
    shelf.put(made())
    assert chosen(shelf, "auto:top2") == [2, 4]
    assert chosen(shelf, "auto:top3") == [2, 4, 6]
    assert chosen(shelf, "auto:bottom3") == [1, 3, 5]
    assert chosen(shelf, "auto:top8") == chosen(shelf, "auto:bottom8") == list(range(8))


def test_a_map_is_read_once_for_all_shots_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BlockMapStore(tmp_path).put(made())
    shelf = BlockMapStore(tmp_path)
    assert chosen(shelf, "auto:top2") == [2, 4]
    monkeypatch.setattr(block_map, "read", lambda path: pytest.fail(f"{path} was read again"))
    assert chosen(shelf, "auto:top3") == [2, 4, 6]


def test_the_same_prompts_come_first_then_the_method_then_the_date(tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)

    def favours(block: int) -> dict[str, Any]:
        return {"total": [float(b == block) for b in range(8)]}

    others = [PromptPair(main="A dog.", injected="A reef.", ids=["cc", "bb"])]
    kept: list[Path] = []
    for number, changes in enumerate(
        [
            {"prompts": others, "method": "gradient", "created": "2026-12-01"},
            {"prompts": others, "created": "2026-11-01"},
            {"method": "skip", "created": "2026-12-03"},
            {"seed": 1, "created": "2026-11-02"},
            {"seed": 2, "created": "2026-11-03"},
        ]
    ):
        kept.append(shelf.put(made(**favours(number), **changes)))
    for best in (4, 3, 2, 1, 0):
        blocks, choice = BlockMapStore(tmp_path).select_blocks("auto:top1", 3, SHA, 8, ["aa", "bb"])
        assert blocks == [best]
        assert choice is not None
        assert (choice.rule, choice.spec, choice.blocks) == (3, "auto:top1", str(best))
        assert choice.other_prompts == ("" if best > 1 else "'A dog.' against 'A reef.'")
        kept[best].unlink()


def test_the_newer_of_two_maps_of_the_same_thing_is_kept(tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)
    assert shelf.put(made()) == shelf.put(made(total=TOTAL[::-1], created="2026-11-24"))
    assert chosen(shelf, "auto:top2") == [3, 5]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"loras": ["style.safetensors"]}, {"method": "skip"}, {"frames": 5}], ids=str
)
def test_maps_of_other_things_lie_beside_each_other(change: dict[str, Any], tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)
    assert shelf.put(made()) != shelf.put(made(**change))


def test_other_models_ranges_and_damaged_files_are_no_maps(tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)
    shelf.put(made(model=MapModel(root="/m", sha256="cd" * 32, blocks=8)))
    shelf.put(
        made(model=MapModel(root="/m", sha256=SHA, blocks=4), total=[1, 2, 3, 4], values=[[1, 2, 3, 4]])
    )
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    damaged = shelf.put(made(ranges=halves, total=[1.0, 2.0], values=[[1.0, 2.0]]))
    (damaged.parent / "x.json").write_text("{")
    with pytest.raises(
        JobError, match="auto:top2 needs a map, and none was measured with this model"
    ) as caught:
        chosen(shelf, "auto:top2")
    assert "wancli probe JOB" in caught.value.hint


def test_ranges_of_one_block_each_are_a_map_of_blocks(tmp_path: Path) -> None:
    shelf = BlockMapStore(tmp_path)
    shelf.put(made(ranges=[[b] for b in range(8)][::-1]))
    assert chosen(shelf, "auto:top2") == [3, 5]


@pytest.mark.parametrize("said", ["auto:top0", "auto:top9", "auto", "auto:top", "auto:best3", "auto:top-1"])
def test_a_set_that_is_none_is_refused(said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        chosen(BlockMapStore(tmp_path), said)


def test_whoever_is_about_to_measure_needs_no_map(tmp_path: Path) -> None:
    assert BlockMapStore(tmp_path, allow_missing=True).select_blocks(
        "auto:top2", 0, SHA, 8, ("aa", "bb")
    ) == (list(range(8)), None)
