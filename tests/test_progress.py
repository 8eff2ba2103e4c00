from __future__ import annotations

import io
import re

import pytest
from jobs import tiny_job, write_job
from rich.cells import cell_len

from wancli import progress as displays
from wancli.engine.outcome import Outcome
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.progress import Progress, create_progress

SHOT = "0001-a-gray-tabby-cat-walks-through-a-sunlit-garden-猫"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(displays.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def run(progress: Progress, clock: Clock, steps: int, seconds: float, note: str = "") -> None:
    with progress.phase("sample", [SHOT], steps) as phase:
        for _ in range(steps):
            clock.now += seconds
            phase.advance(note=note)


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# ---- the choice ----


def test_bars_are_for_terminals_and_lines_for_everything_else(monkeypatch):
    assert type(create_progress(Terminal())).__name__ == "_Bars"
    assert type(create_progress(io.StringIO())).__name__ == "_PlainLines"
    monkeypatch.setenv("TERM", "dumb")
    assert type(create_progress(Terminal())).__name__ == "_PlainLines"
    assert type(create_progress(Terminal(), "bar")).__name__ == "_Bars"
    assert type(create_progress(Terminal(), "plain")).__name__ == "_PlainLines"


def test_none_writes_nothing(clock):
    stream = Terminal()
    progress = create_progress(stream, "none")
    run(progress, clock, 3, 100)
    progress.note("a")
    progress.warn("b")
    assert stream.getvalue() == ""


# ---- plain lines ----


def test_a_quick_phase_is_two_lines(clock):
    stream = io.StringIO()
    run(create_progress(stream), clock, 50, 0.1)
    assert stream.getvalue().splitlines() == [
        f"sample {SHOT}: started, 50 steps",
        f"sample {SHOT}: done in 5.0 s",
    ]


@pytest.mark.parametrize(
    ("name", "total", "counted"),
    [
        ("sample", 1, "1 step"),
        ("encode", 2, "2 prompts"),
        ("decode", 81, "81 frames"),
        ("probe", 2740, "2,740 block runs"),
    ],
)
def test_a_phase_names_its_unit(name: str, total: int, counted: str) -> None:
    stream = io.StringIO()
    with create_progress(stream).phase(name, ["a"], total) as bar:
        bar.advance(total)
    assert stream.getvalue().startswith(f"{name} a: started, {counted}\n")


def test_a_long_phase_reports_every_tenth_with_the_time_left(clock):
    stream = io.StringIO()
    run(create_progress(stream), clock, 100, 3, note="3.00 s/step")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 + 9
    assert lines[1] == f"sample {SHOT}: 10/100, ETA 4 min 30 s, 3.00 s/step"
    assert lines[-1] == f"sample {SHOT}: done in 5 min 0 s"


def test_a_phase_of_many_short_steps_is_quiet_for_ten_seconds_at_a_time(clock):
    stream = io.StringIO()
    run(create_progress(stream), clock, 100, 0.5)
    assert [line.split(": ")[1].split(",")[0] for line in stream.getvalue().splitlines()[1:-1]] == [
        "20/100",
        "40/100",
        "60/100",
        "80/100",
    ]


@pytest.mark.parametrize("mode", ["plain", "bar"])
def test_a_phase_that_fails_is_not_called_done(clock, mode):
    stream = Terminal()

    def fail():
        with create_progress(stream, mode).phase("decode", [SHOT], 5):
            clock.now += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    last = without_codes(stream.getvalue()).splitlines()[-1]
    assert last.endswith("stopped after 3.0 s")


@pytest.mark.parametrize("mode", ["plain", "bar"])
def test_a_text_can_neither_move_the_cursor_nor_turn_the_line_nor_colour_it(mode):
    stream = Terminal()
    progress = create_progress(stream, mode)
    progress.note("a\x1b[2Jb \u202ec [red]d[/]")
    progress.warn("e\r")
    assert without_codes(stream.getvalue()) == "a\\x1b[2Jb \\u202ec [red]d[/]\nwarning: e\\r\n"


@pytest.fixture
def batch(tmp_path, shallow):
    """A plan of three shots of four steps, and the outcomes of its shots."""
    items = [{"id": id, "seed": seed} for seed, id in enumerate("abc")]
    job = tiny_job(shallow, items=items, output="out/{id}.mp4", sampler={"steps": 4})
    return build_plan(load(write_job(tmp_path, job)), tmp_path / "memo.json")


def render_two(progress: Progress, batch, clock: Clock) -> None:
    """The first shot is done already, the second one is rendered at 2 s a step."""
    progress.on_plan(batch)
    progress.on_outcome(Outcome(batch.shots[0], "already done"))
    with progress.phase("encode", (), 0):
        pass
    with progress.phase("sample", ["b"], 4) as phase:
        for _ in range(4):
            clock.now += 12
            phase.advance(note="sigma 0.5")
    with progress.phase("decode", ["b"], 1) as phase:
        clock.now += 2
        phase.advance()
    progress.on_outcome(Outcome(batch.shots[1], "rendered"))
    with progress.phase("compare", ["a", "b"], 2) as phase:
        phase.advance(2)


def test_lines_say_which_shot_of_how_many_it_is_and_when_the_batch_is_done(clock, batch):
    stream = io.StringIO()
    render_two(create_progress(stream), batch, clock)
    assert stream.getvalue().splitlines() == [
        "[2/3] sample b: started, 4 steps",
        "[2/3] sample b: 1/4, ETA 36.0 s, batch ETA 108.0 s, sigma 0.5",
        "[2/3] sample b: 2/4, ETA 24.0 s, batch ETA 96.0 s, sigma 0.5",
        "[2/3] sample b: 3/4, ETA 12.0 s, batch ETA 84.0 s, sigma 0.5",
        "[2/3] sample b: done in 48.0 s, batch ETA 72.0 s",
        "[2/3] decode b: started, 1 frame",
        "[2/3] decode b: done in 2.0 s",
        "compare videos: started, 2 videos",
        "compare videos: done in 0.0 s",
    ]


def test_bars_say_which_shot_of_how_many_it_is_and_when_the_batch_is_done(clock, batch):
    stream = Terminal()
    render_two(create_progress(stream), batch, clock)
    shown = without_codes(stream.getvalue())
    drawn = [line for line in re.split(r"[\r\n]+", shown) if "ETA" in line]
    assert any(re.match(r"\[2/3\] sample b ━+.* 2/4 ETA .* batch ETA 96\.0 s", line) for line in drawn)
    assert max(cell_len(line) for line in drawn) <= 80
    assert "\n[2/3] sample b: done in 48.0 s" in shown.replace("\r", "\n")
    assert "encode" not in shown


# ---- bars ----


def test_a_bar_shows_phase_shot_count_time_and_note_within_80_columns(clock):
    stream = Terminal()
    run(create_progress(stream), clock, 8, 0.25, note="0.25 s/step")
    drawn = [line for line in re.split(r"[\r\n]+", without_codes(stream.getvalue())) if "ETA" in line]
    assert any(re.match(r"sample 0001-a-gray.*… ━+.* 4/8 ETA .*0\.25 s/step", line) for line in drawn)
    assert max(cell_len(line) for line in drawn) <= 80


def test_of_a_finished_bar_one_line_stays(clock):
    stream = Terminal()
    run(create_progress(stream), clock, 8, 0.25)
    assert without_codes(stream.getvalue().rpartition("\x1b[2K")[2]) == f"sample {SHOT}: done in 2.0 s\n"


def test_a_warning_stays_above_a_running_bar(clock):
    stream = Terminal()
    progress = create_progress(stream)
    with progress.phase("sample", [SHOT], 2) as phase:
        phase.advance()
        progress.warn("the prompts hardly differ")
        phase.advance()
    assert "warning: the prompts hardly differ\n" in without_codes(stream.getvalue())


def test_results_on_stdout_are_not_drawn_into_the_bar(clock, capsys):
    with create_progress(Terminal()).phase("sample", [SHOT], 2):
        print("/out/a.mp4")  # noqa: T201
    assert capsys.readouterr().out == "/out/a.mp4\n"


def test_no_color_takes_the_colours_away(clock, monkeypatch):
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    for expected in (True, False):
        stream = Terminal()
        progress = create_progress(stream)
        run(progress, clock, 2, 1)
        progress.warn("careful")
        assert bool(coloured.search(stream.getvalue())) == expected
        monkeypatch.setenv("NO_COLOR", "1")


# ---- words ----


@pytest.mark.parametrize(
    ("name", "shots", "title"),
    [
        ("sample", ["a"], "sample a"),
        ("sample", ["a", "b", "c"], "sample 3 shots, a to c"),
        ("encode", [], "encode prompts"),
        ("compare", ["a"], "compare videos"),
        ("draw", ["a"], "draw files"),
    ],
)
def test_a_phase_is_named_after_its_shots(name: str, shots: list[str], title: str) -> None:
    stream = io.StringIO()
    with create_progress(stream).phase(name, shots, 4):
        pass
    assert stream.getvalue().startswith(f"{title}: started, 4 ")


def test_a_phase_that_stops_early_reports_how_many_steps_it_took() -> None:
    out = io.StringIO()
    with create_progress(out, "plain").phase("sample", ["a"], 20) as phase:
        phase.advance(3)
    assert out.getvalue().splitlines()[-1].startswith("sample a: stopped after 3 of 20 steps and ")
