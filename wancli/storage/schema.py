"""The types of records: what a parsed JSON document must be before any code uses it.

A value that would break the code behind it is refused here: a name with a slash, a count below zero, a list
that may not be empty. Keys of a later version are kept, and written back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from wancli.storage.records import Kind

Number: TypeAlias = int | float  # as the job gave it
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Index = Annotated[int, Field(strict=True, ge=0, lt=2**20)]


def _require_path(text: str) -> str:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("is not a name that a file can have") from None
    if not text or b"\0" in encoded:
        raise ValueError("is not a name that a file can have")
    return text


def _require_file_name(text: str) -> str:
    if "/" in text or text in (".", ".."):
        raise ValueError("is not the name of a file")
    return text


def _require_inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("leads out of the folder")
    return text


PathText = Annotated[str, AfterValidator(_require_path)]
FileName = Annotated[PathText, AfterValidator(_require_file_name)]
RelativePath = Annotated[PathText, AfterValidator(_require_inside)]


class Data(BaseModel):
    """A part of a record."""

    KIND: ClassVar[Kind] = Kind("the record", 0)
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON data that was read, or is to be written; keys are sorted, as in all records."""
        data: dict[str, Any] = _sort_keys(self.model_dump(mode="json", exclude_unset=True))
        return data

    @classmethod
    def parse(cls, data: object, path: Path) -> Self:
        """Validate a record that was read from `path`. Raises EntryError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise cls.KIND.damaged(path, _describe(error)) from None


class FileRecord(Data):
    """A file that belongs to a record, by its path relative to that."""

    path: RelativePath
    sha256: str
    bytes: Count


def _describe(error: ValidationError) -> str:
    """Name the first key that is wrong, and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def _sort_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sort_keys(value[key]) for key in sorted(value)}
    return [_sort_keys(item) for item in value] if isinstance(value, list) else value
