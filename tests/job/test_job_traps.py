"""The traps of YAML and of numbers, as whole jobs: tests/golden/job_traps.jsonl has what is said of each.

What YAML 1.1 reads as something else (`no`, `010`, `12:30`, a date) is text or refused, never a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wancli.errors import JobError
from wancli.job.loader import parse

GOLDEN = Path(__file__).parents[1] / "golden" / "job_traps.jsonl"
TRAPS = [json.loads(line) for line in GOLDEN.read_text().splitlines()]


@pytest.mark.parametrize(
    "trap", TRAPS, ids=lambda trap: trap["yaml"].removeprefix("model: m\nprompt: p\n").strip()
)
def test_a_trap_is_refused_with_the_line_the_key_and_what_was_expected(trap: dict[str, Any]) -> None:
    with pytest.raises(JobError) as refused:
        parse(trap["yaml"].encode(), "job.yaml", "job", Path("/nowhere"))
    assert {"message": str(refused.value), "hint": refused.value.hint} == {
        "message": trap["message"],
        "hint": trap["hint"],
    }


@pytest.mark.parametrize(
    ("line", "key", "text"),
    [
        ("negative: no", "negative", "no"),
        ("negative: 12:30", "negative", "12:30"),
        ("negative: 2024-01-01", "negative", "2024-01-01"),
        ("negative: a #1", "negative", "a"),
        ("negative: 'a #1'", "negative", "a #1"),
        ("output: yes", "output", "yes"),
        ("size: 12:30", "size", "12:30"),
        ("id: off", "id", "off"),
    ],
)
def test_a_text_stays_as_it_was_written(line: str, key: str, text: str) -> None:
    job = parse(f"model: m\nprompt: p\n{line}\n".encode(), "job.yaml", "job", Path("/nowhere")).items[0].job
    assert getattr(job, key) == text
