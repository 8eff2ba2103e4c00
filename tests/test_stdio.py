"""Standard streams that are closed, full or without a reader, and file names that are not text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import tiny_job, write_job

from wancli import stdio
from wancli.errors import MachineError

WANCLI = f"{sys.executable} -c 'from wancli.__main__ import main; main()'"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    program = ["bash", "-c", f'set -o pipefail; wancli() {{ {WANCLI} "$@"; }}; {line}']
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        program, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ("wancli render job.yaml --progress plain 2>&1 | true", 0, b""),
        ("wancli render job.yaml --progress plain 2>/dev/full", 0, b""),
        ("wancli render job.yaml 2>&- >&-", 0, b""),
        ("wancli render job.yaml -q --json-stream <&- >&-", 0, b""),
        (
            "wancli render job.yaml -q >/dev/full",
            3,
            b"wancli: stdout: cannot be written: No space left on device; the work continues\n",
        ),
    ],
)
def test_no_stream_that_is_lost_keeps_a_shot_from_being_rendered(
    tmp_path: Path, known: Path, line: str, code: int, err: bytes
) -> None:
    write_job(tmp_path, tiny_job(known, output="{id}.mp4", items=[{"id": "a"}, {"id": "b", "seed": 1}]))
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (code, err)
    assert (tmp_path / "a.mp4").exists()
    assert (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize("command", ["plan job.yaml", "schema", "errors --json", "plan job.yaml --json"])
def test_results_that_cannot_be_written_are_no_bug_and_no_success(tmp_path: Path, command: str) -> None:
    write_job(tmp_path, tiny_job())
    done = shell(f"wancli {command} >/dev/full", tmp_path)
    said = b"wancli: stdout: cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (3, said)


def test_a_wrong_job_has_its_exit_code_even_without_a_reader(tmp_path: Path) -> None:
    write_job(tmp_path, tiny_job(frames=4))
    assert shell("wancli render job.yaml 2>/dev/full", tmp_path).returncode == 2
    assert shell("wancli render job.yaml 2>&-", tmp_path).returncode == 2


def test_a_path_on_stdout_has_the_bytes_of_its_name(tmp_path: Path, known: Path) -> None:
    folder = tmp_path / os.fsdecode(b"u\xff")
    write_job(folder, tiny_job(known, output="a.mp4"))
    done = shell("wancli render job.yaml | xargs -n 1 stat -c %n", folder)
    assert (done.returncode, done.stdout) == (0, os.fsencode(folder) + b"/a.mp4\n"), done.stderr
    assert b"u\\udcff/job.report.json" in done.stderr


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
    out = stdio.open_writer(1, encoding="utf-8", write_through=write_through)
    assert stdio.write_failure(out) is None
    full = os.open("/dev/full", os.O_WRONLY)
    with stdout_is(full):
        with pytest.raises(MachineError, match="stdout: cannot be written: No space left"):
            print("a", file=out, flush=True)
        print("b", file=out, flush=True)
    os.close(full)
    assert isinstance(stdio.write_failure(out), MachineError)
    assert stdio.write_failure(io.StringIO()) is None


def test_characters_that_are_not_of_a_file_name_are_escaped() -> None:
    read, write = os.pipe()
    out = stdio.open_writer(1, encoding="utf-8", write_through=False)
    with stdout_is(write):
        print("\udcff \ud800 猫", file=out, flush=True)
    assert os.read(read, 100) == b"\xff \\ud800 \xe7\x8c\xab\n"
    for fd in (read, write):
        os.close(fd)
