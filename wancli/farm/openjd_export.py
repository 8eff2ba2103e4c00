"""`wancli export openjd`: a job template for Open Job Description, as AWS Deadline Cloud and others run it.

A session starts one server, shares its model among all tasks of the session, and ends it. A task is some
shots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from wancli.errors import JobError

_SOCKET = "{{Session.WorkingDirectory}}/wancli/socket"
_ENTER = """\
set -euo pipefail
"$1" serve "$2" --socket "$3" --idle 1h --daemonize --wait-ready "${@:4}"
echo "openjd_env: WANCLI_SOCKET=$3"
"""


def build_template(
    wancli: str,
    job: Path,
    items: str,
    served: Sequence[str],
    options: Sequence[str],
    *,
    name: str,
    gpus: int,
    at_once: int,
) -> str:
    """Build the template as YAML.

    `options` are further options of `wancli render`, `served` those of them that `wancli serve` also takes,
    `at_once` the shots of a task. Raises JobError if OpenJD would read an option as a format string, and if
    YAML cannot hold a word.
    """
    _check_representable((wancli, *options), job)
    step = _build_step(wancli, served, options, at_once)
    if gpus:
        step["hostRequirements"] = {"amounts": [{"name": "amount.worker.gpu", "min": gpus}]}
    template = {
        "specificationVersion": "jobtemplate-2023-09",
        "extensions": ["TASK_CHUNKING"],
        "name": re.sub(r"\{\{|[^\x20-\x7e]", "-", name)[:64],
        "parameterDefinitions": [
            # Not a PATH: its default would be relative to the folder of the template, wherever that will be.
            {"name": "JobFile", "type": "STRING", "default": str(job)},
            {"name": "Items", "type": "STRING", "default": items},
        ],
        "steps": [step],
    }
    return str(yaml.safe_dump(template, sort_keys=False, width=110, allow_unicode=True))


def _check_representable(words: Sequence[str], job: Path) -> None:
    for word in (*words, str(job)):
        if any("\ud800" <= char <= "\udfff" for char in word):
            hint = "Rename it, or use `wancli export slurm`."
            raise JobError(f"{word!r} is not UTF-8, as a template of OpenJD must be", hint=hint)
    if odd := [word for word in words if "{{" in word]:
        raise JobError(f"{odd[0]!r} holds {{{{, which OpenJD replaces", hint="Write it in the job file.")


def _build_step(wancli: str, served: Sequence[str], options: Sequence[str], at_once: int) -> dict[str, Any]:
    """Build the only step: a session starts a server with the model, and each of its tasks uses it."""
    socket = ["--socket", _SOCKET]
    enter = {
        "command": "bash",
        "args": ["{{Env.File.Enter}}", wancli, "{{Param.JobFile}}", _SOCKET, *served],
        "timeout": 3600,
    }
    leave = {"command": wancli, "args": ["serve", "--stop", *socket]}
    render = [
        "render",
        "{{Param.JobFile}}",
        "--items",
        "{{Task.Param.Item}}",
        *socket,
        "--progress",
        "openjd",
    ]
    model = {
        "name": "Model",
        "script": {
            "actions": {"onEnter": enter, "onExit": leave},
            "embeddedFiles": [{"name": "Enter", "type": "TEXT", "data": _ENTER}],
        },
    }
    chunks = {
        "name": "Item",
        "type": "CHUNK[INT]",
        "range": "{{Param.Items}}",
        "chunks": {"defaultTaskCount": at_once, "rangeConstraint": "NONCONTIGUOUS"},
    }
    stop = {"mode": "NOTIFY_THEN_TERMINATE", "notifyPeriodInSeconds": 180}
    return {
        "name": "Render",
        "stepEnvironments": [model],
        "parameterSpace": {"taskParameterDefinitions": [chunks]},
        "script": {
            "actions": {"onRun": {"command": wancli, "args": [*render, *options], "cancelation": stop}}
        },
    }
