"""Reports and comparisons of a job as typed data: `JOB.report.json` and `JOB.compare.json`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from wancli.storage import records
from wancli.storage.records import Kind
from wancli.storage.schema import Count, Data, FileRecord, PathText, Positive

REPORT_SCHEMA, COMPARISON_SCHEMA = "wancli/report/1", "wancli/compare/1"


class ErrorRecord(Data):
    """Why a shot failed."""

    code: str = ""
    message: str
    hint: str = ""


class EntryRecord(Data):
    """A shot of a report as its JSON has it; the other keys are those of its manifest."""

    id: str
    labels: dict[str, Any]
    output: PathText
    status: str
    error: ErrorRecord | None = None


class MemoryRow(Data):
    """The predicted and measured bytes and seconds of a phase."""

    name: str
    measured: Count
    seconds: float
    expected: float | None = None
    model: Count = 0
    activation: Count = 0
    buffer: Count = 0
    total: Count = 0
    peak: Count = 0


class PeakRecord(Data):
    predicted: Count
    measured: Count


class CacheRecord(Data):
    hits: Count
    misses: Count
    encoder_loaded: bool


class ReportRecord(Data):
    """The whole of `JOB.report.json`. Reports of earlier versions have fewer totals."""

    KIND: ClassVar[Kind] = records.REPORT
    job: str
    shots: list[EntryRecord]
    created: str | None = None
    warnings: list[str] | None = None
    memory: list[MemoryRow] | None = None
    first_step_after: float | None = None
    process: Count | None = None
    peak: PeakRecord | None = None
    cache: CacheRecord | None = None


class Heatmap(Data):
    """Differences in 0..1, row by row."""

    width: Positive
    height: Positive
    values: list[float]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len(self.values) != self.width * self.height:
            raise ValueError(f"{len(self.values)} values are not {self.width} x {self.height}")
        return self


class ComparedShot(Data):
    """The metrics of a video against its baseline; `why` has the reason for each that is None."""

    id: str
    output: PathText
    baseline: str | None  # None if it is compared with nothing
    frames: Count = 0
    identical: bool = False
    latent_distance: float | None = None
    latent_from: str | None = None
    psnr: float | None = None
    psnr_inside: float | None = None  # of shots whose rules all act in frames and regions
    psnr_outside: float | None = None
    ssim: float | None = None
    motion: float | None = None
    baseline_motion: float | None = None
    heatmap: Heatmap | None = None
    why: dict[str, str] = Field(default_factory=dict)


class ComparisonRecord(Data):
    """The whole of `JOB.compare.json`. `key` hashes what the listed files were made from."""

    KIND: ClassVar[Kind] = records.COMPARISON
    shots: Annotated[list[ComparedShot], Field(min_length=1)]
    key: str = ""
    sheet: PathText | None = None
    video: PathText | None = None
    files: list[FileRecord] = Field(default_factory=list)
