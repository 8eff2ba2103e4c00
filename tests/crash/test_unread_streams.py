"""Streams that are open, full and read by nobody: the work goes on, signals save it, others are served."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from batch import LONG
from forked import WANCLI, Forked, start
from forked import run as wancli
from jobs import files_in, shell_exit_code, tiny_job, write_job
from unread import Stream, small_pipe, small_socket, suspended_terminal, unread

# The wait for a reader at the end is 5 s, which no test needs to see.
PROGRAM = f"import wancli.stdio\nwancli.stdio._DELIVERY_SECONDS = 0.2\n{WANCLI}"
STREAMS = [small_pipe, small_socket, suspended_terminal]
UNREAD = [(["stderr"], ["--progress", "plain"]), (["stdout"], ["-q", "--json-stream"])]
if LONG:
    UNREAD += [
        (["stdout", "stderr"], options)
        for options in ([], ["--progress", "bar"], ["--progress", "openjd"], ["--json"], ["--json-stream"])
    ]


@pytest.fixture
def job(tmp_path: Path, known: Path) -> Callable[..., Path]:
    return lambda **changes: write_job(tmp_path, tiny_job(**{"model": known} | changes))


def start_unread(
    stack: ExitStack, make: Callable[[], Stream], names: list[str], *arguments: object
) -> Forked:
    streams: dict[str, Any] = {name: stack.enter_context(unread(make))[1] for name in names}
    others: dict[str, Any] = {name: -3 for name in ("stdout", "stderr") if name not in names}
    return stack.enter_context(start("render", *arguments, program=PROGRAM, **(others | streams)))


def wait_until(holds: Callable[[], bool], process: Forked) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < until, "the work is held up"
        time.sleep(0.01)


@pytest.mark.parametrize(("names", "options"), UNREAD, ids=str)
@pytest.mark.parametrize("make", STREAMS)
def test_a_batch_is_finished_with_its_exit_code(
    job: Callable[..., Path],
    tmp_path: Path,
    make: Callable[[], Stream],
    names: list[str],
    options: list[str],
) -> None:
    path = job(items=[{"id": "a"}, {"id": "b", "seed": 1}], output="out/{id}.mp4")
    with ExitStack() as stack:
        assert start_unread(stack, make, names, path, *options).wait(60) == 0
    assert {"a.mp4", "b.mp4", "job.report.json"} <= set(files_in(tmp_path))


@pytest.mark.parametrize(("names", "options"), UNREAD, ids=str)
@pytest.mark.parametrize("make", STREAMS if LONG else STREAMS[:1])
def test_the_first_signal_saves_and_the_second_ends_at_once(
    job: Callable[..., Path],
    tmp_path: Path,
    make: Callable[[], Stream],
    names: list[str],
    options: list[str],
) -> None:
    path = job(sampler={"steps": 300}, save_every=1)
    with ExitStack() as stack:
        first = start_unread(stack, make, names, path, *options)
        wait_until(lambda: "clip.state.safetensors" in files_in(tmp_path), first)
        first.terminate()
        assert first.wait(60) == 75
        (tmp_path / "out/clip.state.safetensors").unlink()
        second = start_unread(stack, make, names, path, *options)
        wait_until(lambda: "clip.state.safetensors" in files_in(tmp_path), second)
        second.send_signal(signal.SIGSTOP)  # so that both signals come within a step
        second.until_suspended()
        second.send_signal(signal.SIGTERM)
        second.send_signal(signal.SIGUSR1)
        second.send_signal(signal.SIGCONT)
        assert shell_exit_code(second.wait(60)) in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)


def test_a_reader_who_comes_back_gets_every_event_but_steps(job: Callable[..., Path], tmp_path: Path) -> None:
    path = job(items=[{"id": "a"}, {"id": "b", "seed": 1}], output="out/{id}.mp4", batch=1)
    with unread(small_pipe) as (reader, fd), start("render", path, "-q", "--json-stream", stdout=fd) as run:
        wait_until(lambda: "b.mp4" in files_in(tmp_path), run)
        said = b""
        while b'"envelope"' not in said:
            said += os.read(reader, 1 << 16)
        assert run.wait(60) == 0
    events = [json.loads(line) for line in said.lstrip(b".").splitlines()]
    kinds = [event["type"] for event in events if event["type"] != "step"]
    assert [kind for kind in kinds if kind.startswith("shot")] == 2 * ["shot-started", "shot-finished"]
    assert (kinds[0], kinds[-1]) == ("plan", "envelope")


def test_a_client_that_nobody_reads_does_not_keep_others_from_the_server(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    path, place = job(), tmp_path / "private" / "s"
    with start("serve", "--socket", place, program=PROGRAM) as server:
        assert server.stderr
        assert server.stderr.readline().startswith("wancli serve: at")
        try:
            with ExitStack() as stack:
                client = start_unread(stack, small_pipe, ["stdout", "stderr"], path, "--socket", place)
                other = write_job(tmp_path / "other", tiny_job())
                assert wancli("render", other, "-q", "--socket", place).returncode == 0
                assert client.wait(60) == 0
                stuck = start_unread(
                    stack, small_pipe, ["stdout", "stderr"], path, "--force", "--socket", place
                )
                stuck.kill()  # while its pipe still has an end that could be read
            assert wancli("serve", "--stop", "--socket", place).returncode == 0
        finally:
            server.kill()
