"""`wancli errors`: the errors, their codes and exit codes."""

from __future__ import annotations

from collections.abc import Iterator

from wancli import errors
from wancli.commands._common import print_json
from wancli.commands._options import Json
from wancli.errors import ExitStatus


def errors_command(as_json: Json = False) -> int:
    """List all errors.

    Their codes in events and reports, exit codes, and whether another try may help.
    """
    from wancli.report import terminal

    if as_json:
        print_json([errors.describe_error_type(kind) for kind in errors.error_types()])
    else:
        terminal.show(_format_error_types())
    return ExitStatus.OK


def _format_error_types() -> Iterator[str]:
    """Format each error on one line: `CODE  EXIT CODE  yes|no  MEANING`."""
    yield f"{'code':<22} exit  retry  meaning"
    for kind in errors.error_types():
        facts = errors.describe_error_type(kind)
        retry = "yes" if facts["retryable"] else "no"
        yield f"{facts['code']:<22} {facts['exit_code']:>4}  {retry:<5}  {facts['meaning']}"
