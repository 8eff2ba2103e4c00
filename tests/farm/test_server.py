"""A server: its renders have the bytes, exit codes and messages of a render without a server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import WANCLI, Forked, start
from forked import run as wancli
from image_cases import LAST, PICTURE, assemble
from jobs import TRANSFORMER, change_tensors, files_in, manifest_of, shell_exit_code, tiny_job, write_job

from wancli import signals
from wancli.engine.networks import ModelCache
from wancli.errors import JobError, MachineError
from wancli.farm import client, local_socket, messages
from wancli.farm.local_socket import listen
from wancli.farm.server import Server

LONG = {"sampler": {"steps": 40}, "save_every": 1}  # long enough to be stopped in progress
Done = subprocess.CompletedProcess[str]


def wait_for_state(folder: Path) -> None:
    """Wait until a step of the shot in the folder is on disk."""
    until = time.monotonic() + 60
    while "clip.state.safetensors" not in files_in(folder):
        assert time.monotonic() < until
        time.sleep(0.01)


@contextlib.contextmanager
def busy(path: Path) -> Iterator[None]:
    """Suspend the server at the path while the block runs."""
    pid = _pid(path)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _pid(path: Path) -> int:
    connection = local_socket.connect(path)
    assert connection
    with connection:
        return local_socket.peer_credentials(connection)[0]


def finish(process: Forked) -> Done:
    out, err = process.communicate(timeout=60)
    return Done(process.args, shell_exit_code(process.returncode), out, err)


@contextlib.contextmanager
def start_server(path: Path, *options: object) -> Iterator[Forked]:
    with start("serve", "--socket", path, *options) as server:
        assert server.stderr
        assert re.match(f"wancli serve: at {path}, process {server.pid}\n", server.stderr.readline())
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def server_path(tmp_path_factory: pytest.TempPathFactory, quick: Path, warm: Path) -> Iterator[Path]:
    """Start a server for all tests that leave it alive, and fill the cache with the prompts by a render."""
    folder = tmp_path_factory.mktemp("server")
    job, environment = write_job(folder, tiny_job(quick)), os.environ | {"WANCLI_CACHE": str(warm)}
    with start_server(folder / "s"):
        assert wancli("render", job, "--socket", folder / "s", env=environment).returncode == 0
        yield folder / "s"


@pytest.fixture
def job(tmp_path: Path, quick: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes the tiny job with changes, for a cache that has its prompts."""
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    monkeypatch.delenv("WANCLI_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def write(name: str = ".", **changes: Any) -> Path:
        return write_job(tmp_path / name, tiny_job(**{"model": quick} | changes))

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, quick: Path, warm: Path) -> Path:
    """The folder of a long render that nothing stopped."""
    folder = tmp_path_factory.mktemp("alone")
    path = write_job(folder, tiny_job(quick, **LONG))
    assert wancli("render", path, "-q", "--cache-dir", warm).returncode == 0
    return folder


def video(folder: Path) -> bytes:
    return (folder / "out" / "clip.mp4").read_bytes()


# ---- the same ----


def comparable_output(text: str, folder: Path) -> str:
    """Return the output without the parts that differ between two runs of one command."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r" +", " ", re.sub(r"\d+(\.\d+)? ?(s|[KMG]iB)\b|\d+:\d\d", "N", text))
    return re.sub(r"N +|(?<=: )N|\? ", "", re.sub(r'"(rss|seconds|created|process|peak)[^,}]*', "", text))


@pytest.mark.parametrize(
    ("code", "changes", "arguments"),
    [
        (0, {}, ["job.yaml"]),
        (0, {"items": [{"id": "clip"}, {"id": "two", "seed": 2}], "output": "out/{id}.mp4"}, ["job.yaml"]),
        (0, {}, ["-"]),
        (0, {}, ["../here/job.yaml", "--set", "seed=3", "-q"]),
        (2, {"frames": 6}, ["job.yaml"]),
        (2, {}, ["job.yaml", "--items", "7"]),
        (2, {}, ["job.yaml", "--bogus"]),
        (2, {}, ["missing.yaml"]),
        (2, {"model": "there/is/none"}, ["job.yaml"]),
        (3, {"output": "/proc/none/clip.mp4"}, ["job.yaml"]),
        (5, {"memory": {"budget": "1MiB"}}, ["job.yaml"]),
    ],
)
def test_results_messages_and_exit_codes_are_those_of_a_render_without_a_server(
    server_path: Path,
    job: Callable[..., Path],
    tmp_path: Path,
    code: int,
    changes: dict[str, Any],
    arguments: Any,
) -> None:
    said = {}
    for name, options in {"alone": [], "served": ["--socket", server_path]}.items():
        folder = tmp_path / name / "here"
        path = job(f"{name}/here", **changes)
        (folder / "out").mkdir()
        with path.open() as stdin:
            done = wancli("render", *arguments, "--progress", "none", *options, cwd=folder, stdin=stdin)
        said[name] = (
            done.returncode,
            done.stdout.replace(str(folder), ""),
            comparable_output(done.stderr, folder),
        )
        said[name] += tuple(files_in(folder))
    assert said["served"] == said["alone"]
    assert said["alone"][0] == code, said
    if code == 0:
        assert video(tmp_path / "served/here") == video(tmp_path / "alone/here")


def test_pictures_are_read_from_the_folder_of_a_job_and_anew_for_each_render(
    server_path: Path, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    model = assemble("wan21-i2v-tiny", tmp_path / "model")
    changes = {"image": "cat.png", "inject": [{"image": "dog.png"}], "size": {"area": 2048}, "frames": 5}
    job = tiny_job(model, **changes, sampler={"steps": 1, "guidance": 1})
    for name, options in {"alone": [], "served": ["--socket", server_path]}.items():
        path = write_job(tmp_path / name, job)
        shutil.copy(PICTURE, tmp_path / name / "cat.png")
        shutil.copy(LAST, tmp_path / name / "dog.png")
        done = wancli("render", path, "-q", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert video(tmp_path / "served") == video(tmp_path / "alone")
    keys = [manifest_of(tmp_path / name)["key"] for name in ("alone", "served")]
    assert keys[0] == keys[1]
    shutil.copy(LAST, tmp_path / "served" / "cat.png")
    done = wancli("render", path, "-q", "--socket", server_path)
    assert (done.returncode, "made with another image" in done.stderr) == (2, True)


def test_a_shot_that_fails_fails_there_too_and_the_next_one_is_sound(
    server_path: Path, job: Callable[..., Path], tmp_path: Path, quick: Path
) -> None:
    broken = shutil.copytree(quick, tmp_path / "broken")

    def poisoned(tensors: dict[str, Any]) -> None:
        tensors["blocks.1.ffn.2.bias"][0] = float("nan")

    change_tensors(broken / TRANSFORMER, poisoned)
    done = wancli("render", job("bad", model=str(broken)), "-q", "--socket", server_path)
    assert done.returncode == 1
    assert "block 1" in done.stderr
    assert wancli("render", job("good"), "-q", "--socket", server_path).returncode == 0
    assert wancli("render", job("alone"), "-q").returncode == 0
    assert video(tmp_path / "good") == video(tmp_path / "alone")


def test_the_second_render_loads_nothing_and_its_json_is_one_document_on_stdout(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("1", "2"):
        done = wancli("render", job(name), "-q", "--json", "--socket", server_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("{\n")
    phases = manifest_of(tmp_path / "2")["phases"]
    assert [phase["seconds"] for phase in phases if phase["name"] == "load"] == [0.0]
    assert 0 < manifest_of(tmp_path / "2")["first_step_after"] < 60  # not the age of the server


def test_the_environment_names_the_server_and_a_request_leaves_nothing_behind(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = os.environ | {"WANCLI_SOCKET": str(server_path), "WANCLI_CACHE": str(tmp_path / "cache")}
    done = wancli("render", job("1"), "-q", env=elsewhere, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "embeddings").exists()
    assert (tmp_path / "1/out/clip.mp4").stat().st_mode & 0o777 == 0o600
    known = set((tmp_path / "cache").rglob("*"))
    done = wancli("render", job("2"), "-q", "--socket", server_path, umask=0o022)
    assert (tmp_path / "2/out/clip.mp4").stat().st_mode & 0o777 == 0o644
    assert set((tmp_path / "cache").rglob("*")) == known


def test_a_client_imports_nothing_slow(server_path: Path, job: Callable[..., Path]) -> None:
    program = (
        "import sys\nfrom wancli.__main__ import main\ntry:\n    main()\nexcept SystemExit as ended:\n"
        "    heavy = {'torch', 'numpy', 'typer', 'pydantic', 'yaml', 'psutil', 'rich'} & sys.modules.keys()\n"
        "    sys.exit(f'imported {heavy}' if heavy else ended.code)\n"
    )
    arguments = ["render", str(job()), "-q", f"--socket={server_path}"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("options", "unbuffered"), [([], "1"), (["--json"], "1"), (["--json"], "")])
def test_a_reader_that_closed_stdout_has_the_effect_it_has_without_a_server(
    server_path: Path,
    job: Callable[..., Path],
    options: list[str],
    unbuffered: str,
    monkeypatch: pytest.MonkeyPatch,
    lost_reader: int,
) -> None:
    """Python writes, too, when it ends: so clients, which start fast, and one render are real processes."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    streams: dict[str, Any] = {"stdout": lost_reader, "stderr": subprocess.DEVNULL, "timeout": 120}
    alone, served = (["render", job(name), "-q", *options] for name in ("alone", "served"))
    if unbuffered:
        as_unbuffered = f"import sys\nsys.stdout.reconfigure(write_through=True)\n{WANCLI}"
        done = wancli(*alone, program=as_unbuffered, **streams)
    else:
        done = subprocess.run([sys.executable, "-m", "wancli", *alone], **streams)
    client = subprocess.run([sys.executable, "-m", "wancli", *served, "--socket", server_path], **streams)
    assert (done.returncode, client.returncode) == (0, 0)  # what was made is on disk
    assert wancli("render", job("next"), "-q", "--socket", server_path).returncode == 0


# ---- one after the other ----


def test_a_second_client_waits_and_learns_that_it_does(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    with busy(server_path), start("render", job(), "--progress", "none", "--socket", server_path) as client:
        assert client.stderr
        assert (
            client.stderr.readline()
            == f"wancli: waiting until the server at {server_path} has finished another render\n"
        )
        assert files_in(tmp_path) == []
        os.kill(_pid(server_path), signal.SIGCONT)
        assert finish(client).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_waiting_client_can_leave_and_nothing_is_started(
    server_path: Path, job: Callable[..., Path], tmp_path: Path, number: int, code: int
) -> None:
    with busy(server_path), start("render", job("1"), "--socket", server_path) as client:
        assert client.stderr
        assert "waiting" in client.stderr.readline()
        client.send_signal(number)
        left = finish(client)
    assert (left.returncode, "nothing was started" in left.stderr) == (code, True)
    assert wancli("render", job("2"), "-q", "--socket", server_path).returncode == 0
    assert files_in(tmp_path / "1") == []


# ---- signals and deaths ----


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_to_the_client_saves_and_the_same_command_resumes(
    server_path: Path, job: Callable[..., Path], tmp_path: Path, alone: Path, number: int, code: int
) -> None:
    path = job("1", **LONG)
    with start("render", path, "-q", "--socket", server_path) as client:
        wait_for_state(tmp_path / "1")
        client.send_signal(number)
        stopped = finish(client)
    assert stopped.returncode == code
    assert f"resume: wancli render {path}" in stopped.stderr
    assert "clip.state.safetensors" in files_in(tmp_path / "1")
    assert wancli("render", path, "-q", "--socket", server_path).returncode == 0
    assert video(tmp_path / "1") == video(alone)


def test_a_client_that_is_killed_has_its_render_saved(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    with start("render", job("1", **LONG), "-q", "--socket", server_path) as client:
        wait_for_state(tmp_path / "1")
        client.kill()
    assert wancli("render", job("2"), "-q", "--socket", server_path).returncode == 0  # when the other is over
    assert "clip.state.safetensors" in files_in(tmp_path / "1")
    assert "clip.mp4" not in files_in(tmp_path / "1")


def test_a_client_that_gets_a_signal_and_is_then_killed_has_its_render_saved(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    with start("render", job("1", **LONG), "-q", "--socket", server_path) as client:
        wait_for_state(tmp_path / "1")
        with busy(server_path):  # so that both reach it before a step is over
            client.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            client.kill()
            client.wait()
    assert wancli("render", job("2"), "-q", "--socket", server_path).returncode == 0
    assert "clip.state.safetensors" in files_in(tmp_path / "1")
    assert "clip.mp4" not in files_in(tmp_path / "1")


def test_a_second_signal_ends_at_once_and_reports_that_the_server_has_ended(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "private" / "s"
    with start_server(path) as server:
        with start("render", job(**LONG), "-q", "--socket", path) as client:
            wait_for_state(tmp_path)
            server.send_signal(signal.SIGSTOP)  # so that both come before a step is over
            client.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            client.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.send_signal(signal.SIGCONT)
            done = finish(client)
        codes = {128 + signal.SIGTERM, 128 + signal.SIGINT}  # which of two pending ones is second is free
        assert done.returncode == 130
        assert server.wait(30) in codes
        assert "a second signal, SIGINT" in done.stderr


def test_after_a_server_died_the_client_exits_with_75_and_the_same_command_resumes(
    job: Callable[..., Path], tmp_path: Path, alone: Path
) -> None:
    path, work = tmp_path / "private" / "s", job("1", **LONG)
    with start_server(path) as server, start("render", work, "-q", "--socket", path) as client:
        wait_for_state(tmp_path / "1")
        server.kill()
        done = finish(client)
    assert done.returncode == 75
    assert f"the server at {path} has died; what was saved is on disk" in done.stderr
    assert "resume: wancli render" in done.stderr
    with start_server(path):  # what the dead one left is no hindrance
        assert wancli("render", work, "-q", "--socket", path).returncode == 0
    assert video(tmp_path / "1") == video(alone)


def test_stop_lets_the_render_be_saved_and_waits_for_the_end(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "private" / "s"
    with start_server(path) as server:
        with start("render", job(**LONG), "-q", "--socket", path) as client:
            wait_for_state(tmp_path)
            assert wancli("serve", "--stop", "--socket", path).returncode == 0
            assert not path.exists()
            done = finish(client)
        assert server.wait(30) == 0
    assert done.returncode == 75
    assert "stopped by SIGTERM; 1 shot is saved in progress" in done.stderr
    assert "clip.state.safetensors" in files_in(tmp_path)
    nobody = wancli("serve", "--stop", "--socket", path)
    assert (nobody.returncode, nobody.stderr) == (
        3,
        f"wancli: {path}: no server found\n"
        "  It has ended; or it uses another socket, which --socket PATH names.\n",
    )


# ---- which signals are the server's ----


def run_on_server(server: Server, run: Callable[[socket.socket], int]) -> int:
    """Return the exit code if the server runs `run`, which gets the client's end of the connection."""
    here, client = socket.socketpair()
    with here, client:
        server._run = lambda *_: run(client)
        return server._run_command(here, [], 0.0)


def handle_signal(number: signal.Signals, send: Callable[[], None], *, code: int) -> int:
    """Do what a render does that handles signals itself: get the signal, and exit with a code."""
    with signals.stop_on_signal() as stop:
        send()
        until = time.monotonic() + 30
        while not stop.requested:
            assert time.monotonic() < until
            time.sleep(0.001)
        assert stop.reason == number.name
    return code


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_to_the_server_ends_it_whatever_the_render_made_of_it(
    number: signal.Signals, code: int
) -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)
    with server.handle_signals():
        got = run_on_server(
            server, lambda _: handle_signal(number, lambda: os.kill(os.getpid(), number), code=code)
        )
        assert (got, server._stop_requested()) == (code, True)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_to_the_server_after_the_work_leaves_the_client_its_exit_code(
    number: signal.Signals,
) -> None:
    def run(_: socket.socket) -> int:
        with signals.stop_on_signal(at_once=True):
            pass
        signal.raise_signal(number)  # while the last paths are delivered
        return 0

    server = Server(lambda *_: 0, ModelCache(), idle=None)
    with server.handle_signals():
        assert (run_on_server(server, run), server._stop_requested()) == (0, True)


def test_a_signal_to_the_server_before_the_work_of_a_client_starts_nothing() -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)
    with server.handle_signals():
        for _ in "ab":  # for each client anew
            assert run_on_server(server, lambda _: signal.raise_signal(signal.SIGTERM) or 0) == 75


def test_a_server_under_nohup_ignores_sighup_and_saves_a_render_whose_client_gets_one() -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server.handle_signals():
            signal.raise_signal(signal.SIGHUP)
            assert not server._stop_requested()
            got = run_on_server(
                server,
                lambda client: handle_signal(
                    signal.SIGTERM,
                    lambda: local_socket.send_message(client, {"signal": "SIGHUP"}),
                    code=75,
                ),
            )
            assert (got, server._stop_requested()) == (75, False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
@pytest.mark.parametrize("code", [75, 130])
def test_a_signal_of_a_client_does_not_end_the_server(number: signal.Signals, code: int) -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)

    def run(client: socket.socket) -> int:
        return handle_signal(
            number, lambda: local_socket.send_message(client, {"signal": number.name}), code=code
        )

    with server.handle_signals():
        for _ in range(3):
            assert (run_on_server(server, run), server._stop_requested()) == (code, False)


def test_a_render_that_ends_with_75_by_itself_does_not_end_the_server() -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)
    with server.handle_signals():
        assert (run_on_server(server, lambda _: 75), server._stop_requested()) == (75, False)


# ---- who may talk ----


def test_without_a_server_auto_renders_quietly_and_a_name_is_an_error(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    done = wancli("render", job("1"), "-q", "--socket", "auto")
    assert (done.returncode, done.stderr) == (0, "")
    done = wancli("render", job("2"), "-q", "--socket", tmp_path / "none" / "s")
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == f"wancli: {tmp_path}/none/s: no server found"
    assert "--daemonize starts a server" in done.stderr
    assert files_in(tmp_path / "2") == []


def test_a_server_that_cannot_render_the_same_refuses(
    server_path: Path, job: Callable[..., Path], tmp_path: Path
) -> None:
    other = os.environ | {"OMP_NUM_THREADS": "2"}
    done = wancli("render", job(), "-q", "--socket", server_path, env=other)
    assert done.returncode == 3
    assert "refuses: OMP_NUM_THREADS is 1 at the server, 2 at the client" in done.stderr
    assert files_in(tmp_path) == []


def test_a_client_reports_that_its_folder_was_deleted(server_path: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom wancli.__main__ import main\n"
        f"sys.argv[1:] = ['render', 'job.yaml', '--socket', {str(server_path)!r}]\n"
        f"os.chdir({str(tmp_path)!r})\nos.rmdir({str(tmp_path)!r})\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "working folder is gone" in done.stderr) == (3, True)


def test_auto_reports_that_it_renders_without_a_server_that_refuses(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    runtime = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    path = job()
    assert wancli("serve", "--daemonize", "--wait-ready", env=runtime).returncode == 0
    try:
        done = wancli("render", path, "-q", "--socket", "auto", env=runtime | {"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0
        assert done.stderr.count("\n") == 1
        assert "2 at the client; rendering without it" in done.stderr
    finally:
        assert wancli("serve", "--stop", env=runtime).returncode == 0


@pytest.mark.parametrize(
    "name", ["the version of wancli", "Python's folder", "wancli's code", "OMP_NUM_THREADS"]
)
def test_both_ends_must_be_the_same(name: str) -> None:
    here = local_socket.process_fingerprint()
    assert local_socket.describe_difference(here, here) is None
    assert (
        local_socket.describe_difference(here, here | {name: "x"})
        == f"{name} is {here[name]} at the server, x at the client"
    )
    assert local_socket.describe_difference(here, {}) is not None


@pytest.mark.parametrize(
    "message", [{"signal": "SIGNONE"}, {"signal": "SIGKILL"}, {"signal": ["SIGINT"]}, {"signal": 9}, {"a": 1}]
)
def test_a_message_that_is_no_signal_to_stop_has_the_render_saved(message: dict[str, object]) -> None:
    server = Server(lambda *_: 0, ModelCache(), idle=None)
    with server.handle_signals():
        got = run_on_server(
            server,
            lambda client: handle_signal(
                signal.SIGTERM, lambda: local_socket.send_message(client, message), code=75
            ),
        )
        assert (got, server._stop_requested()) == (75, False)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"identity": ["x"]}, "at the server, None at the client"),
        ({"umask": "x"}, "umask: "),
        ({"umask": 2**40}, "umask: "),
        ({"arguments": "render"}, "arguments: "),
        ({"arguments": ["a\0"]}, "arguments.0: "),
        ({"environment": {"A=B": "1"}}, "environment.A=B"),
        ({"environment": {"A": "\0"}}, "environment.A: "),
        ({"folder": "a\0b"}, "folder: "),
        ({"began": None}, "began: "),
        ({"written": []}, "written.0: "),
        ({"written": [{"encoding": "utf-9", "write_through": True}] * 2}, "written.0.encoding: "),
    ],
)
def test_a_request_with_odd_values_is_refused_and_the_server_lives_on(
    changes: dict[str, object], why: str
) -> None:
    server = Server(lambda *_: 1 // 0, ModelCache(), idle=None)
    request: dict[str, object] = {
        "arguments": [],
        "folder": "/",
        "environment": {"A": "\udcff"},
        "umask": 0o22,
    }
    request |= {"began": 0.0, "identity": local_socket.process_fingerprint()}
    request |= {"written": [{"encoding": "utf-8", "write_through": False}] * 2}
    assert messages.Request.parse(request, Path("request")).environment == {"A": "\udcff"}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(theirs, [b"\n"], [0, 1, 2])
        local_socket.send_message(theirs, request | changes)
        server._handle(ours)
        replies = local_socket.MessageReader(theirs)
        assert "turn" in (replies.read() or {})
        assert why in (replies.read() or {})["refused"]


def test_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    assert local_socket.peer_credentials(theirs) == (os.getpid(), os.geteuid())
    monkeypatch.setattr(local_socket, "peer_credentials", lambda _: (1, os.geteuid() + 1))
    with ours, theirs:
        Server(lambda *_: 1 // 0, ModelCache(), idle=None)._handle(ours)
        message = local_socket.MessageReader(theirs).read()
    assert message is not None
    assert message["refused"].startswith(f"you are user {os.geteuid() + 1}")


def test_a_socket_in_a_folder_that_others_may_enter_is_not_trusted(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    assert local_socket.connect(tmp_path / "s") is None  # no server, whatever the folder
    (tmp_path / "s").touch()
    said = rf"{tmp_path}: not a private folder \(owner {os.geteuid()}, mode 0755\)"
    with pytest.raises(MachineError, match=said):
        local_socket.connect(tmp_path / "s")
    for command in (["serve"], ["render", job()]):
        done = wancli(*command, "--socket", tmp_path / "s")
        assert (done.returncode, "mode 0700" in done.stderr) == (3, True)
    local_socket.make_private_folder(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o700


def test_a_server_of_another_user_is_not_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_socket.make_private_folder(tmp_path / "p")
    monkeypatch.setattr(local_socket, "peer_credentials", lambda _: (1, os.geteuid() + 1))
    with listen(tmp_path / "p/s"), pytest.raises(MachineError, match=f"by user {os.geteuid() + 1}"):
        local_socket.connect(tmp_path / "p/s")


def test_waiting_clients_learn_that_the_server_ended(tmp_path: Path) -> None:
    local_socket.make_private_folder(tmp_path / "p")
    with listen(tmp_path / "p/s") as listener:
        leaving = threading.Thread(target=lambda: listener.accept()[0].close())
        leaving.start()
        with pytest.raises(MachineError, match="the server ended before it was our turn"):
            client.render(["render"], str(tmp_path / "p/s"), tmp_path, quiet=True)
        leaving.join()


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=f"{tmp_path}/file/p: cannot be made: "):
        local_socket.make_private_folder(tmp_path / "file/p")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    longest = Path("/", "x" * 106)
    assert local_socket.socket_path(str(longest), tmp_path) == longest
    with pytest.raises(JobError, match="is a path of 108 bytes; a socket can have 107"):
        local_socket.socket_path(f"{longest}y", tmp_path)


def test_auto_is_the_users_runtime_folder_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert local_socket.socket_path("auto", Path("/cache")) == tmp_path / "wancli" / "serve"
    for value in (str(tmp_path / "gone"), ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert local_socket.socket_path("auto", Path("/cache")) == Path("/cache/run") / os.uname().nodename


# ---- its life ----


def test_a_server_without_requests_ends(tmp_path: Path) -> None:
    with start_server(tmp_path / "private" / "s", "--idle", "0.2s") as server:
        assert server.wait(30) == 0
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["s.lock"]


def test_a_socket_has_one_server(server_path: Path) -> None:
    done = wancli("serve", "--socket", server_path)
    assert done.returncode == 3
    assert done.stderr.startswith(f"wancli: {server_path}: another server uses it\n")


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_file_that_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "private" / "notes"
    path.parent.mkdir(mode=0o700)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "private")
    found = path.lstat()
    with pytest.raises(MachineError, match="notes: already exists, and is not a socket"), listen(path):
        pass
    assert path.lstat() == found


def test_in_the_background_it_returns_when_the_model_is_loaded(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "private" / "s"
    began = wancli("serve", job(), "--socket", path, "--daemonize", "--wait-ready")
    assert (began.returncode, began.stdout) == (0, "")
    assert began.stderr == (
        f"wancli serve: listens at {path}, its log in {path.name}.log; "
        f"`wancli render --socket {path} JOB` uses it, "
        f"`wancli serve --stop --socket {path}` ends it\n"
    )
    try:
        assert wancli("render", job(), "-q", "--socket", path).returncode == 0
        phases = manifest_of(tmp_path)["phases"]
        assert [phase["seconds"] for phase in phases if phase["name"] == "load"] == [0.0]
    finally:
        assert wancli("serve", "--stop", "--socket", path).returncode == 0
    log = path.with_name("s.log").read_text().splitlines()
    assert log[0].startswith(f"wancli serve: at {path}, process ")
    assert re.fullmatch(r"wancli serve: process \d+ in '.*': exit code 0 after \d+\.\d s", log[1])


def test_a_background_process_that_cannot_start_reports_why(job: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "private" / "s"
    done = wancli("serve", job(frames=6), "--socket", path, "--daemonize", "--wait-ready")
    assert done.returncode == 2
    assert "frames" in done.stderr
    done = wancli("serve", "--socket", path, "--wait-ready")
    assert (done.returncode, "--daemonize" in done.stderr) == (2, True)
