"""Which stored map answers `auto:top8`, and with which blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from block_maps import SHA, TOTAL, measured_map

from wancli.errors import JobError
from wancli.injection import block_map
from wancli.injection.block_map import MapModel, PromptPair
from wancli.injection.block_map_store import BlockMapStore


def select(store: BlockMapStore, spec: str, ids: tuple[str, str] = ("aa", "bb"), sha: str = SHA) -> list[int]:
    return store.select_blocks(spec, 0, sha, 8, ids)[0]


def test_top_and_bottom_are_the_ends_of_the_ranking(tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)
    store.put(measured_map())
    assert select(store, "auto:top2") == [2, 4]
    assert select(store, "auto:top3") == [2, 4, 6]
    assert select(store, "auto:bottom3") == [1, 3, 5]
    assert select(store, "auto:top8") == select(store, "auto:bottom8") == list(range(8))


def test_a_map_is_read_once_for_all_shots_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BlockMapStore(tmp_path).put(measured_map())
    store = BlockMapStore(tmp_path)
    assert select(store, "auto:top2") == [2, 4]
    monkeypatch.setattr(block_map, "read", lambda path: pytest.fail(f"{path} was read again"))
    assert select(store, "auto:top3") == [2, 4, 6]


def test_the_same_prompts_come_first_then_the_method_then_the_date(tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)

    def favour(block: int) -> dict[str, Any]:
        return {"total": [float(b == block) for b in range(8)]}

    other_prompts = [PromptPair(main="A dog.", injected="A reef.", ids=["cc", "bb"])]
    paths: list[Path] = []
    for number, changes in enumerate(
        [
            {"prompts": other_prompts, "method": "gradient", "created": "2026-12-01"},
            {"prompts": other_prompts, "created": "2026-11-01"},
            {"method": "skip", "created": "2026-12-03"},
            {"seed": 1, "created": "2026-11-02"},
            {"seed": 2, "created": "2026-11-03"},
        ]
    ):
        paths.append(store.put(measured_map(**favour(number), **changes)))
    for best in (4, 3, 2, 1, 0):
        blocks, auto = BlockMapStore(tmp_path).select_blocks("auto:top1", 3, SHA, 8, ["aa", "bb"])
        assert blocks == [best]
        assert auto is not None
        assert (auto.rule, auto.spec, auto.blocks) == (3, "auto:top1", str(best))
        assert auto.other_prompts == ("" if best > 1 else "'A dog.' against 'A reef.'")
        paths[best].unlink()


def test_a_map_replaces_an_earlier_one_of_the_same_settings(tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)
    assert store.put(measured_map()) == store.put(measured_map(total=TOTAL[::-1], created="2026-11-24"))
    assert select(store, "auto:top2") == [3, 5]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"loras": ["style.safetensors"]}, {"method": "skip"}, {"frames": 5}], ids=str
)
def test_maps_of_different_settings_do_not_replace_each_other(change: dict[str, Any], tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)
    assert store.put(measured_map()) != store.put(measured_map(**change))


def test_maps_of_other_models_or_of_ranges_and_damaged_files_are_not_used(tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)
    store.put(measured_map(model=MapModel(root="/m", sha256="cd" * 32, blocks=8)))
    store.put(
        measured_map(
            model=MapModel(root="/m", sha256=SHA, blocks=4), total=[1, 2, 3, 4], values=[[1, 2, 3, 4]]
        )
    )
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    damaged = store.put(measured_map(ranges=halves, total=[1.0, 2.0], values=[[1.0, 2.0]]))
    (damaged.parent / "x.json").write_text("{")
    with pytest.raises(
        JobError, match="auto:top2 needs a map, and none was measured with this model"
    ) as caught:
        select(store, "auto:top2")
    assert "wancli probe JOB" in caught.value.hint


def test_a_map_of_ranges_of_one_block_each_is_a_map_of_blocks(tmp_path: Path) -> None:
    store = BlockMapStore(tmp_path)
    store.put(measured_map(ranges=[[b] for b in range(8)][::-1]))
    assert select(store, "auto:top2") == [3, 5]


@pytest.mark.parametrize("spec", ["auto:top0", "auto:top9", "auto", "auto:top", "auto:best3", "auto:top-1"])
def test_an_invalid_set_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=spec):
        select(BlockMapStore(tmp_path), spec)


def test_a_run_that_will_measure_needs_no_map(tmp_path: Path) -> None:
    assert BlockMapStore(tmp_path, allow_missing=True).select_blocks(
        "auto:top2", 0, SHA, 8, ("aa", "bb")
    ) == (list(range(8)), None)
