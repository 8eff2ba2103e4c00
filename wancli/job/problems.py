"""Collect the problems of a job, so that all of them are told at once, in the order of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from wancli.errors import EntryError, JobError, strip_traceback


class Problems:
    """The errors of parts of a job that do not depend on one another."""

    def __init__(self) -> None:
        self.errors: list[JobError | EntryError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the JobError or EntryError of a part; what the part was to set is then not set."""
        try:
            yield
        except (JobError, EntryError) as error:
            strip_traceback(error)
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raise one error with the lines and hints of all, EntryError if only embedding files are wrong."""
        if not self.errors:
            return
        lines = sort_by_line(line for error in self.errors for line in str(error).splitlines())
        hints = dict.fromkeys(line for error in self.errors for line in error.hint.splitlines())
        kind = JobError if any(isinstance(error, JobError) for error in self.errors) else EntryError
        raise kind("\n".join(lines), hint="\n".join(hints))


def sort_by_line(problems: Iterable[str]) -> list[str]:
    """Sort problems of the form `job.yaml:12: ...` by line, file after file, each once; others come last."""
    files: dict[str, int] = {}

    def place(problem: str) -> tuple[int, int]:
        match = re.match(r"(.*?):(\d+): ", problem)
        file = match[1] if match else ""
        return (files.setdefault(file, len(files)), int(match[2])) if match else (10**9, 0)

    return sorted(dict.fromkeys(problems), key=place)
