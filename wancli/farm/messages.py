"""The types of what a client sends to a server. Imports pydantic, so for the server alone."""

from __future__ import annotations

import codecs
import signal
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from wancli.signals import STOP_SIGNALS
from wancli.storage import records
from wancli.storage.schema import Data, PathText


def _require_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except LookupError as error:
        raise ValueError(str(error)) from None
    return name


def _require_no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("has a NUL")
    return text


def _require_variable(name: str) -> str:
    if not name or "=" in name:
        raise ValueError("is not the name of a variable")
    return _require_no_nul(name)


class StreamSettings(Data):
    """How to write to one of the client's streams."""

    encoding: Annotated[str, AfterValidator(_require_encoding)] | None
    write_through: bool


class Request(Data):
    """A command line, and the process that it would run in. `began`: when that was started, since 1970."""

    KIND: ClassVar[records.Kind] = records.MESSAGE
    arguments: list[Annotated[str, AfterValidator(_require_no_nul)]]
    folder: PathText
    environment: dict[
        Annotated[str, AfterValidator(_require_variable)], Annotated[str, AfterValidator(_require_no_nul)]
    ]
    written: tuple[StreamSettings, StreamSettings]
    umask: Annotated[int, Field(strict=True, ge=0, le=0o777)]
    began: float


def identity_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of the client, which every version sends; empty if it is none."""
    identity = message.get("identity")
    return identity if isinstance(identity, dict) else {}


def stop_signal_of(message: Mapping[str, Any]) -> signal.Signals | None:
    """Return the signal that a client got; None if the message is not of one that requests a stop."""
    return next((number for number in STOP_SIGNALS if number.name == message.get("signal")), None)
