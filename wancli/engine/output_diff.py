"""Describe how the video at an output differs from the shot that would replace it, by keys of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wancli.errors import EntryError
from wancli.injection.area import Area
from wancli.injection.table import Rule
from wancli.injection.timeline import Timeline
from wancli.injection.tuning import SteerRule
from wancli.plan.pictures import InjectedPicture
from wancli.plan.shot import Prompt, Shot
from wancli.storage import manifest
from wancli.storage.injection_schema import AreaRecord, RuleRecord, SteerRecord
from wancli.storage.manifest_schema import ShotRecord
from wancli.storage.prompt_schema import InjectedPictureRecord, PromptRecord, TimelineRecord
from wancli.units import format_ranges

Difference = tuple[str, str, str]  # a key, the recorded and the new value; both empty if too long for a line

_SHOT_FIELDS = {  # a key of a job, and its name in records and shots
    "frames": "frames",
    "seed": "seed",
    "noise": "noise",
    "sampler.solver": "solver",
    "sampler.steps": "steps",
    "sampler.shift": "shift",
    "video.fps": "fps",
    "video.crf": "crf",
    "video.codec": "codec",
    "memory.decode_chunk": "decode_chunk",
}
_MAX_NAMED = 3  # keys
_MAX_VALUE = 24  # characters of a value that is named


def describe_differences(shot: Shot) -> str:
    """Describe how the video differs: `made with seed 1, now 5; another inject.0.image`.

    Returns an empty text if there is no manifest, or if it is damaged or of another version.
    """
    try:
        record = manifest.read(shot.manifest)
    except EntryError:
        return ""
    return describe_record(record, shot) if record else ""


def describe_record(record: ShotRecord, shot: Shot) -> str:
    """Describe how a recorded shot differs from this one; empty if by no key."""
    differences = list(dict.fromkeys(_diff(record, shot)))
    named = [f"{key} {recorded}, now {new}" for key, recorded, new in differences if recorded]
    named += [f"another {key}" for key, recorded, _ in differences if not recorded]
    rest = [f"{len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
    return f"made with {'; '.join([*named[:_MAX_NAMED], *rest])}" if named else ""


def _diff(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    recorded, model = record.shot, record.model
    if model.sha256.transformer != shot.model.transformer:
        yield "model", "", ""
    if model.sha256.vae != shot.model.vae:
        yield "model.vae", "", ""
    yield from _diff_prompts(record, shot)
    yield from _diff_pictures(record, shot)
    old_guidance = "/".join(f"{stage.guidance:g}" for stage in recorded.stages)
    new_guidance = "/".join(f"{stage.guidance:g}" for stage in shot.stages)
    kernels = shot.model.kernels
    values: dict[str, tuple[object, object]] = {
        "size": (f"{recorded.width}x{recorded.height}", f"{shot.width}x{shot.height}"),
        **{key: (getattr(recorded, name), getattr(shot, name)) for key, name in _SHOT_FIELDS.items()},
        "sampler.guidance": (old_guidance, new_guidance),
        "memory.dtype": (model.dtype, shot.model.dtype),
        "memory.attention": (model.kernels.attention, kernels.attention),
        "memory.fp8_matmul": (model.kernels.fp8_matmul, kernels.fp8_matmul),
    }
    for key, (old, new) in values.items():
        if old != new:
            yield key, str(old), str(new)
    reused = dict(shot.cache.steps) if shot.cache and shot.reused else {}
    if reused != (recorded.cache.reused if recorded.cache and any(recorded.cache.reused.values()) else {}):
        yield "cache", "", ""
    yield from _diff_rules(record, shot)
    yield from _diff_emphasis(record, shot)
    yield from _diff_steering(record, shot)
    yield from _diff_loras(record, shot)


def _diff_prompts(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    timelines = record.timeline, shot.timeline
    pairs = {} if all(timelines) else {"prompt": (record.prompt, shot.prompt)}
    yield from _diff_timelines(*timelines)
    for i, (other, new) in enumerate(zip(record.injected, shot.injected)):
        if isinstance(other, PromptRecord) and isinstance(new, Prompt):
            pairs[f"inject.{i}.prompt"] = (other, new)
        elif not _is_same_picture(other, new):
            yield f"inject.{i}.{'prompt' if isinstance(new, Prompt) else 'image'}", "", ""
    if record.negative and shot.negative:
        pairs["negative"] = (record.negative, shot.negative)
    for key, (old, new) in pairs.items():
        if old.id == new.id:
            continue
        if old.text != new.tokens.text:
            yield key, "", ""
        elif old.max_tokens != new.tokens.max_tokens:
            yield "text.max_tokens", str(old.max_tokens), str(new.tokens.max_tokens)
        else:
            yield f"encoder of {key}", "", ""


def _diff_timelines(old: TimelineRecord | None, new: Timeline | None) -> Iterator[Difference]:
    if old is None or new is None or len(old.segments) != len(new.segments):
        if old or new:
            yield "prompt", "", ""
        return
    for i, (was, now) in enumerate(zip(old.segments, new.segments)):
        if was.text != now.text:
            yield f"prompt.{i}.text", "", ""
        elif was.id != now.id and old.common == new.common:
            yield "encoder of prompt", "", ""
        if was.frames != now.frames:
            yield f"prompt.{i}.frames", _show_frames(was.frames), _show_frames(now.frames)
    if old.common != new.common:
        yield "prompt.text", "", ""
    for key in ("blend", "fade"):
        if (recorded := getattr(old, key)) != (planned := getattr(new, key)):
            yield f"prompt.{key}", str(recorded), str(planned)


def _is_same_picture(old: PromptRecord | InjectedPictureRecord, new: Prompt | InjectedPicture) -> bool:
    if isinstance(old, PromptRecord) or isinstance(new, Prompt):
        return False
    return (old.sha256, old.preprocess) == (new.source.pixels_key, new.read.method)


def _diff_pictures(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    old = {picture.role: (picture.pixels_key, picture.preprocess, picture.fit) for picture in record.pictures}
    frames = shot.pictures.frames if shot.pictures else ()
    new = {
        role: (frame.source.pixels_key, frame.how.method, frame.how.fit)
        for role, frame in zip(("first", "last"), frames)
    }
    for role in ("first", "last"):
        if old.get(role) != new.get(role):
            yield "image" if role == "first" else "image.last", "", ""


def _diff_rules(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    if len(record.injection) != len(shot.rules):
        yield "inject", "", ""
        return
    for i, (old, new) in enumerate(zip(record.injection, shot.rules)):
        yield from _diff_strengths(f"inject.{i}", old, new)
        if old.branches != list(new.branches):
            yield f"inject.{i}.branch", "+".join(old.branches), "+".join(new.branches)
        if old.blend != new.blend:
            yield f"inject.{i}.blend", old.blend, new.blend
        if old.gain != new.gain:
            yield f"inject.{i}.gain", str(old.gain), str(new.gain)
        yield from _diff_areas(f"inject.{i}", old.area, new.area)
        yield from _diff_words(f"inject.{i}", old, new)


def _diff_strengths(rule: str, old: RuleRecord | SteerRecord, new: Rule | SteerRule) -> Iterator[Difference]:
    for key, strength_key, recorded, strengths in (
        ("blocks", "strength", old.blocks, dict(new.blocks)),
        ("steps", "step_strength", old.steps, dict(new.steps)),
    ):
        if recorded.keys() != strengths.keys():
            yield _name_both(f"{rule}.{key}", format_ranges([*recorded]), format_ranges([*strengths]))
        elif recorded != strengths:
            yield _name_both(f"{rule}.{strength_key}", _show_strength(recorded), _show_strength(strengths))


def _name_both(key: str, old: str, new: str) -> Difference:
    """Return a difference with both values if they are short and look different."""
    short = 0 < len(old) <= _MAX_VALUE and 0 < len(new) <= _MAX_VALUE and old != new
    return (key, old, new) if short else (key, "", "")


def _show_strength(strengths: Mapping[int, float]) -> str:
    """Show the strength of every block or step: one number, or the smallest and the largest."""
    low, high = min(strengths.values(), default=0.0), max(strengths.values(), default=0.0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _diff_areas(key: str, old: AreaRecord | None, new: Area | None) -> Iterator[Difference]:
    old, new = old or AreaRecord(tokens=1), new or Area()
    if old.frames != new.frames:
        yield f"{key}.frames", _show_frames(old.frames), _show_frames(new.frames)
    if old.region != new.region:
        yield f"{key}.region", _show_region(old.region), _show_region(new.region)
    if (old.mask and old.mask.sha256) != (new.mask and new.mask.sha256):
        yield f"{key}.mask", "", ""
    if old.feather != new.feather:
        yield f"{key}.feather", f"{old.feather:g}", f"{new.feather:g}"


def _show_frames(frames: tuple[int, int] | None) -> str:
    return f"{frames[0]}-{frames[1]}" if frames else "all"


def _show_region(region: tuple[float, ...] | None) -> str:
    return f"[{', '.join(f'{side:g}' for side in region)}]" if region else "all"


def _diff_words(key: str, old: RuleRecord, new: Rule) -> Iterator[Difference]:
    """Yield the differences of words and of attention guidance."""
    if old.rows != new.rows:
        yield f"{key}.words", old.words or "none", new.words or "none"
    if old.nag and new.nag:
        settings = old.nag.scale, old.nag.alpha, old.nag.tau
        for name, before, after in zip(("scale", "alpha", "tau"), settings, new.nag):
            if before != after:
                yield f"{key}.{name}", f"{before:g}", f"{after:g}"


def _diff_emphasis(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    if len(record.emphasis) != len(shot.emphasis):
        yield "emphasis", "", ""
        return
    for i, (old, new) in enumerate(zip(record.emphasis, shot.emphasis)):
        key = f"emphasis.{i}"
        if old.rows != new.rows:
            yield f"{key}.words", old.words, new.words
        if old.weight != new.weight:
            yield f"{key}.weight", f"{old.weight:g}", f"{new.weight:g}"
        for name, before, after in (("blocks", old.blocks, new.blocks), ("steps", old.steps, new.steps)):
            if before != tuple(index for index, _ in after):
                yield f"{key}.{name}", "", ""
        yield from _diff_areas(key, old.area, new.area)


def _diff_steering(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    if len(record.steer) != len(shot.steering):
        yield "steer", "", ""
        return
    for i, (old, new) in enumerate(zip(record.steer, shot.steering)):
        for side, before, after in (("toward", old.toward, new.toward), ("away", old.away, new.away)):
            if before != after:
                yield f"steer.{i}.{side}", "", ""
        yield from _diff_strengths(f"steer.{i}", old, new)
        yield from _diff_areas(f"steer.{i}", old.area, new.area)


def _diff_loras(record: ShotRecord, shot: Shot) -> Iterator[Difference]:
    if len(record.loras) != len(shot.loras):
        yield "loras", "", ""
        return
    for i, (old, new) in enumerate(zip(record.loras, shot.loras)):
        for key, value in new.pixel_settings.items():
            if getattr(old, key) != value:
                yield f"loras.{i}.{'path' if key == 'sha256' else key}", "", ""
