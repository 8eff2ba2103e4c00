"""Texts for terminals of any width."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from wancli.report import terminal
from wancli.report.render_summary import build_memory_table

PHASES = [
    {
        "name": "encode",
        "model": 2**20,
        "activation": 2**30,
        "buffer": 0,
        "peak": 2**31,
        "process": 430 * 2**20,
    }
]


@pytest.mark.parametrize("columns", [20, 40])
def test_a_terminal_too_narrow_for_a_table_gets_its_rows_as_lists(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.show(["a line", build_memory_table(PHASES, {"encode": 90.0})])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "a line",
        "phase encode",
        "  model 1 MiB",
        "  activation 1.0 GiB",
        "  buffer 0 B",
        "  peak 2.0 GiB",
        "  expected 90.0 s",
        "phase process",
        "  peak 430 MiB",
    ]
    assert all(cell_len(line) <= columns for line in shown)


def test_a_table_that_fits_stays_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "59")
    terminal.show([build_memory_table(PHASES, {"encode": 90.0})])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["phase", "encode", "process"]


def test_a_cut_text_is_one_printable_line_of_so_many_columns() -> None:
    assert terminal.truncate("a\nb", 3) == "a b"
    assert terminal.truncate("a\x1b[1m", 9) == "a\N{REPLACEMENT CHARACTER}[1m"
    assert terminal.truncate("\u732b\u732b\u732b", 6) == "\u732b\u732b\u732b"
    assert terminal.truncate("\u732b\u732b\u732b", 5) == "\u732b\u732b…"
