"""`wancli errors`: the errors, their codes and exit codes."""

from __future__ import annotations

from wancli.commands._common import print_json
from wancli.commands._options import Json
from wancli.errors import ExitStatus


def errors_command(as_json: Json = False) -> int:
    """List what can go wrong.

    Codes as events and reports have them, exit codes, whether another try may help.
    """
    from wancli import errors
    from wancli.report import terminal

    if as_json:
        print_json([errors.describe_error_type(kind) for kind in errors.error_types()])
    else:
        terminal.show(terminal.format_error_types(errors.error_types()))
    return ExitStatus.OK
