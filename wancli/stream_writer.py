"""Write to a stream in a thread, so that a reader who does not read holds up nothing.

`put()` queues bytes. A thread writes them, and waits in the place of the work if the pipe, the socket or the
terminal takes nothing. Without such a reader, the caller waits until its bytes are written: the streams keep
their order, and nothing is lost with the process. Once a reader is behind, nobody waits for it, and of what
is expendable the oldest is dropped. The reader finds a line in its place that says so.

What C libraries write to descriptor 2 themselves goes past the queue and may wait: if the descriptor were a
pipe to this thread, the last words of a process that crashes would be lost with it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from wancli.signals import STOP_SIGNALS

MAX_EXPENDABLE = 1 << 18  # bytes of a queue that may be dropped; more are
_BEHIND_AFTER = 0.05  # seconds after which a reader counts as behind
_PIECE = 4096  # bytes of one write: a pipe with a free page takes them


@dataclass
class _Entry:
    data: bytes
    expendable: bool
    dropped_lines: int = 0  # if it stands for entries that were dropped


class StreamWriter:
    """A queue and the thread that writes it to a descriptor.

    `describe_gap` makes the line that stands for a number of dropped lines. With `patient`, callers wait for
    the reader without a limit, as programs do that have no other work.
    """

    def __init__(self, fd: int, describe_gap: Callable[[int], str], *, patient: bool) -> None:
        self.patient = patient
        self.describe_gap = describe_gap
        self.error: OSError | None = None  # after it, all is discarded
        self._fd = os.dup(fd)  # a stuck write must not end in a later stream of this number
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._behind = self._closed = False
        self._taken_at = 0.0

    def put(self, data: bytes, *, expendable: bool) -> None:
        """Queue bytes, and wait for the reader if it is not behind."""
        with self._changed:
            if self.error or self._closed:
                return
            self._queue.append(_Entry(data, expendable))
            self._drop_oldest()
            self._start()
            self._changed.notify_all()
            if not self.patient and not self._behind:
                self._behind = not self._changed.wait_for(lambda: not self._queue, _BEHIND_AFTER)
        while self.patient and not self._wait_until_empty(1.0):
            pass

    def deliver(self, seconds: float) -> int:
        """Wait until all is written, or the reader took nothing for so long; return the lines left."""
        self._taken_at = time.monotonic()
        while not self._wait_until_empty(min(0.2, seconds)):
            if time.monotonic() - self._taken_at >= seconds:
                break
        with self._changed:
            return sum(entry.data.count(b"\n") for entry in self._queue)

    def close(self) -> None:
        """Discard what is left, and end the thread, if need be when its reader is gone."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            if self._thread is None:
                os.close(self._fd)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Close the descriptor in a fork, which has a copy of the queue, and not the thread."""
        os.close(self._fd)

    def _wait_until_empty(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, seconds)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="wancli-stream", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started: write here, as all programs do
                self._thread = None
                self._write_entry(self._queue[0])
                self._finish_entry()

    def _drop_oldest(self) -> None:
        """Drop expendable entries beyond the limit, but not the first one, which is being written."""
        surplus = sum(len(entry.data) for entry in self._queue if entry.expendable) - MAX_EXPENDABLE
        index = 1
        while surplus > 0 and index < len(self._queue) - 1:
            entry = self._queue[index]
            if not entry.expendable:
                index += 1
                continue
            surplus -= len(entry.data)
            before = self._queue[index - 1]
            if index > 1 and before.dropped_lines:
                before.dropped_lines += entry.data.count(b"\n")
                del self._queue[index]
            else:
                self._queue[index] = _Entry(b"", False, max(1, entry.data.count(b"\n")))
                index += 1

    def _write_all(self) -> None:
        with suppress(OSError):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for the main thread
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    os.close(self._fd)
                    return
                entry = self._queue[0]
            self._write_entry(entry)
            with self._changed:
                self._finish_entry()

    def _finish_entry(self) -> None:
        if self._queue:  # close() may have emptied it
            self._queue.popleft()
        if self.error:
            self._queue.clear()
        if not self._queue:
            self._behind = False
        self._changed.notify_all()

    def _write_entry(self, entry: _Entry) -> None:
        gap = entry.dropped_lines
        rest = memoryview(self.describe_gap(gap).encode() if gap else entry.data)
        while rest and not self._closed:
            try:
                rest = rest[os.write(self._fd, rest[:_PIECE]) :]
                self._taken_at = time.monotonic()
            except BlockingIOError:  # another process made the stream non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as error:
                self.error = error
                return
