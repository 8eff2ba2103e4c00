"""A Plan of Shots: everything that a render will do, decided and frozen."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wancli.injection.area import TokenGrid
from wancli.injection.attention_spec import AttentionSpec
from wancli.injection.block_map_store import AutoBlocks
from wancli.injection.table import Branch, Cell, CellRule, Rule, Table
from wancli.injection.timeline import Timeline
from wancli.injection.tuning import EmphasisRule, SteerRule
from wancli.models.config import (
    ComputeOptions,
    Expert,
    T5Config,
    VAE22Config,
    VAEConfig,
    WanConfig,
    compute_dtype,
)
from wancli.pictures.sizes import Method
from wancli.plan.pictures import (
    CLIP_ROWS,
    ClipPictures,
    InjectedPicture,
    Join,
    LinkedFrame,
    PictureFile,
    ShotPictures,
)
from wancli.plan.schedule import Schedule
from wancli.resources.memory_model import Residency
from wancli.sampling.solvers import SigmaSchedule, build_sigma_schedule
from wancli.sampling.stages import Stage, split_stages
from wancli.storage.paths import slugify
from wancli.text.encoder import EncoderSpec
from wancli.text.tokenizer import Tokens
from wancli.weights.checkpoint import Checkpoint
from wancli.weights.lora.use import LoraUse

_NAME_BYTES = 200  # of a job, for the names of files about it
PIXEL_VERSION = 1  # raised whenever a new version of wancli makes other pixels from the same job


@dataclass(frozen=True)
class Prompt:
    """A text and the place of its embedding: in the cache under `id`, or in a file."""

    id: str
    tokens: Tokens
    file: Path | None = None
    index: int = 0

    @property
    def rows(self) -> int:
        """The number of keys that the blocks keep for it: its tokens and one for all padding."""
        return len(self.tokens.ids) + 1


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint with the sizes and fingerprints of its parts, and how it will run."""

    checkpoint: Checkpoint
    text_encoder: T5Config
    vae_sizes: VAEConfig | VAE22Config
    transformer: str  # SHA-256, of both experts if there are two
    vae: str  # SHA-256
    encoder: EncoderSpec
    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "bf16", "fp16", "fp8"]
    clip: str = ""  # SHA-256 of the image encoder; empty if the blocks attend to text alone
    residency: Residency = "resident"  # of the transformer's blocks; changes no pixel
    kernels: ComputeOptions = field(default_factory=ComputeOptions)
    budget: int | None = None  # the memory limit that the user set; None: what was free
    # Bytes that the process may take at its peak, on CUDA those of the device. Read once, by the planner.
    memory_limit: int = field(default=sys.maxsize, compare=False)
    # How the residencies and the chunk were chosen. Models of the same settings are the same.
    residency_reasons: tuple[str, ...] = field(default=(), compare=False)

    @property
    def compute_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """The dtype of matmuls: weights in fp8 are unpacked for them."""
        return compute_dtype(self.dtype, self.device)

    @property
    def first_expert(self) -> Expert:
        """The network that takes the first steps."""
        return "only" if self.checkpoint.variant.boundary is None else "high"

    def read_with_clip(
        self, sources: Sequence[PictureFile | LinkedFrame], method: Method
    ) -> ClipPictures | None:
        """Return what the blocks read of these pictures; None if they attend to text alone.

        FLF2V has places for the rows of two pictures. All others read the first, as the official code does.
        """
        if not self.clip:
            return None
        count = (self.checkpoint.transformer_config.image_rows or CLIP_ROWS) // CLIP_ROWS
        read = (*sources, *sources)[:count]
        pixels = [[source.pixels_key, method] for source in read]
        return ClipPictures(_hash(["clip", self.clip, self.device, pixels]), read, method)

    def read_given(self, pictures: ShotPictures | None) -> ClipPictures | None:
        """Return what the blocks read of given frames, if there are any; as `read_with_clip`."""
        if pictures is None:
            return None
        return self.read_with_clip([frame.source for frame in pictures.frames], pictures.first.how.method)


@dataclass(frozen=True)
class SaveInterval:
    """How often the state of a shot is saved: after so many seconds or so many steps of work."""

    seconds: float = math.inf
    steps: float = math.inf


@dataclass(frozen=True)
class Shot:
    """One video to be rendered; nothing in it is left to decide."""

    index: int
    id: str
    labels: dict[str, Any]
    model: ModelSpec
    prompt: Prompt
    negative: Prompt | None  # None if guidance is 1: no such forward runs
    injected: tuple[Prompt | InjectedPicture, ...]  # one for each rule
    rules: tuple[Rule, ...]
    loras: tuple[LoraUse, ...]
    width: int
    height: int
    frames: int
    seed: int
    noise: Literal["cpu", "cuda"]
    solver: str
    steps: int
    shift: float
    guidance: float  # of the only network or the high-noise expert
    guidance_low: float | None  # of the low-noise expert, if there are two
    boundary: float | None  # the high-noise expert takes timesteps from 1000 * boundary up
    fps: int | str  # exactly: a fraction is text, `24000/1001`
    crf: int
    codec: str
    keep_latents: bool
    decode_chunk: int
    measure: bool
    batch: int | None  # how many shots may share a pass over the weights; None: as many as fit
    save_every: SaveInterval
    output: Path
    auto_blocks: tuple[AutoBlocks, ...] = ()  # the blocks of its rules that a measured map chose
    pictures: ShotPictures | None = None  # the frames that are given
    emphasis: tuple[EmphasisRule, ...] = ()  # words of its prompt that count more or less
    steering: tuple[SteerRule, ...] = ()  # vectors added to what blocks read,
    steering_prompts: tuple[Prompt, ...] = ()  # and the distinct prompts that they are made of
    kept_frames: tuple[int, ...] = ()  # frames that other shots begin with
    attention: AttentionSpec | None = None  # the attention maps that sampling records; changes no pixel
    timeline: Timeline | None = None  # of a prompt that changes over the frames, which begins with `prompt`
    later_prompts: tuple[Prompt, ...] = ()  # the other prompts of the timeline

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[z, T, H/s, W/s], s being 8 or 16."""
        of = self.model.checkpoint.variant
        s = of.vae_stride
        return (of.latent_channels, (self.frames - 1) // 4 + 1, self.height // s, self.width // s)

    @property
    def tokens(self) -> int:
        """Video tokens the transformer sees: patches of 1 × 2 × 2."""
        return self.token_grid.tokens

    @property
    def token_grid(self) -> TokenGrid:
        return TokenGrid.of_video(
            self.width, self.height, self.frames, self.model.checkpoint.variant.vae_stride
        )

    @property
    def latents(self) -> Path:
        return self.output.with_suffix(".latents.safetensors")

    @property
    def state(self) -> Path:
        """The file from which another run resumes sampling."""
        return self.output.with_suffix(".state.safetensors")

    @property
    def manifest(self) -> Path:
        return self.output.with_suffix(".manifest.json")

    @property
    def attention_maps(self) -> Path:
        return self.output.with_suffix(".attention.npz")

    @property
    def attention_video(self) -> Path:
        return self.output.with_suffix(".attention.mp4")

    @cached_property
    def sigma_schedule(self) -> SigmaSchedule:
        return build_sigma_schedule(self.solver, self.steps, self.shift)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return split_stages(self.sigma_schedule.timesteps, self.boundary, self.guidance, self.guidance_low)

    @cached_property
    def table(self) -> Table:
        base: list[tuple[Branch, str]] = [("cond", self.prompt.id)]
        if self.negative:
            base.append(("uncond", self.negative.id))
        unguided = frozenset(step for stage in self.stages if stage.guidance == 1 for step in stage.steps)
        depth = self.model.checkpoint.transformer_config.num_layers
        over_time = self.timeline.cell if self.timeline else ()
        rules = (*self.rules, *self.emphasis, *self.steering)
        return _table(rules, tuple(base), depth, self.steps, unguided, self.clip_id, over_time)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts of the shot: its own, the negative one, the injected ones, those of later segments and
        of steering.
        """
        negative = [self.negative] if self.negative else []
        return (self.prompt, *negative, *self.injected_prompts, *self.later_prompts, *self.steering_prompts)

    @property
    def prompt_text(self) -> str:
        """The prompt for people: `A cat`, or `A cat | A dog` if it changes over the frames."""
        return self.timeline.text if self.timeline else self.prompt.tokens.text

    @property
    def injected_prompts(self) -> tuple[Prompt, ...]:
        return tuple(other for other in self.injected if isinstance(other, Prompt))

    @property
    def injected_pictures(self) -> tuple[InjectedPicture, ...]:
        return tuple(other for other in self.injected if isinstance(other, InjectedPicture))

    @property
    def picture_files(self) -> tuple[PictureFile, ...]:
        """All files of pictures that the shot reads."""
        given = self.pictures.files if self.pictures else ()
        return (*given, *(picture.source for picture in self.injected_pictures))

    @property
    def injects(self) -> bool:
        """Whether any block reads another thing than the plain prompts and pictures."""
        return bool(self.emphasis or self.steering) or any(rule.is_active for rule in self.rules)

    @property
    def forwards_per_step(self) -> int:
        """Forwards of one step: one per branch, and if injections are measured another one without them."""
        return (2 if self.negative else 1) * (2 if self.measure and self.injects else 1)

    @cached_property
    def latents_key(self) -> str:
        """Hash of all that the latent depends on."""
        low, kernels = self.guidance_low, self.model.kernels
        experts = [] if low is None else [low, self.boundary]
        return _hash(
            {
                "pixels": PIXEL_VERSION,
                "transformer": self.model.transformer,
                "sizes": _as_dict(self.model.checkpoint.transformer_config),
                "dtype": self.model.dtype,
                "texts": [prompt.id for prompt in self.prompts],
                "rules": [_rule_settings(rule) for rule in self.rules],
                **({"timeline": self.timeline.pixel_settings} if self.timeline else {}),
                "shape": self.latent_shape,
                "noise": [self.noise, self.seed],
                "sampler": [self.solver, self.steps, self.shift, self.guidance, *experts],
                **({"emphasis": [_rule_settings(rule) for rule in self.emphasis]} if self.emphasis else {}),
                **({"steer": [_rule_settings(rule) for rule in self.steering]} if self.steering else {}),
                **({"loras": [use.pixel_settings for use in self.loras]} if self.loras else {}),
                **({"attention": kernels.attention} if kernels.attention != "auto" else {}),
                **({"fp8_matmul": True} if kernels.fp8_matmul else {}),
                # The VAE encodes given frames.
                **({"pictures": [self.pictures.pixel_settings, self.model.vae]} if self.pictures else {}),
                **({"clip": self.clip_id} if self.clip_id else {}),
                # The dtype fp8 does not imply it: a GPU multiplies such weights in bf16.
                **({"computes": "bf16"} if self.model.compute_dtype == "bf16" != self.model.dtype else {}),
            }
        )

    @cached_property
    def key(self) -> str:
        """Hash of all that the video depends on."""
        video = [self.model.vae, self.decode_chunk, self.fps, self.crf, self.codec]
        return _hash([self.latents_key, *video])

    @property
    def continues(self) -> LinkedFrame | None:
        """The frame of another shot that this one begins with."""
        source = self.pictures.first.source if self.pictures else None
        return source if isinstance(source, LinkedFrame) else None

    @property
    def clip_id(self) -> str | None:
        """Hash of all that the CLIP rows of its pictures depend on; None if no block reads them."""
        return self._own_clip.id if self._own_clip else None

    @cached_property
    def _own_clip(self) -> ClipPictures | None:
        return self.model.read_given(self.pictures)

    @property
    def clip_pictures(self) -> tuple[ClipPictures, ...]:
        """The distinct pictures that blocks read, its own first."""
        own = [self._own_clip] if self._own_clip else []
        found = (*own, *(picture.read for picture in self.injected_pictures))
        return tuple({read.id: read for read in found}.values())

    @property
    def context_rows(self) -> dict[str, int]:
        """By id the keys that the blocks keep for each prompt and for what they read of pictures."""
        prompts = {prompt.id: prompt.rows for prompt in self.prompts}
        return prompts | {read.id: read.rows for read in self.clip_pictures}

    def frame_key(self, frame: int) -> str:
        """Hash of all that the pixels of a frame depend on, before compression."""
        return _hash([self.latents_key, self.model.vae, self.decode_chunk, frame])


class ShotWarning(NamedTuple):
    """A kind of warning, and the detail of one shot that stands for `{}` in it."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished shots. `baselines` has by id of a shot the id of its baseline; None if it is
    compared with nothing."""

    baselines: Mapping[str, str | None]
    default_baseline: str  # the first one, or the first shot if there is none
    sheet: bool
    video: bool
    added: tuple[str, ...] = ()  # plain shots that the job does not list


@dataclass(frozen=True)
class Plan:
    """The shots to render, and the warnings for the user before the render starts."""

    name: str
    shots: tuple[Shot, ...]
    warnings: tuple[str, ...]
    unselected: tuple[Shot, ...] = ()  # shots of the same job that are not to be rendered
    comparison: Comparison | None = None
    schedule: Schedule = field(default_factory=Schedule)  # of `shots`
    joins: tuple[Join, ...] = ()

    @property
    def all_shots(self) -> list[Shot]:
        """All shots of the job, selected or not."""
        return sorted((*self.shots, *self.unselected), key=lambda shot: shot.index)

    def sidecar_path(self, suffix: str) -> Path:
        """Return the path of a file about the whole job.

        It is in the folder that the outputs share, else in the folder of the first output.
        """
        shots = self.all_shots
        folder = Path(os.path.commonpath([shot.output.parent for shot in shots]))
        if folder == folder.parent:  # they share nothing but the root of the file system
            folder = shots[0].output.parent
        name = os.fsencode(self.name)
        if len(name) > _NAME_BYTES:
            return folder / f"{slugify(self.name)}-{hashlib.sha256(name).hexdigest()[:12]}.{suffix}"
        return folder / f"{self.name}.{suffix}"


def format_shots(shots: Sequence[Shot]) -> str:
    """Name shots for people: by the id of one, or by their number, the first and the last."""
    first, last = shots[0].id, shots[-1].id
    return first if len(shots) == 1 else f"{len(shots)} shots, {first} to {last}"


def format_shots_inline(shots: Sequence[Shot]) -> str:
    """Name shots in the middle of a sentence."""
    return f"shot {format_shots(shots)}" if len(shots) == 1 else format_shots(shots)


# The shots of a sweep share most of these. A table lists every cell it changes: few are kept at a time.
@lru_cache(256)
def _table(
    rules: tuple[CellRule, ...],
    base: tuple[tuple[Branch, str], ...],
    depth: int,
    steps: int,
    unguided: frozenset[int],
    image: str | None,
    over_time: Cell,
) -> Table:
    return Table(rules, dict(base), depth, steps, unguided, image, over_time)


def _rule_settings(rule: Rule | EmphasisRule | SteerRule) -> dict[str, Any]:
    area = {} if rule.area is None else {"area": rule.area.pixel_settings}
    settings = _as_dict(replace(rule, area=None)) | area
    return {name: value for name, value in settings.items() if name != "words"}  # their rows count


@lru_cache(1024)
def _as_dict(value: Rule | EmphasisRule | SteerRule | WanConfig) -> dict[str, Any]:
    """Return the fields that count for a key: those added since keys exist only if they are used."""
    return {name: x for name, x in asdict(value).items() if x is not None and x is not False}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
