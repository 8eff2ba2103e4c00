"""The document of a page, from what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from block_maps import TOTAL, measured_map

from wancli.injection.block_map import MeasuredBranch
from wancli.report.html.collect import ReportInputs
from wancli.report.html.page_data import page_document


def test_a_map_of_text_and_pictures_is_two_maps_on_a_page() -> None:
    image = MeasuredBranch(
        main="cat.png", injected="dog.png", ids=["cc", "dd"], values=[TOTAL[::-1]], total=TOTAL[::-1],
        suggestion="[3, 5]", hits=8,
    )  # fmt: skip
    found = page_document(ReportInputs("reef", maps=[measured_map(image=image)]), Path("reef.html"), {})[
        "maps"
    ]
    shown: list[dict[str, Any]] = [
        {"attended": "text", "total": TOTAL, "suggestion": "[2, 4]", "prompts": ("A cat.", "A reef.")},
        {
            "attended": "image",
            "total": TOTAL[::-1],
            "suggestion": "[3, 5]",
            "prompts": ("cat.png", "dog.png"),
        },
    ]
    for entry, expected in zip(found, shown, strict=True):
        assert {key: entry[key] for key in ("attended", "total", "suggestion")} == {
            key: expected[key] for key in ("attended", "total", "suggestion")
        }
        assert [(pair["main"], pair["injected"]) for pair in entry["prompts"]] == [expected["prompts"]]
        assert (entry["method"], entry["size"], "image" in entry) == ("inject", "64x64", False)
