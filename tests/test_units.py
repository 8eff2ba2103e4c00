from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from wancli.errors import JobError
from wancli.units import (
    format_bytes,
    format_moment,
    format_ranges,
    format_seconds,
    list_some,
    parse_frame_rate,
    parse_size,
    pluralize,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500MiB", 500 * 2**20),
        ("2GiB", 2**31),
        ("1.5 G", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("7KB", 7000),
        ("64B", 64),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text, "here") == count


@pytest.mark.parametrize("text", ["12", "GiB", "-1GiB", "1e3MiB", ""])
def test_a_text_that_is_not_a_size_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(JobError, match=r"here: .* is not a size; write 500MiB or 2GiB"):
        parse_size(text, "here")


@pytest.mark.parametrize(
    ("said", "exact"),
    [
        (24, 24),
        (24.0, 24),
        ("48/2", 24),
        (12.5, "25/2"),
        (23.976, "24000/1001"),
        (23.98, "24000/1001"),
        (23.976024, "24000/1001"),
        ("23.976", "24000/1001"),
        ("24000/1001", "24000/1001"),
        (29.97, "30000/1001"),
        (47.952, "48000/1001"),
        (59.94, "60000/1001"),
        (119.88, "120000/1001"),
        (59.9, "599/10"),  # one digit is no NTSC rate
    ],
)
def test_frame_rates_are_exact(said: float | str, exact: int | str) -> None:
    assert parse_frame_rate(said) == exact


@pytest.mark.parametrize(
    "said", ["", "24fps", "-24", "24/0", "1/3", 0, 0.5, 241, 1e22, "23.9761234", "9999999/99999"]
)
def test_a_value_that_is_no_frame_rate_is_rejected(said: float | str) -> None:
    with pytest.raises(ValueError, match=r"not a frame rate|not between 1 and 240|too many digits"):
        parse_frame_rate(said)


def test_bytes_and_seconds_are_formatted_in_the_unit_that_fits() -> None:
    assert [format_bytes(n) for n in (0, 1023, 2048, 3 * 2**20, 2**31)] == [
        "0 B",
        "1023 B",
        "2 KiB",
        "3 MiB",
        "2.0 GiB",
    ]
    assert [format_seconds(s) for s in (7, 119.96, 200, 9000)] == ["7.0 s", "120.0 s", "3 min 20 s", "2.5 h"]
    assert format_seconds(179.7) == "3 min 0 s"


def test_a_time_is_local_and_names_its_date_and_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    for zone, shown in (
        ("Asia/Tokyo", "2026-12-01 00:30:07 JST"),
        ("America/New_York", "2026-11-30 10:30:07 EST"),
    ):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert format_moment(datetime(2026, 11, 30, 15, 30, 7, tzinfo=UTC)) == shown
    monkeypatch.undo()
    time.tzset()


def test_a_long_list_is_counted_after_its_first_entries() -> None:
    assert list_some(["a", "b"], 2) == "a, b"
    assert list_some([*"abcd"], 2) == "a, b and 2 more"


def test_one_is_not_several() -> None:
    assert [pluralize(n, "state") for n in (0, 1, 2000)] == ["0 states", "1 state", "2,000 states"]
    assert [pluralize(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]


def test_numbers_are_formatted_as_ranges() -> None:
    assert format_ranges([10, 0, 2, 1, 7, 11]) == "0-2,7,10-11"
