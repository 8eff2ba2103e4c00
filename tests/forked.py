"""Real processes that start with everything imported: forks of a process without threads.

A program that renders spends seconds on its imports and milliseconds on its work. Tests of the start of a
process, of imports and of the shell use `subprocess`. All other tests that need a process of their own, to
kill, suspend or stop it, use this module.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn, Self

from unchanging import FOLDERS, identify_once

from wancli.plan import planner
from wancli.video import ffmpeg

WANCLI = "from wancli.__main__ import main; main()"


class Forked:
    """A process that runs `program` with `arguments`, with the interface of `subprocess.Popen`."""

    def __init__(
        self,
        source: socket.socket,
        program: str,
        arguments: Sequence[object],
        *,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        umask: int = -1,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] = subprocess.PIPE,
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        self.stdout, out = _pipe_ends(stdout)
        self.stderr, err = _pipe_ends(stderr)
        _, into = _pipe_ends(stdin)
        self._status, status = os.pipe()
        said = {"program": program, "arguments": self.args, "umask": umask}
        said |= {"cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        said |= {"unchanging": [str(folder) for folder in FOLDERS]}
        socket.send_fds(source, [json.dumps(said).encode()], [into, out, err, status])
        for fd in {into, out, err, status} - {_fileno(stdin), _fileno(stdout), _fileno(stderr)}:
            os.close(fd)
        self.pid = int(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            got = os.read(self._status, 1)
            assert got, "the process was lost"
            line += got
        return line

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._line())
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said = ["", ""]

        def listen(number: int, stream: IO[str]) -> None:
            with stream:
                said[number] = stream.read()

        streams = [(n, stream) for n, stream in enumerate((self.stdout, self.stderr)) if stream]
        threads = [threading.Thread(target=listen, args=one, daemon=True) for one in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return said[0], said[1]

    def until_suspended(self) -> None:
        """Wait until the process is suspended, as by SIGSTOP."""
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self.poll() is None
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _fileno(stream: int | IO[Any]) -> int:
    return stream if isinstance(stream, int) else stream.fileno()


def _pipe_ends(stream: int | IO[Any]) -> tuple[IO[str] | None, int]:
    """Return our end of a stream, if there is one, and the end of the process."""
    match _fileno(stream):
        case subprocess.DEVNULL:
            return None, os.open(os.devnull, os.O_RDWR)
        case subprocess.PIPE:
            ours, theirs = os.pipe()
            return os.fdopen(ours, encoding="utf-8"), theirs
        case number:
            return None, number


@cache
def _fork_server() -> socket.socket:
    """Start the process that is forked; it ends with this process. Returns the socket for requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def start(*arguments: object, program: str = WANCLI, **options: Any) -> Forked:
    """Start `wancli` with these arguments, or another program."""
    return Forked(_fork_server(), program, arguments, **options)


def run(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run`."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


# ---- in the process that is forked ----


def _import_all() -> None:
    """Import all that a render may import, and read what no test changes.

    A fork must have no thread to lose.
    """
    gc.disable()  # nothing of this is garbage
    import pkgutil
    from importlib import import_module

    import torch
    from transformers import UMT5EncoderModel  # noqa: F401

    import wancli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(wancli.__path__, "wancli."):
        if module.name not in ("wancli.__main__", "wancli.farm.ray_driver"):
            import_module(module.name)
    identify_once()
    for folder in FOLDERS:
        planner.identify(folder)
    ffmpeg.list_encoders()  # both remember what the program answers
    ffmpeg.keep_frames_arguments()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads that a fork would lose"
    gc.enable()
    gc.freeze()  # or each fork copies the pages of all objects, to count what refers to them


def _identify(folders: Iterable[Path]) -> None:
    """Read the headers of checkpoints that no test changes, so that no fork reads them."""
    for folder in set(folders) - FOLDERS:
        FOLDERS.add(folder)
        planner.identify(folder)


def _serve_forks(source: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in such a fork, and None after the last one."""
    while True:
        message, fds, *_ = socket.recv_fds(source, 2**20, 4)
        if not message:
            return None
        with suppress(ChildProcessError):  # those that are over by now
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        _identify(map(Path, json.loads(message)["unchanging"]))
        if os.fork() == 0:
            break
        for fd in fds:
            os.close(fd)
    source.close()
    *streams, status = fds
    pid = os.fork()
    if pid:  # waits for the other, and tells its number and how it ended
        for fd in streams:
            os.close(fd)
        os.write(status, b"%d\n" % pid)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(status)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    said: dict[str, Any] = json.loads(message)
    return said


def _run_and_exit(program: str) -> NoReturn:
    """Run a program and exit as Python would, except that the imported modules are not freed."""
    code: Any = 0
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        code = traceback.format_exc()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as source:
        _import_all()
        said = _serve_forks(source)
    if said:
        os.chdir(said["cwd"])
        os.environ.clear()
        os.environ.update(said["env"])
        if said["umask"] >= 0:
            os.umask(said["umask"])
        sys.argv = ["wancli", *said["arguments"]]
        _run_and_exit(said["program"])
