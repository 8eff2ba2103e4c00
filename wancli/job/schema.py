"""Strict models of a job file, as the user wrote it.

Nothing is decided here: fields that depend on the model stay None until `wancli.plan.planner`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from wancli import wan_mini
from wancli.job.schema_cache import CacheOption, CacheOptions
from wancli.job.schema_rules import Attention, EmphasisOption, Inject, LoraEntry, SteerEntry
from wancli.job.schema_values import MainPrompt, Prompt, StrictModel, text_or_int, text_or_mapping
from wancli.models.config import AttentionBackend
from wancli.storage.records import MAX_DIGITS
from wancli.units import parse_frame_rate


class ModelFiles(StrictModel):
    """A checkpoint named file by file: `transformer`, or the two experts of Wan 2.2 A14B. `variant` tells it
    from others with the same tensors.
    """

    transformer: str | None = None
    high_noise: str | None = None
    low_noise: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    image_encoder: str | None = None
    heads: int | None = Field(None, ge=1, le=1024)
    variant: str | None = Field(None, min_length=1)


class ExpertGuidance(StrictModel):
    """One guidance for each of the two experts of Wan 2.2 A14B."""

    high: float = Field(ge=0, le=100)
    low: float = Field(ge=0, le=100)


def _guidance_kind(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | ExpertGuidance) else "<number>"


Guidance = Annotated[
    Annotated[float, Field(ge=0, le=100), Tag("<number>")] | Annotated[ExpertGuidance, Tag("<mapping>")],
    Discriminator(_guidance_kind),
]


Model = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ModelFiles, Tag("<mapping>")],
    Discriminator(text_or_mapping),
]


class ModelEntry(StrictModel):
    """An entry of models.yaml: a model as a job file writes it."""

    model: Model


class Sampler(StrictModel):
    solver: Literal["unipc", "dpm++", "euler", "distill4"] = "unipc"
    steps: int | None = Field(None, ge=1, le=1000)
    shift: float | None = Field(None, gt=0, le=100)
    guidance: Guidance | None = None
    boundary: float | None = Field(None, ge=0, le=1)


class TextOptions(StrictModel):
    max_tokens: Literal[256, 512] = 256
    truncate: bool = False


def _scalar_kind(value: Any) -> str:
    kinds = {bool: "<bool>", int: "<int>", float: "<float>"}
    return kinds.get(type(value), "<text>")


def _require_digits(value: int) -> int:
    if abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"has more than {MAX_DIGITS} digits; write it as a text")
    return value


Label = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[int, AfterValidator(_require_digits), Tag("<int>")]
    | Annotated[float, Tag("<float>")]
    | Annotated[bool, Tag("<bool>")],
    Discriminator(_scalar_kind),
]


class ImageOptions(StrictModel):
    """The first and the last frame of a video, and how pictures become frames.

    The first frame is a file (`first`) or a frame of another shot's video (`shot`, `frame`).
    """

    first: str | None = None
    last: str | None = None
    shot: str | None = None
    frame: Annotated[
        Annotated[int, Field(ge=0), Tag("<int>")] | Annotated[Literal["last"], Tag("<text>")],
        Discriminator(text_or_int),
    ] = "last"
    preprocess: Literal["official", "diffusers", "comfy"] = "official"
    fit: Literal["crop", "stretch", "pad"] | None = None
    orient: Literal["exif", "ignore"] | None = None
    alpha: Literal["drop", "white", "black"] = "drop"


Image = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ImageOptions, Tag("<mapping>")],
    Discriminator(text_or_mapping),
]


class AreaSize(StrictModel):
    """A size by its number of pixels: the model's own rule finds width and height from the picture."""

    area: Annotated[
        Annotated[int, Field(ge=1), Tag("<int>")] | Annotated[str, Tag("<text>")],
        Discriminator(text_or_int),
    ]


Size = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[AreaSize, Tag("<mapping>")],
    Discriminator(text_or_mapping),
]


def _frame_rate(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        value = "?"
    return parse_frame_rate(value)


FrameRate = Annotated[
    int | str,
    BeforeValidator(
        _frame_rate,
        json_schema_input_type=Annotated[float, Field(ge=1, le=240)]
        | Annotated[str, Field(pattern=r"^\d+(\.\d+|/\d+)?$")],
    ),
]


class Video(StrictModel):
    fps: FrameRate | None = None
    crf: int = Field(16, ge=0, le=51)
    codec: Literal["h264", "h265"] = "h264"
    keep_latents: bool = False


Chunk = Annotated[
    Annotated[int, Field(ge=256, lt=2**63), Tag("<int>")] | Annotated[Literal["auto"], Tag("<text>")],
    Discriminator(text_or_int),
]


Batch = Annotated[
    Annotated[int, Field(ge=1, le=1000), Tag("<int>")] | Annotated[Literal["auto"], Tag("<text>")],
    Discriminator(text_or_int),
]


class Memory(StrictModel):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    residency: Literal["auto", "resident", "packed", "streamed"] = "auto"
    attention: AttentionBackend = "auto"
    chunk: Chunk = "auto"
    fp8_matmul: bool = False
    budget: str | None = None
    decode_chunk: int = Field(1, ge=1, le=64)


SaveInterval = Annotated[
    Annotated[int, Field(ge=1, le=1000), Tag("<int>")] | Annotated[str, Tag("<text>")],
    Discriminator(text_or_int),
]


class Compare(StrictModel):
    """What a render writes about its shots together, once they are finished: files beside the outputs."""

    baseline: str | None = None
    add_baseline: bool = True
    sheet: bool = True
    video: bool = True


def _compare_kind(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | Compare) else "<bool>"


CompareOption = Annotated[
    Annotated[bool, Tag("<bool>")] | Annotated[Compare, Tag("<mapping>")], Discriminator(_compare_kind)
]


class Job(StrictModel):
    """One shot as the user described it, after `items` were merged over the rest of the file."""

    model: Model = wan_mini.NAME
    prompt: MainPrompt
    negative: Prompt = "default"
    output: str = "out/{job}/{item:04d}-{slug}.mp4"
    id: str | None = Field(None, min_length=1, max_length=200)
    labels: dict[str, Label] = {}
    image: Image | None = None
    size: Size | None = None
    frames: int | None = Field(None, ge=1, le=100_001)
    seed: int = Field(0, ge=0, lt=2**63)
    noise: Literal["cpu", "cuda"] = "cpu"
    sampler: Sampler = Sampler()
    cache: CacheOption = "none"
    text: TextOptions = TextOptions()
    inject: list[Inject] = []
    emphasis: EmphasisOption = {}
    steer: list[SteerEntry] = []
    loras: list[LoraEntry] = []
    video: Video = Video()
    memory: Memory = Memory()
    batch: Batch = "auto"
    save_every: SaveInterval = "60s"
    measure: bool = False
    attention: Attention | None = None
    compare: CompareOption = False
    join: str | None = None

    @property
    def image_options(self) -> ImageOptions | None:
        """`image` as a mapping; a text names the first frame."""
        return ImageOptions(first=self.image) if isinstance(self.image, str) else self.image

    @property
    def cache_options(self) -> CacheOptions | None:
        """`cache` as a mapping; a text names the method. None for `none`."""
        if isinstance(self.cache, CacheOptions):
            return self.cache
        return None if self.cache == "none" else CacheOptions(method=self.cache)

    @property
    def emphasises(self) -> bool:
        """Whether a word counts more or less than others."""
        option = self.emphasis
        weights = option.values() if isinstance(option, dict) else [entry.weight for entry in option]
        return any(weight != 1 for weight in weights)
