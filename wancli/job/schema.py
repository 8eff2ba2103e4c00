"""Strict models of a job file, as the user wrote it.

Nothing is decided here: fields that depend on the model stay None until `wancli.plan.planner`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from wancli import wan_mini
from wancli.injection.selectors import Curve
from wancli.models.config import AttentionBackend
from wancli.storage.records import MAX_DIGITS
from wancli.units import parse_frame_rate


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class EmbeddingFile(StrictModel):
    """A prompt that `wancli encode --out` has already encoded."""

    embedding: str
    index: int = Field(0, ge=0)


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


def _text_or_mapping(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | BaseModel) else "<text>"


def _text_or_int(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<int>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[EmbeddingFile, Tag("<mapping>")],
    Discriminator(_text_or_mapping),
]


Frames = Annotated[Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")], Discriminator(_text_or_int)]


class Segment(StrictModel):
    """Frames of a video, and the prompt that they read."""

    text: Prompt
    frames: Frames | None = None
    during: str | None = None


Segments = Annotated[
    list[
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[Segment, Tag("<mapping>")],
            Discriminator(_text_or_mapping),
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
    return _text_or_mapping(value)


MainPrompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[EmbeddingFile, Tag("<mapping>")]
    | Annotated[Segments, Tag("<list>")]
    | Annotated[PromptOverTime, Tag("<segments>")],
    Discriminator(_main_prompt_kind),
]


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
    Discriminator(_text_or_mapping),
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


def _steps_kind(value: Any) -> str:
    if isinstance(value, dict | SigmaRange):
        return "<mapping>"
    return "<int>" if isinstance(value, int) else "<text>"


Steps = Annotated[
    Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")] | Annotated[SigmaRange, Tag("<mapping>")],
    Discriminator(_steps_kind),
]


def _blocks_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<int>" if isinstance(value, int) else "<text>"


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
BlockSet = Annotated[
    Annotated[int, Tag("<int>")] | Annotated[str, Tag("<text>")], Discriminator(_blocks_kind)
]
Blocks = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[BlockSet], Field(min_length=1), Tag("<list>")],
    Discriminator(_blocks_kind),
]


Share = Annotated[float, Field(ge=0, le=1)]
EmphasisWeight = Annotated[float, Field(gt=0, le=100)]

BlockGroups = Annotated[
    Annotated[int, Tag("<int>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[Blocks], Field(min_length=1), Tag("<list>")],
    Discriminator(_blocks_kind),
]


def _step_groups_kind(value: Any) -> str:
    return "<list>" if isinstance(value, list) else _steps_kind(value)


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
    return "<list>" if isinstance(value, list) else _text_or_mapping(value)


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


class ImageOptions(StrictModel):
    """The first and the last frame of a video, and how pictures become frames.

    The first frame is a file (`first`) or a frame of another shot's video (`shot`, `frame`).
    """

    first: str | None = None
    last: str | None = None
    shot: str | None = None
    frame: Annotated[
        Annotated[int, Field(ge=0), Tag("<int>")] | Annotated[Literal["last"], Tag("<text>")],
        Discriminator(_text_or_int),
    ] = "last"
    preprocess: Literal["official", "diffusers", "comfy"] = "official"
    fit: Literal["crop", "stretch", "pad"] | None = None
    orient: Literal["exif", "ignore"] | None = None
    alpha: Literal["drop", "white", "black"] = "drop"


Image = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ImageOptions, Tag("<mapping>")],
    Discriminator(_text_or_mapping),
]


class AreaSize(StrictModel):
    """A size by its number of pixels: the model's own rule finds width and height from the picture."""

    area: Annotated[
        Annotated[int, Field(ge=1), Tag("<int>")] | Annotated[str, Tag("<text>")],
        Discriminator(_text_or_int),
    ]


Size = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[AreaSize, Tag("<mapping>")],
    Discriminator(_text_or_mapping),
]


class LoraEntry(StrictModel):
    """A LoRA, for the whole transformer or for chosen blocks and steps."""

    path: str
    strength: Number = 1.0
    blocks: Blocks = "all"
    steps: Steps = "all"
    expert: Literal["both", "high", "low"] = "both"


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
    Discriminator(_text_or_int),
]
Batch = Annotated[
    Annotated[int, Field(ge=1, le=1000), Tag("<int>")] | Annotated[Literal["auto"], Tag("<text>")],
    Discriminator(_text_or_int),
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
    Discriminator(_text_or_int),
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
    def emphasises(self) -> bool:
        """Whether a word counts more or less than others."""
        option = self.emphasis
        weights = option.values() if isinstance(option, dict) else [entry.weight for entry in option]
        return any(weight != 1 for weight in weights)
