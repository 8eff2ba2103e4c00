"""Standard streams that are closed, full or without a reader, and file names that are not text."""

from __future__ import annotations

import ast
import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import forked
import pytest
from jobs import tiny_job, write_job

from wancli import stdio
from wancli.errors import MachineError

FULL = "/dev/full"


def wancli(
    *arguments: object, folder: Path, out: str | int, err: str | int = subprocess.PIPE
) -> tuple[int, str]:
    """Run the command with these files or descriptors; return its exit code, and stderr if that is a pipe."""
    with ExitStack() as files:
        out, err = (
            files.enter_context(Path(to).open("w")).fileno() if isinstance(to, str) else to
            for to in (out, err)
        )
        done = forked.run(*arguments, cwd=folder, stdout=out, stderr=err)
    return done.returncode, done.stderr


def shell(arguments: str, folder: Path) -> tuple[int, bytes]:
    """Run the command in a shell, in which a stream can be closed before Python starts."""
    program = f"{sys.executable} -c 'from wancli.__main__ import main; main()' {arguments}"
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        ["bash", "-c", program], cwd=folder, env=environment, capture_output=True, check=False
    )
    return done.returncode, done.stderr


def two_shots(folder: Path, model: Path) -> list[Path]:
    """Write a job of two shots, and return their videos."""
    write_job(folder, tiny_job(model, output="{id}.mp4", items=[{"id": "a"}, {"id": "b", "seed": 1}]))
    return [folder / "a.mp4", folder / "b.mp4"]


def test_streams_without_a_reader_keep_no_shot_from_being_rendered(
    tmp_path: Path, known: Path, lost_reader: int
) -> None:
    videos = two_shots(tmp_path, known)
    said = "render", "job.yaml", "--progress", "plain"
    assert wancli(*said, folder=tmp_path, out=lost_reader, err=lost_reader) == (0, "")
    assert all(path.exists() for path in videos)


def test_a_full_stderr_keeps_no_shot_from_being_rendered(tmp_path: Path, known: Path) -> None:
    videos = two_shots(tmp_path, known)
    said = "render", "job.yaml", "--progress", "plain"
    assert wancli(*said, folder=tmp_path, out=os.devnull, err=FULL) == (0, "")
    assert all(path.exists() for path in videos)


def test_a_full_stdout_keeps_no_shot_from_being_rendered_and_has_an_exit_code(
    tmp_path: Path, known: Path
) -> None:
    videos = two_shots(tmp_path, known)
    said = "wancli: stdout: cannot be written: No space left on device; the work continues\n"
    assert wancli("render", "job.yaml", "-q", folder=tmp_path, out=FULL) == (3, said)
    assert all(path.exists() for path in videos)


@pytest.mark.parametrize("line", ["render job.yaml 2>&- >&-", "render job.yaml -q --json-stream <&- >&-"])
def test_streams_that_are_closed_when_python_starts_keep_no_shot_from_being_rendered(
    tmp_path: Path, known: Path, line: str
) -> None:
    videos = two_shots(tmp_path, known)
    assert shell(line, tmp_path) == (0, b"")
    assert all(path.exists() for path in videos)


@pytest.mark.parametrize("command", ["plan job.yaml", "schema", "errors --json", "plan job.yaml --json"])
def test_results_that_cannot_be_written_are_no_bug_and_no_success(tmp_path: Path, command: str) -> None:
    write_job(tmp_path, tiny_job())
    said = "wancli: stdout: cannot be written: No space left on device\n"
    assert wancli(*command.split(), folder=tmp_path, out=FULL) == (3, said)


def test_ctrl_c_ends_a_command_whose_output_nobody_reads(tmp_path: Path) -> None:
    unread, full = os.pipe()
    fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 4096)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    program = [sys.executable, "-c", "from wancli.__main__ import main; main()", "schema"]
    child = subprocess.Popen(program, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE)
    try:
        assert select.select([unread], [], [], 60)[0]
        time.sleep(0.5)  # it waits for its reader
        child.send_signal(signal.SIGINT)
        output = child.communicate(timeout=60)[1]
    finally:
        child.kill()
        os.close(full)
        os.close(unread)
    assert (child.returncode, b"interrupted" in output, b"Traceback" in output) == (
        -signal.SIGINT,
        True,
        False,
    )


def test_a_wrong_job_has_its_exit_code_even_without_a_reader(tmp_path: Path, lost_reader: int) -> None:
    write_job(tmp_path, tiny_job(frames=4))
    for err in (FULL, lost_reader):
        assert wancli("render", "job.yaml", folder=tmp_path, out=os.devnull, err=err)[0] == 2
    assert shell("render job.yaml 2>&-", tmp_path)[0] == 2


def test_a_path_on_stdout_has_the_bytes_of_its_name(tmp_path: Path, known: Path) -> None:
    folder = tmp_path / os.fsdecode(b"u\xff")
    write_job(folder, tiny_job(known, output="a.mp4"))
    code, err = wancli("render", "job.yaml", folder=folder, out=str(tmp_path / "out.txt"))
    assert (code, (tmp_path / "out.txt").read_bytes()) == (0, os.fsencode(folder) + b"/a.mp4\n"), err
    assert "u\\udcff/job.report.json" in err


@contextmanager
def stdout_is(fd: int) -> Iterator[None]:
    """Replace stdout within a test, not as a fixture: pytest restores the descriptor between the two."""
    kept = os.dup(1)
    os.dup2(fd, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.mark.parametrize("write_through", [False, True])
def test_a_failure_is_raised_once_and_remembered(write_through: bool) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with stdout_is(full):
        out = stdio.open_writer(1, encoding="utf-8", write_through=write_through, patient=True)
        assert stdio.write_failure(out) is None
        with pytest.raises(MachineError, match="stdout: cannot be written: No space left"):
            print("a", file=out, flush=True)
        print("b", file=out, flush=True)
    os.close(full)
    assert isinstance(stdio.write_failure(out), MachineError)
    assert stdio.write_failure(io.StringIO()) is None


# Modules that write with os.write, to files and pipes of their own.
WRITERS = {"storage.atomic", "farm.daemon", "video.ffmpeg", "stream_writer", "signals"}
PAST_THE_WRITER = {"sys.__stdout__", "sys.__stderr__", "sys.stdout.buffer", "sys.stderr.buffer"}


def bypasses(source: str) -> list[str]:
    """What in a program writes to a stream, but not through sys.stdout and sys.stderr.

    print(), rich, logging, warnings and others use these two, which main() replaces.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PAST_THE_WRITER:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            name, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            standard = name in ("open", "os.fdopen", "io.FileIO", "io.open") and first in ("1", "2")
            if standard or name in ("os.write", "os.writev"):
                found.append(name)
    return found


def test_no_module_writes_to_a_stream_past_the_one_writer() -> None:
    root = Path(stdio.__file__).parent
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    assert {name for name, path in modules.items() if bypasses(path.read_text())} == WRITERS


@pytest.mark.parametrize(
    "line",
    ["os.write(2, b'')", "open(1, 'w')", "sys.stderr.buffer.write(b'')", "Console(file=sys.__stderr__)"],
)
def test_a_line_that_writes_past_the_one_writer_is_found(line: str) -> None:
    assert bypasses(line)


def test_characters_that_are_not_of_a_file_name_are_escaped() -> None:
    read, write = os.pipe()
    with stdout_is(write):
        out = stdio.open_writer(1, encoding="utf-8", write_through=False, patient=True)
        print("\udcff \ud800 猫", file=out, flush=True)
    assert os.read(read, 100) == b"\xff \\ud800 \xe7\x8c\xab\n"
    for fd in (read, write):
        os.close(fd)
