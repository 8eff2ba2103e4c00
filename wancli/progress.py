"""Progress for people: bars with an ETA on a terminal, plain lines elsewhere, or nothing.

All of it goes to the stream it was made for (stderr), never to stdout. A phase of a shot counts
steps; when it ends, one line of it stays. Texts from a job are shown without control characters.
What programs read is in `wancli.report.json_stream` and `wancli.report.openjd_progress`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, TextIO

from wancli.units import pluralize

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from wancli.engine.outcome import Outcome
    from wancli.errors import ExitStatus
    from wancli.plan.shot import Plan

Mode = Literal["auto", "bar", "plain", "none"]

_LINE_SECONDS = 10.0  # plain lines: not before this much time and this share of the steps has passed
_LINE_SHARE = 0.1


class Phase(Protocol):
    """A running phase: `advance()` after each step, with a word on it if there is one."""

    def advance(self, n: int = 1, note: str = "") -> None: ...


class Progress:
    """Shows nothing; the other kinds override. `phase()` is a `with` block around a counted loop.

    A context: it learns of the error that its command ends by."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_plan(self, plan: Plan) -> None:
        """What the batch is going to be."""

    def on_outcome(self, outcome: Outcome) -> None:
        """What became of a shot."""

    def on_end(self, status: ExitStatus, report: Path | None) -> None:
        """What the command will exit with, and where its report is."""

    @contextmanager
    def phase(self, shot: str, name: str, total: int, ids: Sequence[str] = ()) -> Iterator[Phase]:  # noqa: ARG002
        """`shot` is what people read; `ids` are those of the shots, unless it is one and `shot` its id."""
        yield _SilentPhase()

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that may be wrong, and does not stop the work."""


def create_progress(stream: TextIO, mode: Mode = "auto") -> Progress:
    """The kind of progress that suits a stream; `auto` draws bars only on a capable terminal."""
    if mode == "auto":
        mode = "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    kinds = {"bar": _Bars, "plain": _PlainLines}
    return kinds[mode](stream) if mode in kinds else Progress()


def span(seconds: float) -> str:
    """A duration for people: 0.4s, 12s, 3:05, 1:02:03."""
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_printable(text: str) -> str:
    """Text that cannot move the cursor or turn the writing direction: such characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# What each phase counts, where it is not steps.
_UNITS = {"encode": "prompt", "decode": "frame", "compare": "video", "draw": "file", "probe": "block run"}


def _format_total(name: str, total: int) -> str:
    return pluralize(total, _UNITS.get(name, "step"))


def _describe_end(name: str, done: int, total: int) -> str:
    """How a phase ended that raised nothing: somebody may have asked for its end."""
    return "done in" if done >= total else f"stopped after {done} of {_format_total(name, total)} and"


class _SilentPhase:
    def advance(self, n: int = 1, note: str = "") -> None: ...


class _LinePhase:
    def __init__(self, lines: _PlainLines, title: str, total: int) -> None:
        self._lines, self._title, self._total = lines, title, total
        self.done = self._shown = 0
        self._began = self._shown_at = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        moved = self.done - self._shown >= _LINE_SHARE * self._total
        if moved and now - self._shown_at >= _LINE_SECONDS and self.done < self._total:
            self._shown, self._shown_at = self.done, now
            left = (now - self._began) / self.done * (self._total - self.done)
            tail = f", {note}" if note else ""
            self._lines.note(f"{self._title}: {self.done}/{self._total}, ETA {span(left)}{tail}")


class _PlainLines(Progress):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def phase(self, shot: str, name: str, total: int, ids: Sequence[str] = ()) -> Iterator[Phase]:  # noqa: ARG002
        title = f"{name} {shot}"
        self.note(f"{title}: started, {_format_total(name, total)}")
        began = time.monotonic()
        phase = _LinePhase(self, title, total)
        try:
            yield phase
        except BaseException:
            self.note(f"{title}: stopped after {span(time.monotonic() - began)}")
            raise
        self.note(f"{title}: {_describe_end(name, phase.done, total)} {span(time.monotonic() - began)}")

    def note(self, text: str) -> None:
        self._stream.write(make_printable(text) + "\n")
        self._stream.flush()

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")


class _BarPhase:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=n, note=make_printable(note), refresh=True)


class _Bars(Progress):
    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, force_terminal=True, highlight=False)

    @contextmanager
    def phase(self, shot: str, name: str, total: int, ids: Sequence[str] = ()) -> Iterator[Phase]:  # noqa: ARG002
        began = time.monotonic()
        ending = "[red]stopped after[/]"
        try:
            with self._bars() as bars:
                task = bars.add_task(name, total=total, shot=make_printable(shot), note="")
                yield _BarPhase(bars, task)
            done = round(bars.tasks[task].completed)
            ending = f"[{'green' if done >= total else 'red'}]{_describe_end(name, done, total)}[/]"
        finally:
            after = f"{ending} {span(time.monotonic() - began)}"
            self._line(f"{name} {shot}: ", after=after)

    def _bars(self) -> RichProgress:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        shot = Column(no_wrap=True, overflow="ellipsis", max_width=34)
        note = Column(no_wrap=True, overflow="ellipsis", max_width=18)
        return RichProgress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[shot]}", markup=False, table_column=shot),
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
