"""The `loras` of a job, decided: which file at which strength in which blocks and steps. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.errors import JobError
from wancli.injection.table import parse_blocks, parse_steps
from wancli.job.loader import Item
from wancli.job.schema import LoraEntry, SigmaRange
from wancli.models.config import WanConfig
from wancli.sampling.stages import Stage
from wancli.weights.checkpoint import fingerprint
from wancli.weights.formats.infer_config import parameter_shapes
from wancli.weights.lora.file import CONFIG, recognise
from wancli.weights.lora.match import Coverage, matched
from wancli.weights.lora.use import LoraUse


@dataclass(frozen=True)
class Fitting:
    """A LoRA file that fits a model. `sha256` is of the file, and of PEFT's config if it gives the scale."""

    path: Path
    sha256: str
    coverage: Coverage


def fitting(path: Path, transformer: WanConfig, memo: Path) -> Fitting:
    """Reads a LoRA's header and hashes the file. Raises CheckpointError when it does not fit the model."""
    file = recognise(path)
    _, coverage = matched(file, parameter_shapes(transformer))
    config = [file.config] if file.config else []
    return Fitting(path, fingerprint([path, *config], memo), coverage)


def decide(
    item: Item,
    paths: Sequence[Path],
    fit: Callable[[Path], Fitting],
    depth: int,
    sigmas: Sequence[float],
    parts: Sequence[Stage],
) -> tuple[LoraUse, ...]:
    """The uses of one shot; `paths` are those of its entries, resolved.

    Raises JobError with file, line and key, CheckpointError for a file that will not do.
    """
    return tuple(
        _use(item, index, entry, path, fit, depth, sigmas, parts)
        for index, (entry, path) in enumerate(zip(item.job.loras, paths, strict=True))
    )


def _use(
    item: Item,
    index: int,
    said: LoraEntry,
    path: Path,
    fit: Callable[[Path], Fitting],
    depth: int,
    sigmas: Sequence[float],
    parts: Sequence[Stage],
) -> LoraUse:
    def wrong(key: str, what: str, hint: str = "") -> JobError:
        return JobError(what, where=item.where("loras", index, key), hint=hint)

    if path.suffix != ".safetensors":
        raise wrong("path", f"{said.path!r} is no .safetensors file", "Save the LoRA as one.")
    if not path.is_file():
        raise wrong("path", f"{said.path!r} is not there", f"Looked for {path}.")
    try:
        blocks = parse_blocks(said.blocks, depth)
    except ValueError as error:
        raise wrong("blocks", str(error)) from None
    try:
        spec = said.steps
        steps = parse_steps((spec.sigma[0], spec.sigma[1]) if isinstance(spec, SigmaRange) else spec, sigmas)
    except ValueError as error:
        raise wrong("steps", str(error)) from None
    if said.expert != "both" and parts[0].expert == "only":
        raise wrong("expert", "this model has one transformer", "Experts are those of Wan 2.2 A14B.")
    taken = {step for part in parts if said.expert in ("both", part.expert) for step in part.steps}
    if steps and not taken & set(steps):
        raise wrong("expert", f"the {said.expert}-noise expert takes none of these steps", "See `steps`.")
    if not steps:
        raise wrong("steps", "no step is in this range", "`wancli plan -v` prints the sigmas.")
    found = fit(path)
    changed = found.coverage.blocks
    if said.blocks != "all" and not set(blocks) & set(changed):
        what = f"blocks {changed[0]} to {changed[-1]}" if changed else "nothing in the blocks"
        raise wrong("blocks", f"{path.name} changes none of these", f"It changes {what}.")
    return LoraUse(
        path,
        found.sha256,
        said.strength,
        blocks=None if said.blocks == "all" else tuple(sorted(blocks)),
        steps=None if len(steps) == len(sigmas) - 1 else steps,
        expert=None if said.expert == "both" else said.expert,
        coverage=found.coverage,
    )


def warnings(uses: Sequence[LoraUse]) -> Iterator[str]:
    """What the user should know before it starts."""
    for use in uses:
        if use.strength == 0:
            yield f"{use.path.name} has strength 0 and changes nothing"
        if use.coverage.style == "PEFT" and not use.coverage.scaled:
            yield f"{use.path.name} has no alpha and no {CONFIG} beside it; its scale is taken as 1"
        if use.coverage.unused:
            examples = ", ".join(use.coverage.examples)
            yield f"{use.path.name}: {use.coverage.unused} keys name nothing of this model: {examples}"
