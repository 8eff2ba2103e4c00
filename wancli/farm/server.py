"""`wancli serve`: one process that renders for many commands, with networks that stay in memory.

One request after the other runs in the main thread as its command line would in a process of its own: on the
client's streams, in its folder, environment and umask. A thread hands its signals on; where the client
is gone the render is asked to stop. What waits its turn waits in the socket.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from wancli.engine.networks import ModelCache, check_device, check_weights
from wancli.errors import ExitStatus, MachineError, Stopped
from wancli.farm import local_socket
from wancli.farm.client_environment import standing_in
from wancli.resources.measure import oom_as_error

if TYPE_CHECKING:
    from wancli.plan.shot import Plan

Run = Callable[
    [list[str], ModelCache, float], int
]  # a command line, networks and when it began, to its exit code

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PATIENCE = 10.0  # seconds for a request to arrive
_LOST = 120  # as Python itself ends where the last of its output reaches nobody
# Ends after which a network is whole. Others come from anywhere, so that it is loaded anew.
_SOUND = (
    ExitStatus.OK,
    ExitStatus.SOME_FAILED,
    ExitStatus.USAGE,
    ExitStatus.STOPPED,
    ExitStatus.INTERRUPTED,
)


def prepare(plan: Plan | None, kept: ModelCache) -> None:
    """Imports what a render needs, and loads the networks of the plan's first shot. Raises what a render
    would where they are damaged or do not fit."""
    from wancli.engine import (
        batch,  # noqa: F401
        decode_stage,  # noqa: F401
    )
    from wancli.plan import (
        backends,
        memory_policy,
    )
    from wancli.report import (
        batch_report,  # noqa: F401
        terminal,  # noqa: F401
    )
    from wancli.sampling import denoise  # noqa: F401
    from wancli.weights import loader  # noqa: F401
    from wancli.weights.lora import patch  # noqa: F401

    if plan is None:
        return
    shot = plan.shots[0]
    check_device(shot.model.device)
    backends.check(shot.model)
    check_weights(shot.model.checkpoint)
    memory_policy.require(shot, plan.schedule.placement(shot), encoded=True)
    with oom_as_error("loading", str(shot.model.checkpoint.root)):
        loaded = kept.get(shot.model, lazily=False)
        _ = loaded.transformer(shot.model.first_expert), loaded.vae


class Server:
    """Runs what clients ask for, until it is told to end or nobody has asked for anything for `idle` seconds.

    SIGTERM or SIGINT end it, in the middle of a render as they end a render: saved, or with its planning.
    For the main thread.
    """

    def __init__(self, run: Run, kept: ModelCache, *, idle: float | None) -> None:
        self._run, self._kept, self._idle = run, kept, idle
        self._identity = local_socket.identity()
        self._state: Literal["waiting", "running", "busy"] = "busy"  # running a command, busy with itself
        self._signalled = False  # by a signal that no client sent
        self._came: Counter[int] = Counter()  # signals since the command began that runs, whoever heard them
        self._relayed: Counter[int] = Counter()  # those of its client among them
        self._woken: int | None = None  # where Python writes the number of each signal that comes

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Signals end the server. Where Ctrl-C is for the script that started it, it does not get there."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            with suppress(OSError):  # it leads a session of its own
                os.setpgid(0, 0)
        self._woken, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        woken = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            os.close(self._woken)
            os.close(written)
            self._woken = None

    def _heard(self, number: int, _: FrameType | None) -> None:
        """A signal, but for the time in which a render listens by itself."""
        if self._state == "running" or (self._state == "waiting" and self._ending()):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    def _ending(self) -> bool:
        """Whether a signal came that no client sent. A render hears its signals itself, so that they are
        counted where Python meets them, and its exit code says nothing about them."""
        if self._woken is not None:
            with suppress(BlockingIOError):
                while numbers := os.read(self._woken, 512):
                    self._came.update(numbers)
        self._signalled = self._signalled or any(
            self._came[number] > self._relayed[number] for number in _SIGNALS
        )
        return self._signalled

    def serve(self, listener: socket.socket) -> None:
        while not self._ending():
            connection = self._next(listener)
            if connection is None:
                return
            with connection:
                self._answer(connection)

    def _next(self, listener: socket.socket) -> socket.socket | None:
        try:
            self._state = "waiting"
            if self._ending() or not select.select([listener], [], [], self._idle)[0]:
                return None
            return listener.accept()[0]
        except (KeyboardInterrupt, Stopped):
            return None
        finally:
            self._state = "busy"

    def _answer(self, connection: socket.socket) -> None:
        pid, user = local_socket.peer(connection)
        if user != os.geteuid():
            local_socket.send(
                connection, {"refused": f"you are user {user}, this is one of user {os.geteuid()}"}
            )
            return
        connection.settimeout(_PATIENCE)
        _reply(connection, {"turn": os.getpid()})
        try:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        except OSError:
            return
        try:
            request = local_socket.Lines(connection).next()
            connection.settimeout(None)
            if request is None or len(streams) != 3:  # it has gone
                return
            began = time.monotonic()
            if why := local_socket.difference(self._identity, request.get("identity", {})):
                _reply(connection, {"refused": why})
                return
            _reply(connection, {"begun": os.getpid()})
            code = self._rendered(connection, request, streams)
        finally:
            for stream in streams:
                os.close(stream)
        _reply(connection, {"code": code})
        took = time.monotonic() - began
        sys.stderr.write(
            f"wancli serve: process {pid} in {request['folder']!r}: exit code {code} after {took:.1f} s\n"
        )
        if code not in _SOUND:
            self._kept.clear()
        if code != ExitStatus.OK:
            gc.collect()  # of what an error holds on to

    def _rendered(self, connection: socket.socket, request: dict[str, Any], streams: Sequence[int]) -> int:
        try:
            os.chdir(request["folder"])
        except OSError as error:
            with suppress(OSError):
                os.write(streams[2], f"wancli: {request['folder']!r}: {error.strerror}\n".encode())
            return ExitStatus.MACHINE
        try:
            with standing_in(request, streams):
                return self._command(connection, request)
        except BrokenPipeError:
            return _LOST
        finally:
            os.chdir("/")

    def _command(self, connection: socket.socket, request: dict[str, Any]) -> int:
        relay = threading.Thread(target=self._relay, args=[connection], daemon=True)
        try:
            self._state = "running"
            relay.start()
            code = self._run(request["arguments"], self._kept, request["began"])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except KeyboardInterrupt:
            code = ExitStatus.INTERRUPTED
        except Stopped:
            code = ExitStatus.STOPPED
        except Exception:  # as where Python ends by it: somebody closed its stderr
            with suppress(OSError):
                traceback.print_exc()
            code = 1
        finally:
            self._state = "busy"
        with suppress(OSError):  # it is gone
            connection.shutdown(socket.SHUT_RD)
        relay.join()
        self._ending()
        self._came.clear()
        self._relayed.clear()
        return code

    def _relay(self, connection: socket.socket) -> None:
        """Raises the client's signals in the main thread, and SIGTERM where it is gone before its end, unless
        it asked for that already: a second signal is for those who do not want to wait."""
        lines = local_socket.Lines(connection)
        main = threading.main_thread().ident
        assert main is not None
        while True:
            message = lines.next()
            number = signal.Signals[message["signal"]] if message else signal.SIGTERM
            if self._state != "running" or (message is None and self._relayed):
                return
            self._relayed[number] += 1
            signal.pthread_kill(main, number)
            if message is None:
                return


def _reply(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # it is gone
        local_socket.send(connection, message)


def stop(path: Path) -> None:
    """Ends the server there once its render is saved, and waits for that. Raises MachineError."""
    connection = local_socket.connect(path)
    if connection is None:
        hint = "It has ended; or it serves at another place, which --socket PATH names."
        raise MachineError("nobody serves there", where=str(path), hint=hint)
    with connection:
        pid, _ = local_socket.peer(connection)
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            select.select([process], [], [])
        finally:
            os.close(process)
