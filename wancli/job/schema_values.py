"""Values of a job file that several keys take: prompts, frames, blocks, steps, strengths."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from wancli.injection.selectors import Curve


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class EmbeddingFile(StrictModel):
    """A prompt that `wancli encode --out` has already encoded."""

    embedding: str
    index: int = Field(0, ge=0)


def text_or_mapping(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | BaseModel) else "<text>"


def text_or_int(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<int>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[EmbeddingFile, Tag("<mapping>")],
    Discriminator(text_or_mapping),
]


Frames = Annotated[Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")], Discriminator(text_or_int)]


class Segment(StrictModel):
    """Frames of a video, and the prompt that they read."""

    text: Prompt
    frames: Frames | None = None
    during: str | None = None


Segments = Annotated[
    list[
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[Segment, Tag("<mapping>")],
            Discriminator(text_or_mapping),
        ]
    ],
    Field(min_length=1),
]


class PromptOverTime(StrictModel):
    """A prompt that changes over the frames. `text` stands before that of every segment."""

    segments: Segments
    text: str | None = None
    blend: Literal["cut", "crossfade", "relay"] = "cut"
    fade: int | None = Field(None, ge=1, le=100_001)


def _main_prompt_kind(value: Any) -> str:
    if isinstance(value, list):
        return "<list>"
    if isinstance(value, dict):  # a misspelt `segments` is a list, too
        has_list = any(isinstance(inner, list) for inner in value.values())
        if has_list or PromptOverTime.model_fields.keys() & value.keys():
            return "<segments>"
    if isinstance(value, PromptOverTime):
        return "<segments>"
    return text_or_mapping(value)


MainPrompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[EmbeddingFile, Tag("<mapping>")]
    | Annotated[Segments, Tag("<list>")]
    | Annotated[PromptOverTime, Tag("<segments>")],
    Discriminator(_main_prompt_kind),
]


class SigmaRange(StrictModel):
    sigma: list[float] = Field(min_length=2, max_length=2)


class CurveSpec(StrictModel):
    """A strength over the chosen blocks (or steps); formulas in `wancli.injection.selectors.Curve`."""

    curve: Literal["linear", "gaussian", "sine", "step", "random"]
    start: float = Field(0.0, ge=-10, le=10)
    end: float = Field(1.0, ge=-10, le=10)
    center: float = Field(0.5, ge=0, le=1)
    width: float = Field(0.2, ge=0.001)
    periods: float = Field(1.0, gt=0, le=1000)
    every: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    def to_curve(self) -> Curve:
        return Curve(
            self.curve, self.start, self.end, self.center, self.width, self.periods, self.every, self.seed
        )


def _strength_kind(value: Any) -> str:
    if isinstance(value, dict | BaseModel):
        return "<mapping>"
    return "<list>" if isinstance(value, list) else "<number>"


Number = Annotated[float, Field(ge=-10, le=10)]


Strength = Annotated[
    Annotated[Number, Tag("<number>")]
    | Annotated[list[Number], Tag("<list>")]
    | Annotated[CurveSpec, Tag("<mapping>")],
    Discriminator(_strength_kind),
]


def steps_kind(value: Any) -> str:
    if isinstance(value, dict | SigmaRange):
        return "<mapping>"
    return "<int>" if isinstance(value, int) else "<text>"


Steps = Annotated[
    Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")] | Annotated[SigmaRange, Tag("<mapping>")],
    Discriminator(steps_kind),
]


def blocks_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<int>" if isinstance(value, int) else "<text>"


BlockSet = Annotated[Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")], Discriminator(blocks_kind)]


Blocks = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[BlockSet], Field(min_length=1), Tag("<list>")],
    Discriminator(blocks_kind),
]


Share = Annotated[float, Field(ge=0, le=1)]
