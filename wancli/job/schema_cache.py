"""The step cache of a job file: which forwards reuse the residual of an earlier one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from wancli.job.schema_values import StrictModel, text_or_mapping


class CacheOptions(StrictModel):
    """A step cache. What is left out is that of the table, which is the published one of the model."""

    method: Literal["magcache"] = "magcache"
    threshold: float | None = Field(None, ge=0, le=100)
    skips: int | None = Field(None, ge=0, le=1000)
    retention: float | None = Field(None, ge=0, le=1)
    table: str | None = Field(None, min_length=1, max_length=200)
    expert: Literal["both", "high", "low"] | None = None
    force: bool = False


CacheOption = Annotated[
    Annotated[Literal["none", "magcache"], Tag("<text>")] | Annotated[CacheOptions, Tag("<mapping>")],
    Discriminator(text_or_mapping),
]
