"""Streams that nobody reads: what is written to them is kept or dropped, and holds up nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from unread import CTRL_Q, Stream, non_blocking_pipe, small_pipe, small_socket, suspended_terminal

from wancli import stream_writer
from wancli.stream_writer import StreamWriter

STREAMS = [small_pipe, small_socket, non_blocking_pipe, suspended_terminal]


@pytest.fixture(params=STREAMS, ids=lambda make: make.__name__)
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    make: Callable[[], Stream] = request.param
    ends = make()
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def writer_to(fd: int, *, patient: bool = False) -> StreamWriter:
    return StreamWriter(fd, lambda lines: f"{lines} dropped\n", patient=patient)


def read_until(fd: int, end: bytes) -> bytes:
    if os.isatty(fd):  # the controller: somebody presses Ctrl-Q
        os.write(fd, CTRL_Q)
    got = b""
    while not got.endswith(end):
        got += os.read(fd, 1 << 16)
    return got


def test_an_unread_stream_holds_up_nobody_and_its_reader_gets_all_that_is_no_progress(stream: Stream) -> None:
    reader, fd = stream
    writer = writer_to(fd)
    for number in range(3000):
        writer.put(b"result %d\n" % number, expendable=False)
        writer.put(b"step %d\n" % number + b"." * 200 + b"\n", expendable=True)
    assert writer.deliver(0.05) > 3000
    writer.put(b"the end\n", expendable=False)
    lines = read_until(reader, b"the end\n").splitlines()
    assert [line for line in lines if line.startswith(b"result")] == [b"result %d" % n for n in range(3000)]
    gaps = sum(int(line.split()[0]) for line in lines if line.endswith(b"dropped"))
    progress = [line for line in lines if line.startswith((b"step", b"."))]
    assert len(progress) + gaps == 6000
    assert sum(map(len, progress)) < 2 * stream_writer.MAX_EXPENDABLE
    assert progress[-2] == b"step 2999"  # the oldest are dropped
    assert writer.deliver(5) == 0
    writer.close()


def test_a_patient_writer_waits_until_all_is_read() -> None:
    reader, fd = small_pipe()
    text = b"".join(b"%d\n" % n for n in range(20_000))
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(read_until(reader, b"19999\n")))
    writer = writer_to(fd, patient=True)
    thread.start()
    writer.put(text, expendable=False)
    thread.join()
    assert got == [text]
    writer.close()


def test_what_is_stuck_never_ends_in_a_later_stream_of_the_same_number() -> None:
    reader, fd = small_pipe()
    writer = writer_to(fd)
    writer.put(bytes(1 << 16), expendable=False)
    writer.close()
    later, write = os.pipe()
    os.dup2(write, fd)
    while os.read(reader, 1 << 16):  # until the thread has closed its end
        pass
    os.set_blocking(later, False)
    with pytest.raises(BlockingIOError):
        os.read(later, 1)
    for number in (reader, fd, later, write):
        os.close(number)


def test_a_reader_who_is_gone_is_remembered_and_the_rest_discarded() -> None:
    reader, fd = small_pipe()
    writer = writer_to(fd)
    os.close(reader)
    writer.put(b"a\n", expendable=False)
    assert writer.deliver(5) == 0
    assert isinstance(writer.error, BrokenPipeError)
    writer.put(b"b\n", expendable=False)
    assert writer.deliver(0) == 0
    writer.close()
    os.close(fd)


def test_without_threads_it_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    reader, fd = os.pipe()
    writer = writer_to(fd)
    for text in (b"a\n", b"b\n"):
        writer.put(text, expendable=True)
    assert os.read(reader, 100) == b"a\nb\n"
    writer.close()
    writer.close()  # once more is nothing
    for number in (reader, fd):
        os.close(number)
