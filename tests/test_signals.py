"""Stop requests: the first signal is a request, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jobs import CommandResult, tiny_job, write_job

import wancli
from wancli import signals
from wancli.errors import Stopped
from wancli.plan import planner
from wancli.report import batch_report
from wancli.signals import Stop, stop_on_signal


@pytest.mark.parametrize(
    ("name", "status"),
    [(number.name, 130 if number == signal.SIGINT else 75) for number in signals.STOP_SIGNALS],
)
def test_the_first_signal_is_a_request_that_names_it(name: str, status: int) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert (stop.requested, stop.reason) == (True, name)
        error = stop.error("all is saved")
    assert signal.getsignal(number) is before
    assert (str(error), error.status) == (f"stopped by {name}; all is saved", status)


def test_a_new_flag_is_not_set() -> None:
    assert not Stop().requested


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    program = (
        "import signal\nfrom wancli.signals import stop_on_signal\n"
        "try:\n    with stop_on_signal():\n"
        f"        signal.raise_signal(signal.SIGTERM)\n        signal.raise_signal({int(second)})\n"
        "finally:\n    print('unwound')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    said = b"wancli: ended at once; what was saved before is on disk\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + second, b"", said)


@pytest.mark.parametrize("repeated", [signal.SIGHUP, signal.SIGXCPU])
def test_signals_that_the_system_repeats_are_no_second_signal(repeated: signal.Signals) -> None:
    """The kernel sends SIGXCPU every second, and a session that ends SIGHUP beside SIGTERM."""
    with stop_on_signal() as stop:
        for number in (repeated, repeated, signal.SIGTERM, repeated):
            signal.raise_signal(number)
        assert stop.reason == repeated.name


def test_what_a_script_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


# ---- outside of the work: a scheduler queues again what ends with 75, and nothing else ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("display", [["--progress", "plain"], ["--json"], ["--progress", "openjd"], ["-q"]])
def test_a_signal_while_planning_ends_with_75(
    render: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    display: list[str],
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("wancli.plan.planner.build_plan", lambda *_, **__: signal.raise_signal(number))
    result = render(*display)
    assert result.code == 75
    assert f"wancli: stopped by {number.name}\n  resume: wancli render" in result.err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_the_report_is_written_lets_it_be_finished(
    render: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    write = batch_report.write_report

    def disturbed(*arguments: Any) -> Path:
        signal.raise_signal(number)
        return write(*arguments)

    monkeypatch.setattr(batch_report, "write_report", disturbed)
    assert render("-q").code == 0
    assert list(tmp_path.rglob("*.report.json"))
    assert list(tmp_path.rglob("*.html"))


def process(*arguments: str, at: str, number: int) -> subprocess.CompletedProcess[str]:
    """Run the command, and send a signal when the module `at` is imported, or at the end (`exit`)."""
    program = (
        "import atexit, signal, sys\nfrom wancli.__main__ import main\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        f"        if name == {at!r}:\n            sys.meta_path.remove(self)\n"
        f"            signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"if {at!r} == 'exit':\n    atexit.register(signal.raise_signal, {int(number)})\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, text=True)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGXCPU])
def test_a_signal_while_a_render_is_imported_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    job = str(write_job(tmp_path, tiny_job()))
    for module in ("typer", "wancli.engine.batch"):
        result = process("render", job, at=module, number=number)
        nothing = f"wancli: stopped by {number.name}; nothing was started\n"
        assert (result.returncode, result.stderr) == (75, nothing)
    assert process("probe", job, at="typer", number=number).returncode == 75
    assert process("plan", job, at="typer", number=number).returncode == -number


def test_after_a_probe_a_signal_ends_the_wait_for_the_reader_of_its_map() -> None:
    handler = signals.StartHandler(signals.exit_on_signal, signal.SIG_DFL)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with stop_on_signal():
            pass
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_while_planning_stops_the_render_whatever_becomes_of_its_error(
    render: Callable[..., CommandResult],
    monkeypatch: pytest.MonkeyPatch,
    swallowed: bool,
    number: signal.Signals,
    code: int,
) -> None:
    """Python wraps an error of __set_name__ in another one; some callbacks swallow errors."""

    class Disturbed:
        def __set_name__(self, *_: object) -> None:
            signal.raise_signal(number)

    build = planner.build_plan

    def disturbed(*arguments: Any, **options: Any) -> Any:
        with suppress(*((RuntimeError, Stopped, KeyboardInterrupt) if swallowed else ())):
            type("Made", (), {"attribute": Disturbed()})
        return build(*arguments, **options)

    monkeypatch.setattr(planner, "build_plan", disturbed)
    assert render("-q").code == code


def test_a_signal_after_the_end_of_a_render_leaves_its_exit_code(tmp_path: Path) -> None:
    result = process("render", str(tmp_path / "none.yaml"), at="exit", number=signal.SIGTERM)
    assert result.returncode == 2


def test_ctrl_c_ends_a_loop_of_the_shell(tmp_path: Path) -> None:
    """Bash continues after a command that exits with 130, and stops after one that dies of SIGINT."""
    (tmp_path / "job.yaml").write_text(
        "output: out/clip.mp4\nprompt: A red circle.\nseed: 1\nsampler: {steps: 200}\n"
    )
    loop = f"for n in 1 2; do echo turn $n; {sys.executable} -m wancli render job.yaml --progress plain; done"
    process = subprocess.Popen(
        ["bash", "-c", loop], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path(wancli.__file__).parents[1])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr
    while "sample" not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert out == "turn 1\n"
    assert "stopped by SIGINT" in err
