"""Job to Plan: everything that will be done, decided and frozen, without torch.

Defaults are resolved against the checkpoint, prompts are cleaned and counted, rules are compiled against the
depth of the model and the noise levels, outputs are named and checked for collisions, and shots are scheduled
within the memory limit. The `key` of a shot is a hash of everything that changes its pixels; a manifest with
that key means that the shot is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from wancli.errors import CheckpointError, JobError
from wancli.injection.attention_spec import AttentionSpec
from wancli.injection.block_map_store import AutoBlocks, BlockMapStore
from wancli.injection.table import Rule
from wancli.injection.tuning import EmphasisRule
from wancli.job.loader import Item, JobFile
from wancli.job.problems import Problems
from wancli.job.schema import ModelFiles
from wancli.job.schema_rules import InjectPicture
from wancli.plan import (
    areas,
    attention,
    backends,
    baseline,
    batching,
    chains,
    joins,
    loras,
    memory_policy,
    model_registry,
    outputs,
    picture_resolver,
    warnings,
)
from wancli.plan.emphasis import compile_emphasis, refuse_emphasis_without_effect
from wancli.plan.injections import (
    compile_rules,
    refuse_gain_over_time,
    refuse_lerp_after_concat,
    refuse_rules_without_effect,
)
from wancli.plan.model_spec import ModelSpec
from wancli.plan.pictures import InjectedPicture, ShotPictures
from wancli.plan.prompt_over_time import MainPrompt, resolve_main_prompt
from wancli.plan.prompts import PromptResolver
from wancli.plan.render_plan import Plan
from wancli.plan.sampler import SamplerSettings, resolve_sampler
from wancli.plan.shot import Prompt, SaveInterval, Shot
from wancli.plan.steering import Steering, compile_steering
from wancli.plan.step_cache import compile_cache, refuse_measuring_reuse
from wancli.resources import machine
from wancli.text.encoder import EncoderSpec
from wancli.units import parse_duration, parse_size
from wancli.weights.checkpoint import Location, identify, text_encoder_config, vae_config
from wancli.weights.fingerprint import fingerprint
from wancli.weights.hub import lookup
from wancli.weights.lora.use import LoraUse
from wancli.weights.single_files import SingleFiles


@dataclass(frozen=True)
class _Files:
    """The files that jobs name, each read once for all shots of a job."""

    model_for: Callable[[Location, str, str], ModelSpec]
    lora_for: Callable[..., loras.MatchedLora]
    block_maps: BlockMapStore
    pictures: picture_resolver.PictureMemo
    masks: areas.MaskReader


@dataclass(frozen=True)
class _Rules:
    """The prompts of a shot, and all that changes what its blocks read or compute."""

    main: MainPrompt
    negative: Prompt | None
    injected: tuple[Prompt | InjectedPicture, ...]
    rules: tuple[Rule, ...]
    auto_blocks: tuple[AutoBlocks, ...]
    emphasis: tuple[EmphasisRule, ...]
    steering: Steering
    loras: tuple[LoraUse, ...]
    maps: AttentionSpec | None


def build_plan(
    jobs: JobFile,
    hash_cache: Path,
    *,
    measure: bool = False,
    budget: int | None = None,
    allow_missing_maps: bool = False,
) -> Plan:
    """Decide every shot of a job file.

    `measure` turns on the measurement of effects in all shots. `budget` is a memory limit in bytes that
    replaces that of the job. `hash_cache` remembers the SHA-256 of weight files between runs; block maps are
    beside it. With `allow_missing_maps` no map is needed: `auto` means all blocks, for a probe.

    Raises JobError with all problems of all shots, EntryError if only embedding files are wrong, or
    CheckpointError.
    """
    files = _Files(
        cache(lambda source, device, dtype: resolve_model(source, device, dtype, hash_cache)),
        cache(lambda path, transformer: loras.resolve_lora(path, transformer, hash_cache)),
        BlockMapStore(hash_cache.parent / "maps", allow_missing=allow_missing_maps),
        picture_resolver.PictureMemo(hash_cache.parent / "pictures.json"),
        areas.MaskReader(),
    )
    locations = model_registry.ModelLocations()
    problems = Problems()
    built: dict[int, Shot] = {}
    for index, parent in chains.order_items(jobs.items):
        item = jobs.items[index]
        if parent is not None and parent not in built:
            continue  # the problem of that shot is reported
        with problems.collect():
            continued = None if parent is None else built[parent]
            shot = _build_shot(jobs, index, locations(item), files, continued)
            built[index] = replace(shot, measure=True) if measure else shot
            refuse_measuring_reuse(built[index], item)
    files.pictures.save()
    problems.raise_all()
    shots = chains.mark_kept_frames([built[index] for index in range(len(jobs.items))])
    outputs.refuse_collisions(shots, jobs)
    joined = joins.plan_joins(jobs, shots)
    chosen = set(jobs.selected)
    selected = _choose_residency([shot for shot in shots if shot.index in chosen], jobs, budget)
    others = tuple(shot for shot in shots if shot.index not in chosen)
    comparison = baseline.plan_comparison(jobs, shots)
    return Plan(
        jobs.name,
        tuple(selected),
        (*jobs.warnings, *warnings.collect_warnings(selected, comparison)),
        others,
        comparison,
        batching.build_schedule(selected),
        joined,
    )


def resolve_model(source: Location, device: str, dtype: str, hash_cache: Path) -> ModelSpec:
    """Identify and hash a checkpoint, and decide its `auto` settings.

    Raises CheckpointError, and JobError if it is not of the named variant.
    """
    with lookup.explaining_gaps(source.main if isinstance(source, SingleFiles) else source):
        checkpoint = identify(source)
    runs_on: Literal["cpu", "cuda"] = (
        "cuda" if device == "cuda" or (device == "auto" and machine.has_cuda()) else "cpu"
    )
    usual: Any = {"cpu": "fp32", "cuda": "bf16"}[runs_on]
    runs_in: Any = usual if dtype == "auto" else dtype
    encoder = EncoderSpec(
        files=checkpoint.text_encoder_files,
        naming=checkpoint.text_encoder.naming,
        fingerprint=fingerprint(checkpoint.text_encoder_files, hash_cache),
        tokenizer_sha=fingerprint([checkpoint.tokenizer], hash_cache),
        dtype=usual if dtype == "fp8" else runs_in,
        device=runs_on,
        prefix=checkpoint.text_encoder.prefix,
    )
    return ModelSpec(
        checkpoint,
        text_encoder_config(checkpoint),
        vae_config(checkpoint),
        transformer=fingerprint((*checkpoint.transformer_files, *checkpoint.high_noise_files), hash_cache),
        vae=fingerprint(checkpoint.vae_files, hash_cache),
        clip=fingerprint(checkpoint.image_encoder_files, hash_cache) if checkpoint.image_encoder else "",
        encoder=encoder,
        device=runs_on,
        dtype=runs_in,
    )


def _choose_residency(shots: Sequence[Shot], jobs: JobFile, budget: int | None) -> list[Shot]:
    """Decide residency and chunk of the shots; `budget` replaces that of the job. Raises JobError."""
    requests = []
    for shot in shots:
        item = jobs.items[shot.index]
        memory = item.job.memory
        made = shot.model.dtype == "fp8" and not shot.model.kernels.fp8_matmul
        if made and memory.residency in ("resident", "streamed"):
            raise JobError(
                f"{memory.residency} weights cannot be converted to fp8: conversion happens in memory",
                where=item.location("memory", "residency"),
                hint="Leave it out, or take a checkpoint that is stored in fp8.",
            )
        own = None if memory.budget is None else parse_size(memory.budget, item.location("memory", "budget"))
        requests.append(
            memory_policy.MemoryRequest(memory.residency, memory.chunk, own if budget is None else budget)
        )
    return memory_policy.choose_residency(shots, requests)


def _build_shot(jobs: JobFile, index: int, source: Location, files: _Files, continued: Shot | None) -> Shot:
    """Decide a shot. `continued` is the shot whose frame begins it."""
    item = jobs.items[index]
    job = item.job
    model = _resolve_item_model(item, source, files.model_for)
    variant = model.checkpoint.variant
    problems = Problems()
    width, height = variant.width, variant.height
    fps = job.video.fps or variant.fps
    pictures = None
    with problems.collect():
        pictures, (width, height) = picture_resolver.resolve_pictures(
            item, variant, files.pictures, continued
        )
    frames = job.frames or variant.frames
    shape = areas.VideoShape(width, height, frames, fps, variant.vae_stride)
    with problems.collect():
        _check_frames(item, frames)
        area_of_rule = areas.compile_areas(item, shape, files.masks)
    with problems.collect():
        save_every = _parse_save_interval(item)
    with problems.collect():
        sampler = resolve_sampler(item, variant, width * height)
        read = _decide_rules(item, model, sampler, shape, pictures, files)
    if problems.errors:
        with problems.collect():
            outputs.check_template(jobs, index, item)
    problems.raise_all()
    shot = Shot(
        index=index,
        id=item.id,
        labels=job.labels,
        model=model,
        prompt=read.main.prompt,
        negative=read.negative,
        injected=read.injected,
        rules=tuple(replace(rule, area=area) for rule, area in zip(read.rules, area_of_rule, strict=True)),
        loras=read.loras,
        width=width,
        height=height,
        frames=frames,
        seed=job.seed,
        noise=job.noise,
        solver=job.sampler.solver,
        steps=sampler.steps,
        shift=sampler.shift,
        guidance=sampler.guidance,
        guidance_low=sampler.guidance_low,
        boundary=sampler.boundary,
        fps=fps,
        crf=job.video.crf,
        codec=job.video.codec,
        keep_latents=job.video.keep_latents,
        decode_chunk=job.memory.decode_chunk,
        measure=job.measure,
        batch=None if job.batch == "auto" else job.batch,
        save_every=save_every,
        output=Path(),
        auto_blocks=read.auto_blocks,
        pictures=pictures,
        attention=read.maps,
        timeline=read.main.timeline,
        later_prompts=read.main.others,
        emphasis=read.emphasis,
        steering=read.steering.rules,
        steering_prompts=read.steering.prompts,
    )
    refuse_emphasis_without_effect(shot, item)
    refuse_rules_without_effect(shot, item)
    refuse_gain_over_time(shot, item)
    refuse_lerp_after_concat(shot, item)
    shot = replace(shot, cache=compile_cache(shot, item))
    return outputs.with_output(shot, jobs, item)


def _decide_rules(
    item: Item,
    model: ModelSpec,
    sampler: SamplerSettings,
    shape: areas.VideoShape,
    pictures: ShotPictures | None,
    files: _Files,
) -> _Rules:
    """Resolve the prompts of a shot, and compile its rules against the depth of the model and the steps."""
    problems = Problems()
    emphasis: tuple[EmphasisRule, ...] = ()
    steering, maps = Steering(), None
    sigmas, stages = sampler.schedule.sigmas, sampler.stages
    with problems.collect():
        with problems.collect():
            uses = _decide_loras(item, model, sampler, files.lora_for)
        guided = any(stage.guidance != 1 for stage in stages)
        main, negative, injected = _resolve_prompts(item, model, shape, files.pictures, guided=guided)
        with problems.collect():
            maps = attention.resolve_maps(item, main.prompt, model, sigmas)
            _require_one_prompt(item, "attention", main, used=maps is not None)
        with problems.collect():
            depth = model.checkpoint.transformer_config.num_layers
            emphasis = compile_emphasis(item, main.prompt, depth, sigmas, stages, shape, files.masks)
            _require_one_prompt(item, "emphasis", main, used=bool(emphasis))
        with problems.collect():
            steering = compile_steering(item, model, sigmas, stages, shape, files.masks)
            _require_one_prompt(item, "steer", main, used=bool(steering.rules))
        own = model.read_given(pictures)
        rules, auto_blocks = compile_rules(
            item, main.prompt, own.id if own else None, injected, model, files.block_maps, sigmas, stages
        )
    problems.raise_all()
    return _Rules(main, negative, injected, rules, auto_blocks, emphasis, steering, uses, maps)


def _require_one_prompt(item: Item, key: str, main: MainPrompt, *, used: bool) -> None:
    if used and main.timeline:
        raise JobError(
            "is of one prompt, and that of the shot changes over the frames",
            where=item.location(key),
            hint="Leave it out, or render a shot of one of the prompts.",
        )


def _decide_loras(
    item: Item, model: ModelSpec, sampler: SamplerSettings, lora_for: Callable[..., loras.MatchedLora]
) -> tuple[LoraUse, ...]:
    """Resolve the paths of the LoRAs and decide where and when each applies."""
    transformer = model.checkpoint.transformer_config
    paths = []
    for i, entry in enumerate(item.job.loras):
        key = ("loras", i, "path")
        paths.append(model_registry.resolve_file(entry.path, item.base_dir(*key), item.location(*key)))
    match = partial(lora_for, transformer=transformer)
    return loras.decide_loras(
        item, paths, match, transformer.num_layers, sampler.schedule.sigmas, sampler.stages
    )


def _resolve_item_model(
    item: Item, source: Location, model_for: Callable[[Location, str, str], ModelSpec]
) -> ModelSpec:
    memory, computing = item.job.memory, backends.read_compute_options(item)
    try:
        model = model_for(source, memory.device, "fp8" if computing.fp8_matmul else memory.dtype)
    except CheckpointError as error:
        raise CheckpointError(str(error), where=item.location("model"), hint=error.hint) from None
    except JobError as error:
        key = ("model", "variant") if isinstance(item.job.model, ModelFiles) else ("model",)
        raise JobError(error.message, where=item.location(*key), hint=error.hint) from None
    return replace(model, kernels=computing)


def _resolve_prompts(
    item: Item,
    model: ModelSpec,
    video: areas.VideoShape,
    picture_memo: picture_resolver.PictureMemo,
    *,
    guided: bool,
) -> tuple[MainPrompt, Prompt | None, tuple[Prompt | InjectedPicture, ...]]:
    """Return the prompt, the negative one if guidance needs it, and what each rule injects."""
    job, prompts = item.job, PromptResolver(item, model)
    main = resolve_main_prompt(item, prompts, video)
    negative = prompts.resolve_negative(job.negative, model.checkpoint.variant.negative) if guided else None
    injected: list[Prompt | InjectedPicture] = []
    for i, rule in enumerate(job.inject):
        if isinstance(rule, InjectPicture):
            injected.append(picture_resolver.resolve_injected(item, i, model, picture_memo))
        else:
            injected.append(prompts.resolve(rule.prompt, "inject", i, "prompt"))
    return main, negative, tuple(injected)


def _parse_save_interval(item: Item) -> SaveInterval:
    save_every = item.job.save_every
    if isinstance(save_every, int):
        return SaveInterval(steps=save_every)
    return SaveInterval(seconds=parse_duration(save_every, item.location("save_every")))


def _check_frames(item: Item, frames: int) -> None:
    if frames % 4 != 1:
        below = (frames - 1) // 4 * 4 + 1
        near = " or ".join(str(n) for n in (below, below + 4) if n > 0)
        raise JobError(f"{frames} is not 4n+1; nearest are {near}", where=item.location("frames"))
    if frames == 1 and (image := item.job.image_options) and image.last:
        raise JobError("a video of one frame has no last frame of its own", where=item.location("frames"))
