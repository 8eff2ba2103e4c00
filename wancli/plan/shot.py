"""A Shot: one video with everything that its render will do, decided and frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from wancli.injection.area import TokenGrid
from wancli.injection.attention_spec import AttentionSpec
from wancli.injection.block_map_store import AutoBlocks
from wancli.injection.exprs import Branch, Cell
from wancli.injection.table import CellRule, Rule, Table
from wancli.injection.timeline import Timeline
from wancli.injection.tuning import EmphasisRule, SteerRule
from wancli.plan.keys import hash_settings, rule_settings, used_fields
from wancli.plan.model_spec import ModelSpec
from wancli.plan.pictures import (
    ClipPictures,
    InjectedPicture,
    LinkedFrame,
    PictureFile,
    ShotPictures,
)
from wancli.sampling.solvers import SigmaSchedule, build_sigma_schedule
from wancli.sampling.stages import Stage, split_stages
from wancli.sampling.step_cache import NOTHING_REUSED, StepCache
from wancli.text.tokenizer import Tokens
from wancli.weights.lora.use import LoraUse

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
    cache: StepCache | None = None  # which forwards reuse the residual of an earlier one

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
    def reused(self) -> frozenset[tuple[int, Branch]]:
        """The step and the branch of every forward that runs no block."""
        return self.cache.reused if self.cache else NOTHING_REUSED

    @property
    def planned_cells(self) -> tuple[list[tuple[int, Branch, int]], ...]:
        """For each rule the cells that blocks are to read."""
        return self.table.cells_without(self.reused)

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
        return hash_settings(
            {
                "pixels": PIXEL_VERSION,
                "transformer": self.model.transformer,
                "sizes": used_fields(self.model.checkpoint.transformer_config),
                "dtype": self.model.dtype,
                "texts": [prompt.id for prompt in self.prompts],
                "rules": [rule_settings(rule) for rule in self.rules],
                **({"timeline": self.timeline.pixel_settings} if self.timeline else {}),
                "shape": self.latent_shape,
                "noise": [self.noise, self.seed],
                "sampler": [self.solver, self.steps, self.shift, self.guidance, *experts],
                **({"emphasis": [rule_settings(rule) for rule in self.emphasis]} if self.emphasis else {}),
                **({"steer": [rule_settings(rule) for rule in self.steering]} if self.steering else {}),
                **({"loras": [use.pixel_settings for use in self.loras]} if self.loras else {}),
                **({"reused": dict(self.cache.steps)} if self.cache and self.reused else {}),
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
        return hash_settings([self.latents_key, *video])

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
        return hash_settings([self.latents_key, self.model.vae, self.decode_chunk, frame])


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
