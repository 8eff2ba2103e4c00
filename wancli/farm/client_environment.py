"""Standing in for another process: its streams, its environment and its umask, for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from wancli.errors import MachineError
from wancli.farm import local_socket
from wancli.stdio import writer


@contextmanager
def standing_in(request: dict[str, Any], streams: Sequence[int]) -> Iterator[None]:
    """In the block this process has the client's streams, environment and umask. Raises BrokenPipeError where
    the last of the output reached nobody."""
    own_streams, own_python = [os.dup(fd) for fd in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    own_environment = dict(os.environ)
    own_mask = os.umask(request["umask"])
    fixed = {name: value for name, value in own_environment.items() if name in local_socket.FIXED}
    try:
        _set_environment({**request["environment"], **fixed})
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
        out, err = request["written"]
        sys.stdin, sys.stdout, sys.stderr = _reader(), writer(1, **out), writer(2, **err)
        yield
        try:
            sys.stdout.flush()
        except (BrokenPipeError, MachineError):
            sys.stdout.flush()  # to nowhere, not to the server's own
            raise BrokenPipeError from None
    finally:
        sys.stdin, sys.stdout, sys.stderr = own_python
        for fd, stream in enumerate(own_streams):
            os.dup2(stream, fd)
            os.close(stream)
        os.umask(own_mask)
        _set_environment(own_environment)


def _reader() -> TextIO:
    return open(0, closefd=False)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})
