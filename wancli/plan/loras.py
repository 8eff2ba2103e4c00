"""Resolve the `loras` of a job: file, strength, blocks and steps of each. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wancli.errors import JobError
from wancli.injection.selectors import parse_blocks
from wancli.job.loader import Item
from wancli.job.schema_rules import LoraEntry
from wancli.models.config import WanConfig
from wancli.plan.injections import locate_errors, no_experts_error, select_steps
from wancli.plan.render_plan import ShotWarning
from wancli.sampling.stages import Stage
from wancli.storage import disk
from wancli.weights.component import expert_from_name
from wancli.weights.fingerprint import fingerprint
from wancli.weights.formats.infer_config import transformer_shapes
from wancli.weights.formats.tensor_index import is_safetensors
from wancli.weights.lora.effect import explain_no_effect
from wancli.weights.lora.file import read_lora_file
from wancli.weights.lora.match import Coverage, select_changes
from wancli.weights.lora.scaling import ADAPTER_CONFIG
from wancli.weights.lora.use import LoraUse


@dataclass(frozen=True)
class MatchedLora:
    """A LoRA file that fits a model. `sha256` covers the file, and PEFT's config if that sets the scale."""

    path: Path
    sha256: str
    coverage: Coverage
    rescaled: bool  # see LoraUse


def resolve_lora(path: Path, transformer: WanConfig, hashes: Path) -> MatchedLora:
    """Read a LoRA's header and hash the file. Raises CheckpointError if it does not fit the model."""
    lora_file = read_lora_file(path)
    changes, coverage = select_changes(lora_file, transformer_shapes(transformer))
    config = [lora_file.config] if lora_file.config else []
    digest = fingerprint([path, *config], hashes)
    if reason := explain_no_effect(path, changes):
        coverage = replace(coverage, notes=(*coverage.notes, reason))
    return MatchedLora(path, digest, coverage, lora_file.rescaled)


def decide_loras(
    item: Item,
    paths: Sequence[Path],
    match_file: Callable[[Path], MatchedLora],
    depth: int,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
) -> tuple[LoraUse, ...]:
    """Decide how one shot uses its LoRAs. `paths` are the resolved paths of its entries.

    Raises JobError with file, line and key, or CheckpointError if a file cannot be used.
    """
    return tuple(
        _decide_use(item, index, entry, path, match_file, depth, sigmas, stages)
        for index, (entry, path) in enumerate(zip(item.job.loras, paths, strict=True))
    )


def _decide_use(
    item: Item,
    index: int,
    entry: LoraEntry,
    path: Path,
    match_file: Callable[[Path], MatchedLora],
    depth: int,
    sigmas: Sequence[float],
    stages: Sequence[Stage],
) -> LoraUse:
    def job_error(key: str, what: str, hint: str = "") -> JobError:
        return JobError(what, where=item.location("loras", index, key), hint=hint)

    with disk.reading_for_job(item.location("loras", index, "path"), entry.path):
        is_found = disk.is_file(path)
    if not is_found and disk.is_folder(path):
        raise job_error("path", f"{entry.path!r} is a folder", "Name the .safetensors file in it.")
    if not is_found:
        raise job_error("path", f"{entry.path!r} not found", f"Looked for {path}.")
    if not is_safetensors(path):
        raise job_error("path", f"{entry.path!r} is not a .safetensors file", "Save the LoRA as one.")
    with locate_errors(item, "loras", index, "blocks"):
        blocks = parse_blocks(entry.blocks, depth)
    with locate_errors(item, "loras", index, "steps"):
        steps = select_steps(entry.steps, sigmas)
    if entry.expert != "both" and stages[0].expert == "only":
        raise no_experts_error(item, "loras", index, "expert")
    expert_steps = {
        step for stage in stages if entry.expert in ("both", stage.expert) for step in stage.steps
    }
    if steps and not expert_steps & set(steps):
        raise job_error("expert", f"the {entry.expert}-noise expert runs none of these steps", "See `steps`.")
    if not steps:
        raise job_error("steps", "no step is in this range", "`wancli plan -v` prints the sigmas.")
    matched_lora = match_file(path)
    changed = matched_lora.coverage.blocks
    if entry.blocks != "all" and not set(blocks) & set(changed):
        what = f"blocks {changed[0]} to {changed[-1]}" if changed else "nothing in the blocks"
        raise job_error("blocks", f"{path.name} changes none of these blocks", f"It changes {what}.")
    coverage = matched_lora.coverage
    named = expert_from_name(path)
    if named and stages[0].expert != "only" and entry.expert != named:
        to = "both experts" if entry.expert == "both" else f"the {entry.expert}-noise expert"
        note = f"its name says the {named}-noise expert, and it is applied to {to}"
        coverage = replace(coverage, notes=(*coverage.notes, note))
    return LoraUse(
        path,
        matched_lora.sha256,
        entry.strength,
        blocks=None if entry.blocks == "all" else tuple(sorted(blocks)),
        steps=None if len(steps) == len(sigmas) - 1 else steps,
        expert=None if entry.expert == "both" else entry.expert,
        coverage=coverage,
        rescaled=matched_lora.rescaled,
    )


def lora_warnings(uses: Sequence[LoraUse]) -> Iterator[ShotWarning]:
    """Yield what the user should know before the render starts."""
    for use in uses:
        name = use.path.name
        if use.strength == 0:
            yield ShotWarning("{} has strength 0 and changes nothing", name)
        yield from (ShotWarning(f"{{}}: {note}", name) for note in use.coverage.notes)
        if use.coverage.style == "PEFT" and not use.coverage.scaled:
            missing = f"no alpha and no {ADAPTER_CONFIG} beside it; its scale is taken as 1"
            yield ShotWarning(f"{{}} has {missing}", name)
        if use.coverage.unused:
            keys = f"{use.coverage.unused} of {name} ({', '.join(use.coverage.examples)})"
            yield ShotWarning("keys match nothing in this model: {}", keys)
