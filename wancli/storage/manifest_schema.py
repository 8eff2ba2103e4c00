"""The record of a rendered shot as typed data: the body of its manifest, and of its latent before that.

`ShotRecord` goes into NAME.latents.safetensors when a shot is sampled, `Manifest` into NAME.manifest.json
when its video is written. Both are JSON. Keys of a later version are kept and written back; fields with a
default are missing in records of earlier versions.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from wancli.storage import records
from wancli.storage.attention_schema import AttentionRecord, AttentionSpecRecord
from wancli.storage.injection_schema import (
    Block,
    Branch,
    DifferenceRecord,
    EffectRecord,
    EmphasisRecord,
    LoraRecord,
    Measured,
    RuleRecord,
    SteerRecord,
    Step,
    Strength,
)
from wancli.storage.model_schema import ModelRecord
from wancli.storage.prompt_schema import InjectedPictureRecord, PictureRecord, PromptRecord, TimelineRecord
from wancli.storage.schema import Count, Data, FileName, FileRecord, Index, Positive

FrameRateText = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}/[1-9]\d{0,8}$")]  # a fraction
SKETCH_SIZE = 251  # sums per latent; a prime, so that neighbours in space fall into different sums
Pixels = Annotated[int, Field(ge=1, lt=100_000)]  # rows or columns


class StageRecord(Data):
    """Steps that one expert takes; `steps` are the first and the last."""

    expert: Literal["only", "high", "low"]
    steps: tuple[Step, Step]
    guidance: Strength


class CacheRecord(Data):
    """The settings of a step cache and, by branch, the steps that reused a residual."""

    method: str
    threshold: Annotated[float, Field(ge=0, le=100)]
    skips: Annotated[int, Field(ge=0, le=1000)]
    retention: Annotated[float, Field(ge=0, le=1)]
    table: str
    expert: Literal["both", "high", "low"]
    reused: dict[Branch, tuple[Step, ...]]


class ShotSettings(Data):
    """The settings of a shot as they were decided."""

    index: Index
    id: str
    labels: dict[str, Any]
    output: FileName
    width: Pixels
    height: Pixels
    frames: Annotated[int, Field(ge=1, le=100_001)]
    tokens: Count
    seed: Count
    noise: Literal["cpu", "cuda"]
    solver: str
    steps: Annotated[int, Field(ge=1, le=1000)]
    shift: Strength
    guidance: Strength
    boundary: float | None = None  # of a model with two experts, since wancli records it
    stages: Annotated[tuple[StageRecord, ...], Field(min_length=1)]
    timesteps: list[float]
    sigmas: list[float]
    fps: Annotated[int, Field(ge=1, le=240)] | FrameRateText
    crf: Annotated[int, Field(ge=0, le=51)]
    codec: Literal["h264", "h265"]
    decode_chunk: Annotated[int, Field(ge=1, le=64)]
    sharing: Positive = 1
    cache: CacheRecord | None = None


class PredictedPhase(Data):
    """Predicted bytes of one phase; `peak` is that of the whole process."""

    name: str
    model: Count
    activation: Count
    buffer: Count
    total: Count
    peak: Count


class PhaseRecord(Data):
    """The time and memory of one phase; the bytes of `cuda` are those of the device.

    A phase that served several shots is in the records of all of them, under one `id`. `earlier` marks phases
    of a run before the one that wrote the record. On a CPU the last bits of a latent depend on the number of
    `threads`, None if it was not recorded.
    """

    id: str = ""
    name: str
    seconds: Measured
    rss_start: Count
    rss: Count
    cuda: Count | None
    shots: Positive = 1
    threads: Positive | None = None
    earlier: bool = False

    @property
    def identity(self) -> str:
        """Return the id, or what stands for it in a record of an earlier version."""
        return self.id or f"{self.name} {self.seconds} {self.rss_start} {self.rss} {self.cuda}"

    @property
    def peak(self) -> int:
        """The measured bytes of the process, on CUDA of the device."""
        return self.cuda or self.rss


def _require_sums(text: str) -> str:
    if len(base64.b64decode(text, validate=True)) != 4 * SKETCH_SIZE:
        raise ValueError(f"is not {SKETCH_SIZE} numbers in base64")
    return text


class LatentSketch(Data):
    """What `video.metrics.sketch` keeps of a latent."""

    shape: list[Positive]
    norm: Measured
    sketch: Annotated[str, AfterValidator(_require_sums)]


class DecodeRecord(Data):
    """How a latent was decoded; `fallback` if not as planned."""

    device: str
    chunk: Positive
    fallback: bool


class ShotRecord(Data):
    """What made a latent: the settings, the model, and how sampling went. `key` is the hash of the shot."""

    KIND: ClassVar[records.Kind] = records.LATENT
    key: str
    latents_key: str
    shot: ShotSettings
    model: ModelRecord
    predicted: list[PredictedPhase]
    versions: dict[str, str]
    # The shot's own, the negative one if there is one, the injected ones, the others of its timeline,
    # those of its steering.
    prompts: list[PromptRecord]
    timeline: TimelineRecord | None = None
    encoder_loaded: bool
    pictures: list[PictureRecord] = Field(default_factory=list)
    injection: list[RuleRecord]
    emphasis: list[EmphasisRecord] = Field(default_factory=list)
    steer: list[SteerRecord] = Field(default_factory=list)
    loras: list[LoraRecord] = Field(default_factory=list)
    effects: list[EffectRecord]
    first_step_after: float | None = None
    phases: list[PhaseRecord]
    latent: LatentSketch | None = None
    attention: AttentionRecord | None = None

    @model_validator(mode="after")
    def _prompts_are_complete(self) -> Self:
        ids = {prompt.id for prompt in self.prompts}
        read = {rule.text for rule in self.injection if not rule.picture}
        if self.timeline:
            read |= {segment.id for segment in self.timeline.segments}
        read |= self._steering_ids
        if not ids.issuperset(read) or not self.prompts:
            raise ValueError("a prompt is missing")
        return self

    @model_validator(mode="after")
    def _cells_exist(self) -> Self:
        depth, steps = self.model.sizes.num_layers, self.shot.steps
        blocks = {block for rule in self.injection for block in (*rule.blocks, *rule.hits_by_block)}
        at = {step for rule in self.injection for step in (*rule.steps, *rule.hits_by_step)}
        if any(block >= depth for block in blocks) or any(step >= steps for step in at):
            raise ValueError("an injection is into a block or a step that the shot does not have")
        return self

    @property
    def prompt(self) -> PromptRecord:
        return self.prompts[0]

    @property
    def negative(self) -> PromptRecord | None:
        others = sum(rule.picture is None for rule in self.injection)
        if self.timeline:
            others += len({segment.id for segment in self.timeline.segments} - {self.prompt.id})
        others += len(self._steering_ids)
        return self.prompts[1] if len(self.prompts) > 1 + others else None

    @property
    def _steering_ids(self) -> set[str]:
        return {id for entry in self.steer for id in (*entry.toward, *entry.away)}

    @property
    def prompt_text(self) -> str:
        """The prompt for people: `A cat`, or `A cat | A dog` if it changes over the frames."""
        return self.timeline.text if self.timeline else self.prompt.text

    @property
    def injected(self) -> list[PromptRecord | InjectedPictureRecord]:
        """The prompt or the picture of each rule."""
        by_id = {prompt.id: prompt for prompt in self.prompts}
        return [rule.picture or by_id[rule.text] for rule in self.injection]


class Manifest(ShotRecord):
    """The body of a manifest: what made a latent, how it was decoded, and the files that this left."""

    KIND: ClassVar[records.Kind] = records.MANIFEST
    decoded: DecodeRecord | None = None
    files: list[FileRecord]

    def file(self, name: str) -> FileRecord | None:
        """Find the record of a file by its name."""
        return next((file for file in self.files if file.path == name), None)


class SavedState(Data):
    """The record of a saved state. `output`, `shot` and `model` are missing in states of earlier versions."""

    KIND: ClassVar[records.Kind] = records.STATE
    format: Literal[1]
    latents_key: str
    output: FileName | None = None
    shot: ShotSettings | None = None
    model: ModelRecord | None = None
    step: Annotated[int, Field(ge=1, le=1000)]
    measured: bool
    read: list[tuple[Step, Branch, Block]]
    effects: list[EffectRecord]
    differences: list[DifferenceRecord]
    phases: list[PhaseRecord]
    attention: AttentionSpecRecord | None = None  # of its attention maps


class ManifestKey(Data):
    """The key of a manifest, read without a proof."""

    key: str


class ManifestProof(ManifestKey):
    """What proves that a shot is done: its key and its files. No other key of a manifest can undo it."""

    KIND: ClassVar[records.Kind] = records.MANIFEST
    files: list[FileRecord]

    def has(self, name: str, size: int) -> bool:
        """Return whether a file of this name and size is listed."""
        return any((file.path, file.bytes) == (name, size) for file in self.files)
