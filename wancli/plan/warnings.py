"""Warn about shots that can be rendered but look wrong. `plan` and `render` print this before slow work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wancli import wan_mini
from wancli.injection.timeline import RELAY_BORDER, Segment
from wancli.plan import loras
from wancli.plan.prompt_syntax import find_foreign_syntax
from wancli.plan.render_plan import Comparison, ShotWarning
from wancli.plan.shot import Shot
from wancli.storage import disk
from wancli.units import list_some
from wancli.weights.checkpoint import Checkpoint

CPU_SEEDS = 2**32  # torch's generator on the CPU, mt19937, takes the low 32 bits of a seed


def collect_warnings(shots: Sequence[Shot], comparison: Comparison | None) -> Iterator[str]:
    """Yield one line for all warnings of a kind, with the first shots and the first details."""
    baselines = set(comparison.baselines.values()) if comparison else set()
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for shot in shots:
        for kind, detail in _shot_warnings(shot, is_baseline=shot.id in baselines):
            ids, details = found.setdefault(kind, ({}, {}))
            ids[shot.id] = details[detail] = None
    for kind, (ids, details) in found.items():
        text = kind.replace("{}", list_some([*details], 6), 1)
        yield f"shot{'s' if len(ids) > 1 else ''} {list_some([*ids], 3)}: {text}"
    yield from _same_noise_warnings(shots)
    yield from _uncompared_warnings(shots, comparison)


def _uncompared_warnings(shots: Sequence[Shot], comparison: Comparison | None) -> Iterator[str]:
    """Warn about shots that a comparison shows without figures."""
    baselines = comparison.baselines if comparison else {}
    ids = [shot.id for shot in shots if baselines.get(shot.id, "") is None]
    if ids:
        yield (
            f"shot{'s' if len(ids) > 1 else ''} {list_some(ids, 3)}: no figures, because no compared shot "
            "differs in the injection alone; compare: {baseline: ID} compares all with one shot"
        )


def _checkpoint_warnings(checkpoint: Checkpoint) -> Iterator[ShotWarning]:
    yield from map(ShotWarning, checkpoint.notes)
    files = [disk.resolve(part.files[0]) for part in checkpoint.experts]
    if len(files) > len(set(files)):
        yield ShotWarning(f"both experts are the same file, {checkpoint.experts[0].files[0].name}")
    for part in (*checkpoint.experts, checkpoint.text_encoder, checkpoint.vae):
        if part.compiled:
            named = "{} has the names of torch.compile; they are read without _orig_mod"
            yield ShotWarning(named, part.files[0].name)


def _same_noise_warnings(shots: Sequence[Shot]) -> Iterator[str]:
    """Warn about seeds that draw the same noise."""
    seeds: dict[int, dict[int, None]] = {}
    for shot in shots:
        if shot.noise == "cpu":
            seeds.setdefault(shot.seed % CPU_SEEDS, {})[shot.seed] = None
    same = [" and ".join(map(str, equal)) for equal in seeds.values() if len(equal) > 1]
    if same:
        yield f"seeds {list_some(same, 3)} draw the same noise: a CPU takes the low 32 bits of a seed"


def _shot_warnings(shot: Shot, *, is_baseline: bool) -> Iterator[ShotWarning]:
    for text in shot.prompts:
        if text.tokens.truncated:
            lost = text.tokens.full_length - len(text.tokens.ids)
            yield ShotWarning("{} tokens of a prompt are cut off", f"{lost} of {text.tokens.full_length}")
    for picture in shot.picture_files:
        yield from (ShotWarning(f"{{}}: {note}", picture.path.name) for note in picture.facts.notes)
    yield from _prompt_warnings(shot)
    for rule, other in zip(shot.rules, shot.injected):
        if not rule.is_active and not is_baseline:
            yield ShotWarning("an injection has strength 0 and changes nothing")
        same = other.id == shot.prompt.id and shot.timeline is None
        if same and rule.branches == ("cond",) and len(shot.rules) == 1:
            yield ShotWarning("the injected prompt is the main prompt; nothing will change")
        if other.id == shot.clip_id and len(shot.rules) == 1:
            yield ShotWarning("the injected picture is the shot's own; nothing will change")
    for choice in shot.auto_blocks:
        if choice.other_prompts:
            used = f"{choice.spec} uses {choice.map_name}, which was measured with {choice.other_prompts}"
            yield ShotWarning("{}", used)
    yield from _checkpoint_warnings(shot.model.checkpoint)
    yield from loras.lora_warnings(shot.loras)
    guidance = max(stage.guidance for stage in shot.stages)
    if shot.solver == "distill4" and guidance != 1:
        yield ShotWarning("distilled models need guidance 1; {} blurs the video", f"{guidance:g}")


def _prompt_warnings(shot: Shot) -> Iterator[ShotWarning]:
    """Warn about texts, and lengths, that the model was not trained on, and about short parts of a relay."""
    if shot.timeline and shot.timeline.blend == "relay":
        for segment in shot.timeline.segments:
            start, stop = segment.latent_span
            if stop - start <= 2 * RELAY_BORDER:
                short = "a relay fades within 8 frames of the ends of a segment, so that of {} hardly counts"
                yield ShotWarning(f"{short}; take longer ones, or blend: crossfade", _name_frames(segment))
    variant = shot.model.checkpoint.variant
    texts = [text for text in shot.prompts if not text.file and text.tokens.text != variant.negative]
    for text in texts:
        for kind, detail in find_foreign_syntax(text.tokens.text):
            yield ShotWarning(kind, detail)
    if shot.model.checkpoint.root == wan_mini.FOLDER:
        for text in texts:
            for word in wan_mini.find_unknown_words(text.tokens.pieces):
                yield ShotWarning(f"{{}}? {wan_mini.SUBJECTS_HINT}", word)
    elif shot.frames > variant.frames:
        trained = f"{variant.name} was trained with {variant.frames}; a longer video repeats itself or decays"
        yield ShotWarning(f"{{}} frames: {trained}", str(shot.frames))


def _name_frames(segment: Segment) -> str:
    return f"{segment.frames[0]}-{segment.frames[1]}"
