"""Values of a page's document: shared by shots, and rounded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Pool:
    """A list of distinct values, in the order in which they were first put."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def put(self, value: Any) -> int:
        """Store a value, unless it is there already, and return its index."""
        place = self._places.setdefault(json.dumps(value, sort_keys=True), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


def round_numbers(value: Any, digits: int = 4) -> Any:
    """Round every number in JSON data to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: round_numbers(inner, digits) for key, inner in value.items()}
    return [round_numbers(inner, digits) for inner in value] if isinstance(value, list | tuple) else value
