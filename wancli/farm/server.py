"""`wancli serve`: one process that renders for many commands, with networks that stay in memory.

Requests run one after the other in the main thread, each as its command line would run in a process of its
own: on the client's streams, in its folder, environment and umask. A thread forwards the client's signals; if
the client is gone, it asks the render to stop. Waiting requests queue at the socket.
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

from wancli.engine.networks import ModelCache, check_weights, prepare_device
from wancli.errors import EntryError, ExitStatus, MachineError, Stopped
from wancli.farm import local_socket, messages
from wancli.farm.client_environment import use_client_environment
from wancli.farm.messages import Request
from wancli.resources.measure import oom_as_error
from wancli.signals import STOP_SIGNALS, StartHandler, handle_signals, restore_signals

if TYPE_CHECKING:
    from wancli.plan.render_plan import Plan

# From a command line, the networks in memory and its start time to its exit code.
RunCommand = Callable[[list[str], ModelCache, float], int]

_REQUEST_TIMEOUT = 10.0  # seconds for a request to arrive
_OUTPUT_LOST = 120  # as Python itself ends if the last of its output cannot be written
# After these the networks are whole. Other errors may come from anywhere, so the networks are loaded again.
KEEPS_NETWORKS = (
    ExitStatus.OK,
    ExitStatus.SOME_FAILED,
    ExitStatus.USAGE,
    ExitStatus.STOPPED,
    ExitStatus.INTERRUPTED,
)


def preload(plan: Plan | None, model_cache: ModelCache) -> None:
    """Import what a render needs, and load the networks of the plan's first shot.

    Raises what a render would raise if they are damaged or do not fit.
    """
    from wancli.engine import (
        batch,  # noqa: F401
        decode_stage,  # noqa: F401
    )
    from wancli.plan import (
        backends,
        memory_policy,
    )
    from wancli.sampling import denoise  # noqa: F401
    from wancli.weights import loader  # noqa: F401
    from wancli.weights.lora import patch  # noqa: F401

    if plan is None:
        return
    shot = plan.shots[0]
    prepare_device(shot.model.device)
    backends.check_backends(shot.model)
    check_weights(shot.model.checkpoint)
    memory_policy.require(shot, plan.schedule.placement(shot), encoded=True)
    with oom_as_error("loading", str(shot.model.checkpoint.root)):
        loaded = model_cache.get(shot.model, lazy=False)
        _ = loaded.transformer(shot.model.first_expert), loaded.vae


class Server:
    """The loop that runs the clients' command lines, until a signal or `idle` seconds without a request.

    SIGTERM or SIGINT end it, in the middle of a render as they end a render: with its states saved. For the
    main thread only.
    """

    def __init__(self, run: RunCommand, model_cache: ModelCache, *, idle: float | None) -> None:
        self._run, self._model_cache, self._idle = run, model_cache, idle
        self._fingerprint = local_socket.process_fingerprint()
        # running: a client's command. busy: the server's own work between commands.
        self._state: Literal["waiting", "running", "busy"] = "busy"
        self._signalled = False  # by a signal that no client sent
        self._received: Counter[int] = Counter()  # signals since the current command began, from anyone
        self._relayed: Counter[int] = Counter()  # those of them that its client sent
        self._wakeup_fd: int | None = None  # where Python writes the number of each signal

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """End the server on a signal, unless it was started to ignore that one, as SIGHUP by nohup.

        A Ctrl-C that the starting script ignores does not reach it, but that of a client does.
        """
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            with suppress(OSError):  # it leads a session of its own
                os.setpgid(0, 0)
        self._wakeup_fd, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        former_fd = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        before = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_signal)}
        before |= handle_signals([n for n in STOP_SIGNALS if n != signal.SIGINT], self._on_signal)
        try:
            yield
        finally:
            restore_signals(before)
            signal.set_wakeup_fd(former_fd)
            os.close(self._wakeup_fd)
            os.close(written)
            self._wakeup_fd = None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Handle a signal, except while a render handles signals itself."""
        if self._state == "running" or (self._state == "waiting" and self._stop_requested()):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    def _stop_requested(self) -> bool:
        """Return whether a signal came that no client sent.

        A render handles its signals itself, and its exit code does not tell who sent them. So signals are
        counted where Python receives them.
        """
        if self._wakeup_fd is not None:
            with suppress(BlockingIOError):
                while numbers := os.read(self._wakeup_fd, 512):
                    self._received.update(numbers)
        self._signalled = self._signalled or any(
            self._received[number] > self._relayed[number] for number in STOP_SIGNALS
        )
        return self._signalled

    def serve(self, listener: socket.socket) -> None:
        while not self._stop_requested():
            connection = self._accept(listener)
            if connection is None:
                return
            with connection:
                self._handle(connection)

    def _accept(self, listener: socket.socket) -> socket.socket | None:
        """Wait for a client; return None after `idle` seconds or a signal."""
        try:
            self._state = "waiting"
            waker = [] if self._wakeup_fd is None else [self._wakeup_fd]  # a signal just before the wait
            awaited = [listener.fileno(), *waker]
            if self._stop_requested() or awaited[0] not in select.select(awaited, [], [], self._idle)[0]:
                return None
            return listener.accept()[0]
        except (KeyboardInterrupt, Stopped):
            return None
        finally:
            self._state = "busy"

    def _handle(self, connection: socket.socket) -> None:
        """Run the command of one client and send it the exit code."""
        pid, user = local_socket.peer_credentials(connection)
        if user != os.geteuid():
            local_socket.send_message(
                connection, {"refused": f"you are user {user}, the server is of user {os.geteuid()}"}
            )
            return
        connection.settimeout(_REQUEST_TIMEOUT)
        _reply(connection, {"turn": os.getpid()})
        try:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        except OSError:
            return
        try:
            message = local_socket.MessageReader(connection).read()
            connection.settimeout(None)
            if message is None or len(streams) != 3:  # the client is gone
                return
            began = time.monotonic()
            if why := local_socket.describe_difference(self._fingerprint, messages.identity_of(message)):
                _reply(connection, {"refused": why})
                return
            try:
                request = messages.Request.parse(message, Path("the request"))
            except EntryError as error:
                _reply(connection, {"refused": error.message})
                return
            _reply(connection, {"begun": os.getpid()})
            code = self._run_in_folder(connection, request, streams)
        finally:
            for stream in streams:
                os.close(stream)
        _reply(connection, {"code": code})
        took = time.monotonic() - began
        sys.stderr.write(
            f"wancli serve: process {pid} in {request.folder!r}: exit code {code} after {took:.1f} s\n"
        )
        if code not in KEEPS_NETWORKS:
            self._model_cache.clear()
        if code != ExitStatus.OK:
            gc.collect()  # frees what the error refers to

    def _run_in_folder(self, connection: socket.socket, request: Request, streams: Sequence[int]) -> int:
        try:
            with use_client_environment(request, streams):
                try:
                    os.chdir(request.folder)
                except OSError as error:
                    sys.stderr.write(f"wancli: {request.folder!r}: {error.strerror}\n")
                    return ExitStatus.MACHINE
                return self._run_command(connection, request.arguments, request.began)
        except BrokenPipeError:
            return _OUTPUT_LOST
        finally:
            os.chdir("/")

    def _run_command(self, connection: socket.socket, arguments: list[str], began: float) -> int:
        relay = threading.Thread(target=self._relay_signals, args=[connection], daemon=True)
        try:
            self._state = "running"
            handle_signals(STOP_SIGNALS, StartHandler(self._on_signal, _count_only))
            relay.start()
            code = self._run(arguments, self._model_cache, began)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except KeyboardInterrupt:
            code = ExitStatus.INTERRUPTED
        except Stopped:
            code = ExitStatus.STOPPED
        except Exception:  # as Python itself ends by it: for instance if the client closed its stderr
            with suppress(OSError):
                traceback.print_exc()
            code = 1
        finally:
            self._state = "busy"
            handle_signals(STOP_SIGNALS, self._on_signal)
        with suppress(OSError):  # the client is gone
            connection.shutdown(socket.SHUT_RD)
        relay.join()
        self._stop_requested()
        self._received.clear()
        self._relayed.clear()
        return code

    def _relay_signals(self, connection: socket.socket) -> None:
        """Raise the client's signals in the main thread, and SIGTERM if the client is gone or sends none.

        If the client already requested a stop, its end raises no SIGTERM: a second signal would end the
        render without saving.
        """
        reader = local_socket.MessageReader(connection)
        main = threading.main_thread().ident
        assert main is not None
        while True:
            received = messages.stop_signal_of(reader.read() or {})
            number = received or signal.SIGTERM
            if signal.getsignal(number) is signal.SIG_IGN:
                number = signal.SIGTERM
            if self._state != "running" or (received is None and self._relayed):
                return
            self._relayed[number] += 1
            signal.pthread_kill(main, number)
            if received is None:
                return


def _count_only(_: int, __: FrameType | None) -> None:
    """Leave a render that is done its exit code; Python's wakeup descriptor has the signal for the server."""


def _reply(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # the client is gone
        local_socket.send_message(connection, message)


def stop_server(path: Path) -> None:
    """End the server at a path once its render is saved, and wait for that. Raises MachineError."""
    connection = local_socket.connect(path)
    if connection is None:
        hint = "It has ended; or it uses another socket, which --socket PATH names."
        raise MachineError("no server found", where=str(path), hint=hint)
    with connection:
        pid, _ = local_socket.peer_credentials(connection)
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            select.select([process], [], [])
        finally:
            os.close(process)
