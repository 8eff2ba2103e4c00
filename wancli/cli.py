"""The command line: its commands, and the exit codes of their errors.

stdout carries results only: paths, or one JSON document. Everything else goes to stderr.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import traceback
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core
import typer.main

from wancli import __version__, stdio
from wancli.commands import (
    attention,
    cache,
    check,
    compare,
    decode,
    diff,
    encode,
    errors,
    explore,
    export,
    fetch,
    inspect,
    new,
    plan,
    probe,
    render,
    report,
    schema,
    serve,
    status,
)
from wancli.commands._common import Invocation, print_error
from wancli.errors import Bug, ExitStatus, MachineError, Stopped, UsageError, WancliError
from wancli.progress import make_printable
from wancli.storage.paths import require_cwd
from wancli.storage.read_errors import find_open_files_error

if TYPE_CHECKING:
    from wancli.engine.networks import ModelCache

app = typer.Typer(
    name="wancli",
    help="Render Wan text-to-video in batches, with a second prompt injected into chosen blocks.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("render")(render.render_command)
app.command("new")(new.new_command)
app.command("plan")(plan.plan_command)
app.command("status")(status.status_command)
app.command("check")(check.check_command)
app.command("schema")(schema.schema_command)
app.command("encode")(encode.encode_command)
app.command("decode")(decode.decode_command)
app.command("diff")(diff.diff_command)
app.command("attention")(attention.attention_command)
app.command("probe")(probe.probe_command)
app.command("compare")(compare.compare_command)
app.command("report")(report.report_command)
app.command("explore")(explore.explore_command)
app.command("fetch")(fetch.fetch_command)
app.command("inspect")(inspect.inspect_command)
app.command("errors")(errors.errors_command)
app.command("serve")(serve.serve_command)
app.add_typer(export.app, name="export")
app.add_typer(cache.app, name="cache")


@lru_cache(1)
def _build_command() -> typer.core.TyperGroup:
    """Build the commands with all their options, once in a process that runs several command lines."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    return command


def run(arguments: list[str], model_cache: ModelCache | None = None, began: float | None = None) -> int:
    """Run one command line and return its exit code. Only this function turns errors into exit codes.

    A process that runs several command lines passes `model_cache`, the networks in memory, and `began`, the
    start time of this one.
    """
    try:
        if not arguments[:1] or not arguments[0].startswith("-"):  # --help is understood anywhere
            require_cwd()
    except MachineError as error:
        return _report_refusal(error, arguments)
    try:
        code = _run_command(arguments, Invocation(run, model_cache, began))
    except WancliError as error:
        return report_error(error, arguments)
    except typer.TyperException as error:
        return _report_refusal(_describe_usage(error), arguments)
    except BrokenPipeError:
        return ExitStatus.SOME_FAILED
    except KeyboardInterrupt:  # while the last output waits for its reader
        code = ExitStatus.INTERRUPTED
    except Exception as error:
        signalled = error.__cause__  # while a class was created: Python wraps what __set_name__ raises
        known = signalled if isinstance(signalled, Stopped) else find_open_files_error(error)
        if known:
            return report_error(known, arguments)
        if not isinstance(signalled, KeyboardInterrupt):
            print_error(Bug(f"a bug in wancli {__version__}; please report it with {_log_traceback()}"))
            return Bug.status
        code = ExitStatus.INTERRUPTED
    if code == ExitStatus.INTERRUPTED:  # typer returns this after Ctrl-C, and 1 when stdout is closed
        print("wancli: interrupted; finished shots are kept, run again to continue", file=sys.stderr)
    if code in (ExitStatus.OK, ExitStatus.SOME_FAILED) and stdio.write_failure(sys.stdout):
        return ExitStatus.MACHINE  # the batch has continued; stderr has the reason
    return code


def _run_command(arguments: list[str], invocation: Invocation) -> int:
    """Run a command and write its output. After Ctrl-C only the end of the process waits for a reader."""
    code = int(_build_command()(arguments, prog_name="wancli", standalone_mode=False, obj=invocation) or 0)
    if code != ExitStatus.INTERRUPTED:
        sys.stdout.flush()
    return code


def _describe_usage(error: typer.TyperException) -> UsageError:
    """Say where options are listed or, for an option that is a key of a job, how the key is set."""
    from wancli.job.foreign_words import explain_word
    from wancli.job.schema import Job

    option = getattr(error, "option_name", "")
    key = option.lstrip("-")
    if key in Job.model_fields:
        return UsageError(
            f"No such option: {option}", hint=f"{key} is a key of a job: --set {key}=VALUE sets it."
        )
    if instead := explain_word(key):
        return UsageError(f"No such option: {option}", hint=f"{instead.replace('write', 'In a job:', 1)}.")
    return UsageError(error.format_message(), hint="`wancli COMMAND --help` lists the options.")


def _log_traceback() -> str:
    """Write the traceback of the error that is handled to a file, else to stderr; return where it is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="wancli-", suffix=".log", delete=False
        ) as log:
            traceback.print_exc(file=log)
    except OSError:  # no folder for temporary files takes one
        traceback.print_exc()
        return "the lines above"
    return log.name


def _report_refusal(error: WancliError, arguments: list[str]) -> ExitStatus:
    """Report, also to programs, why no command was started, and return the exit code."""
    print_error(error)
    if "--json-stream" in arguments:
        from wancli.report.json_stream import write_refusal

        write_refusal(sys.stdout, next((word for word in arguments if not word.startswith("-")), ""), error)
    return error.status


def report_error(error: WancliError, arguments: list[str]) -> ExitStatus:
    """Report the error that ended a command line, and return its exit code."""
    print_error(error)
    if isinstance(error, Stopped):
        command = error.resume_command or f"wancli {shlex.join(arguments)}"
        print(make_printable(f"  resume: {command}"), file=sys.stderr)
    return error.status


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"wancli {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
