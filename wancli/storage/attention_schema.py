"""The records of attention maps: which there are, and the files that hold them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from wancli.storage.schema import Count, Data, FileRecord

MAX_GROUPS = 1000


class GroupRecord(Data):
    """Blocks or steps whose maps are averaged, and how the user wrote them."""

    label: str
    members: Annotated[list[Annotated[int, Field(ge=0, lt=1000)]], Field(min_length=1)]


class AttentionSpecRecord(Data):
    """Which maps there are: one for every word, group of blocks and group of steps. `rows` are those of the
    pieces of each word in the prompt.
    """

    words: Annotated[list[str], Field(min_length=1)]
    rows: list[Annotated[list[Count], Field(min_length=1)]]
    blocks: Annotated[list[GroupRecord], Field(min_length=1, max_length=MAX_GROUPS)]
    steps: Annotated[list[GroupRecord], Field(min_length=1, max_length=MAX_GROUPS)]

    @model_validator(mode="after")
    def _words_have_rows(self) -> Self:
        if len(self.words) != len(self.rows):
            raise ValueError("words and rows are of different lengths")
        return self


class AttentionRecord(AttentionSpecRecord):
    """The attention maps of a shot: the file with the numbers and, once its video is made, the overlay."""

    maps: FileRecord
    video: FileRecord | None = None
