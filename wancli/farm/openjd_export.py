"""`wancli export openjd`: a job template for Open Job Description, as AWS Deadline Cloud and others run it.

A session starts one server, whose model all tasks of the session share, and ends it. A task is some shots.
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


def template(
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
    """The template as YAML; `options` are further ones of `wancli render`, `served` those among them that
    `wancli serve` takes, too, `at_once` the shots of a task.

    Raises JobError for an option that OpenJD would read as a format string, and for what YAML cannot hold."""
    _refuse_odd((wancli, *options), job)
    step = _step(wancli, served, options, at_once)
    if gpus:
        step["hostRequirements"] = {"amounts": [{"name": "amount.worker.gpu", "min": gpus}]}
    whole = {
        "specificationVersion": "jobtemplate-2023-09",
        "extensions": ["TASK_CHUNKING"],
        "name": re.sub(r"\{\{|[^\x20-\x7e]", "-", name)[:64],
        "parameterDefinitions": [
            # Not a PATH, whose default starts in the folder of the template, wherever that will be.
            {"name": "JobFile", "type": "STRING", "default": str(job)},
            {"name": "Items", "type": "STRING", "default": items},
        ],
        "steps": [step],
    }
    return str(yaml.safe_dump(whole, sort_keys=False, width=110, allow_unicode=True))


def _refuse_odd(words: Sequence[str], job: Path) -> None:
    for word in (*words, str(job)):
        if any("\ud800" <= char <= "\udfff" for char in word):
            hint = "Rename it, or use `wancli export slurm`."
            raise JobError(f"{word!r} is no UTF-8, which a template of OpenJD is", hint=hint)
    if odd := [word for word in words if "{{" in word]:
        raise JobError(f"{odd[0]!r} holds {{{{, which OpenJD replaces", hint="Say it in the job file.")


def _step(wancli: str, served: Sequence[str], options: Sequence[str], at_once: int) -> dict[str, Any]:
    """The only step: a session starts a server with the model, and each of its tasks asks that."""
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
    parts = {
        "name": "Item",
        "type": "CHUNK[INT]",
        "range": "{{Param.Items}}",
        "chunks": {"defaultTaskCount": at_once, "rangeConstraint": "NONCONTIGUOUS"},
    }
    stop = {"mode": "NOTIFY_THEN_TERMINATE", "notifyPeriodInSeconds": 180}
    return {
        "name": "Render",
        "stepEnvironments": [model],
        "parameterSpace": {"taskParameterDefinitions": [parts]},
        "script": {
            "actions": {"onRun": {"command": wancli, "args": [*render, *options], "cancelation": stop}}
        },
    }
