"""A process with everything imported that forks a child for each command line: a trial costs no start.

Reads a line of JSON for each trial from stdin, {arguments, watched, faults, asks, log, blobs, out, err,
beat}, and writes a line with the exit code, negative for a signal. It has no thread but its own, so that a
fork is safe.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shim import Ask, Fault, install

from wancli.cli import run
from wancli.storage.claims import Claims


def child(trial: dict[str, Any]) -> int:
    os.setpgid(0, 0)
    for stream, name in ((1, "out"), (2, "err")):
        fd = os.open(trial[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, stream)
        os.close(fd)
    if trial["watched"]:
        log = os.open(trial["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        blobs = Path(trial["blobs"]) if trial.get("blobs") else None
        asks = None if trial.get("asks") is None else [Ask(*ask) for ask in trial["asks"]]
        install(trial["watched"], [Fault(*fault) for fault in trial["faults"]], log, blobs, asks)
    if trial["beat"]:
        _, *others = Claims.__init__.__defaults__
        Claims.__init__.__defaults__ = (trial["beat"], *others)
    code = run(trial["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for argument in json.loads(sys.argv[1]):  # what a first run imports and remembers
        assert run(argument) == 0, argument
    deadline = time.monotonic() + 10  # a thread that was joined is gone a moment later
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, "threads that a fork would lose"
        time.sleep(0.001)
    gc.collect()
    gc.freeze()  # or each fork copies the pages of all objects, to count what refers to them
    os.write(answers, b'"ready"\n')
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(json.loads(line))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, json.dumps(code).encode() + b"\n")


if __name__ == "__main__":
    main()
