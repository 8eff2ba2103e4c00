"""The record of a rendered shot as typed data: the body of its manifest, and of its latent before that.

`ShotRecord` goes into NAME.latents.safetensors when a shot is sampled, `Manifest` into NAME.manifest.json
when its video is written. Both are JSON. Keys of a later version are kept and written back; fields with a
default are missing in records of earlier versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wancli.errors import EntryError

Number: TypeAlias = int | float  # as the job gave it
FrameRateText: TypeAlias = Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")]  # a fraction


def _sort_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sort_keys(value[key]) for key in sorted(value)}
    return [_sort_keys(item) for item in value] if isinstance(value, list) else value


class Data(BaseModel):
    """A part of a record."""

    NAME: ClassVar[str] = "the record"  # in messages
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON data that was read, or is to be written; keys are sorted, as in all records."""
        data: dict[str, Any] = _sort_keys(self.model_dump(mode="json", exclude_unset=True))
        return data

    @classmethod
    def parse(cls, data: Mapping[str, Any], path: Path) -> Self:
        """Validate a record that was read from `path`. Raises EntryError."""
        try:
            return cls.model_validate(data)
        except ValidationError:
            raise damaged(path, cls.NAME) from None


class StageRecord(Data):
    """Steps that one expert takes; `steps` are the first and the last."""

    expert: str
    steps: tuple[int, int]
    guidance: Number


class ShotSettings(Data):
    """The settings of a shot as they were decided."""

    index: int
    id: str
    labels: dict[str, Any]
    output: str
    width: int
    height: int
    frames: int
    tokens: int
    seed: int
    noise: str
    solver: str
    steps: int
    shift: Number
    guidance: Number
    boundary: float | None = None  # of a model with two experts, since wancli records it
    stages: tuple[StageRecord, ...]
    timesteps: list[float]
    sigmas: list[float]
    fps: int | FrameRateText
    crf: int
    codec: str
    decode_chunk: int
    sharing: int = 1


class Fingerprints(Data):
    """SHA-256 of the weights of each network."""

    transformer: str
    text_encoder: str
    vae: str


class KernelRecord(Data):
    """How the transformer computed."""

    attention: str = "auto"
    chunk: int | None = None
    fp8_matmul: bool = False


class CheckpointFiles(Data):
    """The files of a checkpoint that was named file by file."""

    transformer: str | None = None
    high_noise: str | None = None
    low_noise: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    heads: int | None = None


class Sizes(Data):
    """The sizes of the transformer; all fields of a WanConfig are there."""

    num_layers: int


class ModelRecord(Data):
    """The model of a shot, and how it ran."""

    root: str
    files: CheckpointFiles | None = None
    variant: str
    sizes: Sizes
    networks: dict[str, Any] | None = None
    dtype: str
    residency: str = "resident"
    text_encoder: str = "resident"
    chunk: int | None = None
    why: list[str] = Field(default_factory=list)
    device: str
    kernels: KernelRecord = KernelRecord()
    attention: dict[str, str] = Field(default_factory=dict)
    sha256: Fingerprints


class PredictedPhase(Data):
    """Predicted bytes of one phase; `peak` is that of the whole process."""

    name: str
    model: int
    activation: int
    buffer: int
    total: int
    peak: int


class PromptRecord(Data):
    """A text as the encoder read it; `cached` if its embedding had been computed before."""

    id: str
    text: str
    tokens: int
    pieces: list[str] = Field(default_factory=list)
    max_tokens: int = 256
    truncated: bool
    file: str | None
    index: int = 0
    cached: bool


class LinkRecord(Data):
    """The frame of another shot's video."""

    shot: str
    frame: int


class PictureRecord(Data):
    """A picture as a frame of the video. `sha256`, `width` and `height` are of its decoded pixels.

    With a `link` it is a frame of another shot's video, and `sha256` covers what that is made from. `cached`:
    its latent had been computed before.
    """

    role: str  # first or last
    path: str
    sha256: str
    width: int
    height: int
    preprocess: str
    fit: str
    orient: str
    alpha: str
    link: LinkRecord | None = None
    cached: bool


class VerdictRecord(Data):
    percent: float
    band: str


class DifferenceRecord(Data):
    """How far an injected prompt is from the shot's own."""

    verdict: VerdictRecord


class RuleRecord(Data):
    """One injection: what was planned, and how often blocks read it. `text` is the id of its prompt."""

    text: str
    blocks: dict[int, Number]
    steps: dict[int, Number]
    branches: list[str]
    blend: str
    gain: Number
    planned: int
    hits: int
    hits_by_step: dict[int, int]
    hits_by_branch: dict[str, int]
    hits_by_block: dict[int, int]
    difference: DifferenceRecord


class LoraRecord(Data):
    """One LoRA: its file, where and when it was applied."""

    path: str
    sha256: str
    strength: Number
    blocks: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    expert: str | None
    scales: tuple[Number, ...] = ()


class EffectRecord(Data):
    """The relative change that the injections made to one forward."""

    step: int
    branch: str
    velocity: float
    blocks: dict[int, float]
    changed_percent: dict[int, float]


class PhaseRecord(Data):
    """The time and memory of one phase; the bytes of `cuda` are those of the device.

    A phase that served several shots is in the records of all of them, under one `id`. `earlier` marks phases
    of a run before the one that wrote the record.
    """

    id: str = ""
    name: str
    seconds: float
    rss_start: int
    rss: int
    cuda: int | None
    shots: int = 1
    earlier: bool = False

    @property
    def identity(self) -> str:
        """Return the id, or what stands for it in a record of an earlier version."""
        return self.id or f"{self.name} {self.seconds} {self.rss_start} {self.rss} {self.cuda}"

    @property
    def peak(self) -> int:
        """The measured bytes of the process, on CUDA of the device."""
        return self.cuda or self.rss


class LatentSketch(Data):
    """What `video.metrics.sketch` keeps of a latent."""

    shape: list[int]
    norm: float
    sketch: str


class DecodeRecord(Data):
    """How a latent was decoded; `fallback` if not as planned."""

    device: str
    chunk: int
    fallback: bool


class FileRecord(Data):
    """A file that belongs to a manifest, by its path relative to that."""

    path: str
    sha256: str
    bytes: int


class ShotRecord(Data):
    """What made a latent: the settings, the model, and how sampling went. `key` is the hash of the shot."""

    key: str
    latents_key: str
    shot: ShotSettings
    model: ModelRecord
    predicted: list[PredictedPhase]
    versions: dict[str, str]
    prompts: list[PromptRecord]  # the shot's own, the negative one if there is one, the injected ones
    encoder_loaded: bool
    pictures: list[PictureRecord] = Field(default_factory=list)
    injection: list[RuleRecord]
    loras: list[LoraRecord] = Field(default_factory=list)
    effects: list[EffectRecord]
    first_step_after: float | None = None
    phases: list[PhaseRecord]
    latent: LatentSketch | None = None

    @model_validator(mode="after")
    def _prompts_are_complete(self) -> Self:
        ids = {prompt.id for prompt in self.prompts}
        if not ids.issuperset(rule.text for rule in self.injection) or not self.prompts:
            raise ValueError("a prompt is missing")
        return self

    @property
    def prompt(self) -> PromptRecord:
        return self.prompts[0]

    @property
    def negative(self) -> PromptRecord | None:
        return self.prompts[1] if len(self.prompts) > 1 + len(self.injection) else None

    @property
    def injected(self) -> list[PromptRecord]:
        """The prompt of each rule."""
        by_id = {prompt.id: prompt for prompt in self.prompts}
        return [by_id[rule.text] for rule in self.injection]


class Manifest(ShotRecord):
    """The body of a manifest: what made a latent, how it was decoded, and the files that this left."""

    NAME = "the manifest"
    decoded: DecodeRecord | None = None
    files: list[FileRecord]

    def file(self, name: str) -> FileRecord | None:
        """Find the record of a file by its name."""
        return next((file for file in self.files if file.path == name), None)


class StateRecord(Data):
    """What a saved state says of its shot. `output` is missing in states of earlier versions."""

    latents_key: str = ""
    output: str | None = None
    step: int = 0


class ManifestKey(Data):
    """The key of a manifest, read without a proof."""

    key: str


class ManifestProof(ManifestKey):
    """What proves that a shot is done: its key and its files. No other key of a manifest can undo it."""

    NAME = "the manifest"
    files: list[FileRecord]


def damaged(path: Path, name: str) -> EntryError:
    """Return the error for a record that cannot be used."""
    hint = "delete it, or render again with --force"
    return EntryError(f"{name} is damaged, or of another version", where=str(path), hint=hint)
