"""Run with the streams, the environment and the umask of another process, for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from wancli.errors import MachineError
from wancli.farm import local_socket
from wancli.farm.messages import Request
from wancli.stdio import close_writer, open_writer


@contextmanager
def use_client_environment(request: Request, streams: Sequence[int]) -> Iterator[None]:
    """Give this process the client's streams, environment and umask while the block runs.

    Raises BrokenPipeError if the last of the output could not be written.
    """
    own_streams, own_python = [os.dup(fd) for fd in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    own_environment = dict(os.environ)
    own_mask = os.umask(request.umask)
    fixed = {name: value for name, value in own_environment.items() if name in local_socket.FIXED_VARIABLES}
    try:
        _set_environment({**request.environment, **fixed})
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
        sys.stdin = _open_stdin()
        sys.stdout, sys.stderr = (
            open_writer(fd, encoding=wanted.encoding, write_through=wanted.write_through, patient=False)
            for fd, wanted in enumerate(request.written, start=1)
        )
        yield
        try:
            sys.stdout.flush()
        except (BrokenPipeError, MachineError):
            raise BrokenPipeError from None
    finally:
        for writer in (sys.stdout, sys.stderr):
            if writer not in own_python:
                close_writer(writer)
        sys.stdin, sys.stdout, sys.stderr = own_python
        for fd, stream in enumerate(own_streams):
            os.dup2(stream, fd)
            os.close(stream)
        os.umask(own_mask)
        _set_environment(own_environment)


def _open_stdin() -> TextIO:
    return open(0, encoding="utf-8", errors="surrogateescape", closefd=False)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})
