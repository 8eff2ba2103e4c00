"""Warn about shots that can be rendered but look wrong. `plan` and `render` print this before slow work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wancli import wan_mini
from wancli.plan import loras
from wancli.plan.shot import Comparison, Shot
from wancli.storage import disk
from wancli.weights.checkpoint import Checkpoint


def collect_warnings(shots: Sequence[Shot], comparison: Comparison | None) -> Iterator[str]:
    """Yield one line for all shots with the same warning."""
    baselines = set(comparison.baselines.values()) if comparison else set()
    shots_by_warning: dict[str, list[str]] = {}
    for shot in shots:
        for warning in dict.fromkeys(_shot_warnings(shot, is_baseline=shot.id in baselines)):
            shots_by_warning.setdefault(warning, []).append(shot.id)
    for warning, ids in shots_by_warning.items():
        rest = f" and {len(ids) - 3:,} more" if len(ids) > 3 else ""
        yield f"shot{'s' if len(ids) > 1 else ''} {', '.join(ids[:3])}{rest}: {warning}"


def _checkpoint_warnings(checkpoint: Checkpoint) -> Iterator[str]:
    yield from checkpoint.notes
    files = [disk.resolve(part.files[0]) for part in checkpoint.experts]
    if len(files) > len(set(files)):
        yield f"both experts are the same file, {checkpoint.experts[0].files[0].name}"
    for part in (*checkpoint.experts, checkpoint.text_encoder, checkpoint.vae):
        if part.compiled:
            yield f"{part.files[0].name} has the names of torch.compile; they are read without _orig_mod"


def _shot_warnings(shot: Shot, *, is_baseline: bool) -> Iterator[str]:
    for text in shot.prompts:
        if text.tokens.truncated:
            lost = text.tokens.full_length - len(text.tokens.ids)
            yield f"{lost} of {text.tokens.full_length} tokens of a prompt are cut off"
    for picture in shot.pictures.files if shot.pictures else ():
        yield from (f"{picture.path.name}: {note}" for note in picture.notes)
    if shot.model.checkpoint.root == wan_mini.FOLDER:
        words = [
            word
            for text in shot.prompts
            if not text.file
            for word in wan_mini.find_unknown_words(text.tokens.pieces)
        ]
        if words:
            yield f"{', '.join(dict.fromkeys(words))}? {wan_mini.SUBJECTS_HINT}"
    for rule, text in zip(shot.rules, shot.injected):
        if not rule.is_active and not is_baseline:
            yield "an injection has strength 0 and changes nothing"
        if text.id == shot.prompt.id and rule.branches == ("cond",) and len(shot.rules) == 1:
            yield "the injected prompt is the main prompt; nothing will change"
    for choice in shot.auto_blocks:
        if choice.other_prompts:
            yield f"{choice.spec} uses {choice.map_name}, which was measured with {choice.other_prompts}"
    yield from _checkpoint_warnings(shot.model.checkpoint)
    yield from loras.lora_warnings(shot.loras)
    guidance = max(stage.guidance for stage in shot.stages)
    if shot.solver == "distill4" and guidance != 1:
        yield f"distilled models need guidance 1; {guidance:g} blurs the video"
