"""Streams that nobody reads. A stream is a pair of descriptors: the reader's and the writer's."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Stream = tuple[int, int]
CTRL_Q, CTRL_S = b"\x11", b"\x13"


def small_pipe() -> Stream:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    return read, write


def small_socket() -> Stream:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return ours.detach(), theirs.detach()


def non_blocking_pipe() -> Stream:
    read, write = small_pipe()
    os.set_blocking(write, False)  # as another process that shares it may have made it
    return read, write


def suspended_terminal() -> Stream:
    """A terminal on which somebody has pressed Ctrl-S."""
    controller, terminal = pty.openpty()
    settings = termios.tcgetattr(terminal)
    settings[1] &= ~termios.OPOST  # or \n becomes \r\n
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    os.write(controller, CTRL_S)
    while select.select([], [terminal], [], 0)[1]:  # until the kernel has seen it
        time.sleep(0.001)
    return controller, terminal


@contextmanager
def unread(make: Callable[[], Stream]) -> Iterator[Stream]:
    """A stream that takes nothing more, and the end at which it could be read."""
    reader, fd = make()
    os.set_blocking(fd, False)
    with suppress(BlockingIOError):
        while os.write(fd, b"." * 4096):
            pass
    os.set_blocking(fd, True)
    try:
        yield reader, fd
    finally:
        for end in (reader, fd):
            os.close(end)
