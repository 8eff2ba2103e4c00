"""What blocks of a shot read beside its prompt, as typed data of its record."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wancli.storage.prompt_schema import InjectedPictureRecord
from wancli.storage.schema import Count, Data, Number, PathText, Positive

Block = Annotated[int, Field(ge=0, lt=1000)]
Step = Annotated[int, Field(ge=0, lt=1000)]
Strength = Annotated[Number, Field(ge=-1e6, le=1e6)]
Measured = Annotated[float, Field(ge=0, le=1e100)]  # far from an overflow of its sums
Branch = Literal["cond", "uncond"]


class VerdictRecord(Data):
    percent: Measured
    band: str


class DifferenceRecord(Data):
    """How far an injected prompt is from the shot's own."""

    verdict: VerdictRecord


class MaskRecord(Data):
    """The file of a mask, and the SHA-256 of its decoded pixels."""

    path: PathText
    sha256: str


Share = Annotated[float, Field(ge=0, le=1)]


class AreaRecord(Data):
    """Where a rule acts, see `injection.area.Area`: None or a missing key stands for all. `tokens` counts the
    tokens that have a pixel in it.
    """

    frames: tuple[Count, Count] | None = None
    region: tuple[Share, Share, Share, Share] | None = None
    feather: Share = 0.0
    mask: MaskRecord | None = None
    tokens: Positive


class NagRecord(Data):
    """The settings of normalised attention guidance."""

    scale: Annotated[Strength, Field(ge=0)]
    alpha: Annotated[Strength, Field(ge=0)]
    tau: Annotated[Strength, Field(ge=0)]


class RuleRecord(Data):
    """One injection: what was planned, and how often blocks read it. `text` is the id of its prompt or, if it
    has one, of its `picture`.
    """

    text: str
    blocks: Annotated[dict[Block, Strength], Field(min_length=1)]
    steps: Annotated[dict[Step, Strength], Field(min_length=1)]
    branches: Annotated[list[Branch], Field(min_length=1)]
    blend: Literal["context-lerp", "output-mix", "replace", "concat", "nag"]
    gain: Strength
    planned: Count
    hits: Count
    hits_by_step: dict[Step, Count]
    hits_by_branch: dict[Branch, Count]
    hits_by_block: dict[Block, Count]
    difference: DifferenceRecord | None = None  # of a prompt
    picture: InjectedPictureRecord | None = None
    area: AreaRecord | None = None  # None: the whole video
    words: str | None = None  # that the rule was narrowed to,
    rows: tuple[Count, ...] | None = None  # and their rows of its prompt
    nag: NagRecord | None = None  # of the blend `nag`

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        if (self.difference is None) == (self.picture is None):
            raise ValueError("an injection has either `difference`, of its prompt, or `picture`")
        return self


class EmphasisRecord(Data):
    """Words of the prompt that count more or less: where, and how often blocks read them so."""

    words: str
    rows: Annotated[tuple[Count, ...], Field(min_length=1)]
    weight: Annotated[Number, Field(gt=0, le=1e6)]
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]
    planned: Count
    hits: Count
    area: AreaRecord | None = None  # None: the whole video


class SteerRecord(Data):
    """A steering vector: the ids of its prompts, where it was added, and how often blocks read it."""

    toward: tuple[str, ...]
    away: tuple[str, ...]
    blocks: Annotated[dict[Block, Strength], Field(min_length=1)]
    steps: Annotated[dict[Step, Strength], Field(min_length=1)]
    planned: Count
    hits: Count
    area: AreaRecord | None = None  # None: the whole video


class LoraRecord(Data):
    """One LoRA: its file, where and when it was applied."""

    path: PathText
    sha256: str
    strength: Strength
    blocks: tuple[Block, ...] | None
    steps: Annotated[tuple[Step, ...], Field(min_length=1)] | None
    expert: Literal["high", "low"] | None
    scales: tuple[Number, ...] = ()


class EffectRecord(Data):
    """The relative change that the injections made to one forward."""

    step: Step
    branch: Branch
    velocity: Measured
    blocks: dict[Block, Measured]
    changed_percent: dict[Block, Measured]

    @model_validator(mode="after")
    def _same_blocks(self) -> Self:
        if self.blocks.keys() != self.changed_percent.keys():
            raise ValueError("blocks and changed_percent are of different blocks")
        return self
