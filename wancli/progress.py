"""Progress for people: bars with an ETA on a terminal, plain lines elsewhere, or nothing.

Progress goes to the stream it was made for (stderr), never to stdout. A phase counts steps; when it ends, one
line of it stays. A phase without steps is not shown. Texts from a job are shown without control characters.
Programs read `wancli.report.json_stream` and `wancli.report.openjd_progress` instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, TextIO

from wancli.batch_progress import BatchProgress
from wancli.units import format_seconds, pluralize

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from wancli.engine.outcome import Outcome
    from wancli.errors import ExitStatus
    from wancli.plan.render_plan import Plan

Mode = Literal["auto", "bar", "plain", "none"]

_LINE_SECONDS = 10.0  # a plain line follows the last one after this time and this share of the steps
_LINE_SHARE = 0.1
_ABOUT_ALL = ("compare", "draw")  # phases that are about all shots
# What each phase counts, if not steps.
_UNITS = {
    "encode": "prompt",
    "pictures": "picture",
    "decode": "frame",
    "compare": "video",
    "draw": "file",
    "probe": "block run",
    "fetch": "MiB",
}


class Phase(Protocol):
    """A running phase: call `advance()` after each step, with a short note if there is one."""

    def advance(self, n: int = 1, note: str = "") -> None: ...


class Progress:
    """The silent display, and the interface of the others.

    A context: it sees the error that ends its command. `phase()` is a `with` block around a counted loop.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_plan(self, plan: Plan) -> None:
        """Handle the plan of the batch."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Handle the outcome of a shot."""

    def on_end(self, status: ExitStatus, report: Path | None) -> None:
        """Handle the exit code of the command, and the path of its report."""

    @contextmanager
    def phase(self, name: str, shots: Sequence[str], total: int) -> Iterator[Phase]:  # noqa: ARG002
        """Show a phase of `total` steps. `shots` has the ids of its shots; it is empty for prompts."""
        yield _SilentPhase()

    def note(self, text: str) -> None:
        """Show something worth knowing."""

    def warn(self, text: str) -> None:
        """Show something that may be wrong, and does not stop the work."""


def create_progress(stream: TextIO, mode: Mode = "auto") -> Progress:
    """Create the display that suits a stream; `auto` draws bars only on a capable terminal."""
    if mode == "auto":
        mode = "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    kinds = {"bar": _Bars, "plain": _PlainLines}
    return kinds[mode](stream) if mode in kinds else Progress()


def make_printable(text: str) -> str:
    """Escape the characters that could move the cursor or turn the writing direction."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def phase_title(name: str, shots: Sequence[str]) -> str:
    """Name a phase for people: `sample 0001-a-cat`, `sample 8 shots, a to h`, `encode prompts`."""
    if not shots or name in _ABOUT_ALL:
        return f"{name} {_UNITS.get(name, 'step')}s"
    return f"{name} {shots[0] if len(shots) == 1 else f'{len(shots)} shots, {shots[0]} to {shots[-1]}'}"


def _format_total(name: str, total: int) -> str:
    return pluralize(total, _UNITS.get(name, "step"))


class _Display(Progress):
    """What the displays for people share: how far the batch is."""

    def __init__(self) -> None:
        self.batch = BatchProgress()

    def on_plan(self, plan: Plan) -> None:
        self.batch.on_plan(plan)

    def on_outcome(self, outcome: Outcome) -> None:
        self.batch.on_outcome(outcome)

    def place(self, name: str, shots: Sequence[str]) -> str:
        return "" if name in _ABOUT_ALL else self.batch.format_place(shots)

    def batch_eta(self, before: str = "") -> str:
        """Return the time until the batch is done, as `batch ETA 3 min 20 s`; empty if there is none."""
        left = self.batch.seconds_left()
        return "" if left is None else f"{before}batch ETA {format_seconds(left)}"


def _describe_end(name: str, done: int, total: int) -> str:
    """Describe how a phase ended that raised nothing: after all steps, or early after a stop request."""
    return "done in" if done >= total else f"stopped after {done} of {_format_total(name, total)} and"


class _SilentPhase:
    def advance(self, n: int = 1, note: str = "") -> None: ...


class _LinePhase:
    def __init__(self, lines: _PlainLines, title: str, total: int, ids: Sequence[str]) -> None:
        self._lines, self._title, self._total, self._ids = lines, title, total, ids
        self.done = self._shown = 0
        self._began = self._shown_at = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self._lines.batch.on_step(self._ids, n)
        now = time.monotonic()
        moved = self.done - self._shown >= _LINE_SHARE * self._total
        if moved and now - self._shown_at >= _LINE_SECONDS and self.done < self._total:
            self._shown, self._shown_at = self.done, now
            left = (now - self._began) / self.done * (self._total - self.done)
            tail = self._lines.batch_eta(", ") + (f", {note}" if note else "")
            self._lines.note(f"{self._title}: {self.done}/{self._total}, ETA {format_seconds(left)}{tail}")


class _PlainLines(_Display):
    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @contextmanager
    def phase(self, name: str, shots: Sequence[str], total: int) -> Iterator[Phase]:
        if not total:
            yield _SilentPhase()
            return
        title = self.place(name, shots) + phase_title(name, shots)
        self.note(f"{title}: started, {_format_total(name, total)}")
        began = time.monotonic()
        phase = _LinePhase(self, title, total, self.batch.begin_phase(name, shots))
        try:
            yield phase
        except BaseException:
            self.note(f"{title}: stopped after {format_seconds(time.monotonic() - began)}")
            raise
        end = _describe_end(name, phase.done, total)
        left = self.batch_eta(", ") if name == "sample" else ""
        self.note(f"{title}: {end} {format_seconds(time.monotonic() - began)}{left}")

    def note(self, text: str) -> None:
        self._stream.write(make_printable(text) + "\n")
        self._stream.flush()

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")


class _BarPhase:
    def __init__(self, display: _Bars, bars: RichProgress, task: TaskID, ids: Sequence[str]) -> None:
        self._display, self._bars, self._task, self._ids = display, bars, task, ids

    def advance(self, n: int = 1, note: str = "") -> None:
        self._display.batch.on_step(self._ids, n)
        note = self._display.batch_eta() or note
        self._bars.update(self._task, advance=n, note=make_printable(note), refresh=True)


class _Bars(_Display):
    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        super().__init__()
        self._console = Console(file=stream, force_terminal=True, highlight=False)

    @contextmanager
    def phase(self, name: str, shots: Sequence[str], total: int) -> Iterator[Phase]:
        if not total:
            yield _SilentPhase()
            return
        title = self.place(name, shots) + phase_title(name, shots)
        ids = self.batch.begin_phase(name, shots)
        began = time.monotonic()
        end = "[red]stopped after[/]"
        try:
            with self._bars() as bars:
                task = bars.add_task(make_printable(title), total=total, note="")
                yield _BarPhase(self, bars, task, ids)
            done = round(bars.tasks[task].completed)
            end = f"[{'green' if done >= total else 'red'}]{_describe_end(name, done, total)}[/]"
        finally:
            self._line(f"{title}: ", after=f"{end} {format_seconds(time.monotonic() - began)}")

    def _bars(self) -> RichProgress:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        title = Column(no_wrap=True, overflow="ellipsis", max_width=38)
        note = Column(no_wrap=True, overflow="ellipsis", max_width=22)
        return RichProgress(
            TextColumn("{task.description}", markup=False, table_column=title),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False, table_column=note),
            console=self._console,
            transient=True,
            expand=True,
            redirect_stdout=False,  # stdout is for results
            speed_estimate_period=24 * 3600,  # a step may take minutes; the default forgets after 30 s
        )

    def note(self, text: str) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        self._line(text, before="[yellow]warning:[/] ")

    def _line(self, text: str, before: str = "", after: str = "") -> None:
        from rich.markup import escape

        self._console.print(before + escape(make_printable(text)) + after, soft_wrap=True)
