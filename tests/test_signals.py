"""Being asked to stop: the first signal is a request, the second an end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from wancli.errors import ExitStatus
from wancli.signals import Stop, listening


@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", ExitStatus.INTERRUPTED)]
)
def test_the_first_signal_is_a_request_that_names_it(name: str, status: int) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with listening() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert (stop.asked, stop.reason) == (True, name)
        error = stop.error("all is saved")
    assert signal.getsignal(number) is before
    assert (str(error), error.status) == (f"stopped by {name}; all is saved", status)


def test_nobody_has_asked_a_new_flag() -> None:
    assert not Stop().asked


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    program = (
        "import signal\nfrom wancli.signals import listening\n"
        "try:\n    with listening():\n"
        f"        signal.raise_signal(signal.SIGTERM)\n        signal.raise_signal({int(second)})\n"
        "finally:\n    print('unwound')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + second, b"", b"")


def test_what_a_script_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)
