"""Rules of a job file: which blocks read something else, when, and in which part of the video."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from wancli.job.schema_values import (
    Blocks,
    EmbeddingFile,
    Frames,
    Number,
    Prompt,
    Share,
    SigmaRange,
    Steps,
    Strength,
    StrictModel,
    blocks_kind,
    steps_kind,
    text_or_mapping,
)

EmphasisWeight = Annotated[float, Field(gt=0, le=100)]


BlockGroups = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[Blocks], Field(min_length=1), Tag("<list>")],
    Discriminator(blocks_kind),
]


def _step_groups_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else steps_kind(value)


StepGroups = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[SigmaRange, Tag("<mapping>")]
    | Annotated[list[Steps], Field(min_length=1), Tag("<list>")],
    Discriminator(_step_groups_kind),
]


class Attention(StrictModel):
    """Words of the prompt whose attention maps are recorded; every entry of a list is a group of its own."""

    words: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=32)
    blocks: BlockGroups = "all"
    steps: StepGroups = "all"


class Placement(StrictModel):
    """Where and when a rule acts."""

    blocks: Blocks = "all"
    steps: Steps = "all"
    expert: Literal["high", "low", "both"] = "both"
    frames: Frames | None = None
    during: str | None = None
    region: list[Share] | None = Field(None, min_length=4, max_length=4)
    mask: str | None = None
    feather: Share = 0.0


class EmphasisEntry(Placement):
    """Words of the prompt that count more or less than others."""

    words: str
    weight: EmphasisWeight


def _mapping_or_list(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict) else "<list>"


EmphasisOption = Annotated[
    Annotated[dict[str, EmphasisWeight], Tag("<mapping>")] | Annotated[list[EmphasisEntry], Tag("<list>")],
    Discriminator(_mapping_or_list),
]


def _prompts_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else text_or_mapping(value)


Prompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[EmbeddingFile, Tag("<mapping>")]
    | Annotated[list[Prompt], Field(min_length=1), Tag("<list>")],
    Discriminator(_prompts_kind),
]


class SteerEntry(Placement):
    """Prompts toward which, and away from which, a vector is added to what blocks read."""

    toward: Prompts | None = None
    away: Prompts | None = None
    file: str | None = None
    strength: Strength = 1.0
    step_strength: Strength = 1.0


class InjectRule(Placement):
    """Where, when and how strongly a second prompt or picture is read."""

    strength: Strength = 1.0
    step_strength: Strength = 1.0
    branch: Literal["cond", "uncond", "both"] = "cond"
    blend: Literal["context-lerp", "output-mix", "replace", "concat", "nag"] = "context-lerp"
    gain: float = Field(1.0, ge=-100, le=100)


class InjectPrompt(InjectRule):
    """A second prompt, or some words of it, for chosen blocks, steps and guidance branches."""

    prompt: Prompt
    words: str | None = None
    scale: float | None = Field(None, ge=-100, le=100)
    alpha: float | None = Field(None, ge=0, le=1)
    tau: float | None = Field(None, gt=0, le=100)


class InjectPicture(InjectRule):
    """A second picture, as CLIP sees it, for chosen blocks, steps and guidance branches."""

    image: str


def _inject_kind(value: Any) -> str:
    has_picture = isinstance(value, InjectPicture) or (isinstance(value, dict) and "image" in value)
    return "<picture>" if has_picture else "<prompt>"


Inject = Annotated[
    Annotated[InjectPrompt, Tag("<prompt>")] | Annotated[InjectPicture, Tag("<picture>")],
    Discriminator(_inject_kind),
]


class LoraEntry(StrictModel):
    """A LoRA, for the whole transformer or for chosen blocks and steps."""

    path: str
    strength: Number = 1.0
    blocks: Blocks = "all"
    steps: Steps = "all"
    expert: Literal["both", "high", "low"] = "both"
