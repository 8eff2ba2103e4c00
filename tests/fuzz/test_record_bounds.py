"""Every typed field of every record, aimed at with values past its bounds; and records full of the extremes
that no bound refuses, under valid seals.

A field that accepts more than this file says has lost a bound.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from jobs import run_wancli
from pydantic import TypeAdapter, ValidationError
from test_records import KINDS, made, places, seal, seal_manifest  # noqa: F401

from wancli.injection.block_map import BlockMap
from wancli.plan.throughput import RateFile
from wancli.storage.claim_file import ClaimRecord
from wancli.storage.manifest_schema import Manifest, SavedState, ShotRecord
from wancli.storage.report_schema import ComparisonRecord, ReportRecord
from wancli.storage.schema import Data
from wancli.text import embedding

assert embedding  # its record is a subclass of Data, too

NUMBERS: dict[str, Any] = {"-1": -1, "2**63": 2**63, "10**39": 10**39, "-1e308": -1e308, "1e308": 1e308}
TEXTS = {"": "", "NUL": "a\0b", "..": "../x", "/": "/x"}
FREE, SIGNED, LARGE, WHOLE = set(NUMBERS), {"-1"}, {"2**63", "10**39"}, {"-1", "2**63", "10**39"}
# Which of the numbers a field accepts; all other fields accept none.
ACCEPTED_NUMBERS = {
    "BlockMap.forwards": FREE,
    "BlockMap.parts.values[]": FREE,
    "BlockMap.ranges[][]": WHOLE,  # looked at with the number of blocks
    "BlockMap.seconds": FREE,
    "BlockMap.total[]": FREE,
    "BlockMap.values[][]": FREE,
    "ComparedShot.baseline_motion": FREE,
    "ComparedShot.latent_distance": FREE,
    "ComparedShot.motion": FREE,
    "ComparedShot.psnr": FREE,
    "ComparedShot.psnr_inside": FREE,
    "ComparedShot.psnr_outside": FREE,
    "ComparedShot.ssim": FREE,
    "EffectRecord.blocks.values": LARGE,
    "EffectRecord.changed_percent.values": LARGE,
    "EffectRecord.velocity": LARGE,
    "EntryRecord.labels.values": FREE,
    "Heatmap.values[]": FREE,
    "LatentSketch.norm": LARGE,
    "LoraRecord.scales[]": FREE,
    "LoraRecord.strength": SIGNED,
    "Manifest.first_step_after": FREE,
    "MeasuredBranch.parts.values[]": FREE,
    "MeasuredBranch.total[]": FREE,
    "MeasuredBranch.values[][]": FREE,
    "MemoryRow.expected": FREE,
    "MemoryRow.seconds": FREE,
    "NoiseLevel.sigma": FREE,
    "NoiseLevel.step": WHOLE,
    "PhaseRecord.seconds": LARGE,
    "ReportRecord.first_step_after": FREE,
    "SteerRecord.blocks.values": {"-1"},
    "SteerRecord.steps.values": {"-1"},
    "RuleRecord.blocks.values": SIGNED,
    "RuleRecord.gain": SIGNED,
    "RuleRecord.steps.values": SIGNED,
    "ShotRecord.first_step_after": FREE,
    "ShotSettings.boundary": FREE,
    "ShotSettings.guidance": SIGNED,
    "ShotSettings.labels.values": FREE,
    "ShotSettings.shift": SIGNED,
    "ShotSettings.sigmas[]": FREE,
    "ShotSettings.timesteps[]": FREE,
    "Sizes.eps": FREE,
    "StageRecord.guidance": SIGNED,
    "VerdictRecord.percent": LARGE,
}
# Lists and mappings that may not be empty.
FILLED = {
    "ComparisonRecord.shots",
    "LoraRecord.steps",
    "RateFile.rates[]",
    "RuleRecord.blocks",
    "RuleRecord.branches",
    "RuleRecord.steps",
    "ShotSettings.stages",
    "_Entry.ids",
    "_Record.embeddings",
}
# Texts that name files: which of the texts they accept. Most others accept all.
FILES = {
    **{
        f"CheckpointFiles.{name}": {"..", "/"}
        for name in (
            "transformer", "high_noise", "low_noise", "text_encoder", "tokenizer", "vae", "image_encoder"
        )
    },
    "ModelRecord.root": {"..", "/"},
    "PromptRecord.file": {"..", "/"},
    "InjectedPictureRecord.path": {"..", "/"},
    "PictureRecord.path": {"..", "/"},
    "LoraRecord.path": {"..", "/"},
    "EntryRecord.output": {"..", "/"},
    "ComparedShot.output": {"..", "/"},
    "ComparisonRecord.sheet": {"..", "/"},
    "ComparisonRecord.video": {"..", "/"},
    "ShotSettings.output": set(),
    "SavedState.output": set(),
    "FileRecord.path": set(),
}  # fmt: skip


def records_types(base: type[Data] = Data) -> Iterator[type[Data]]:
    for each in base.__subclasses__():
        if each.__module__.startswith("wancli.") and "farm" not in each.__module__:  # no messages of a server
            yield each
        yield from records_types(each)


def parts(kind: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A type and those of what it holds, each with the name of the field."""
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    origin, inner = get_origin(base), [each for each in get_args(base) if each is not Ellipsis]
    is_union = origin in (Union, types.UnionType)
    if not is_union or kind is not base:  # bounds around a union are those of all its members
        yield name, kind
    elif is_union:
        for each in inner:
            yield from parts(each, name)
    if origin is dict:
        yield from parts(inner[0], f"{name}.keys")
        yield from parts(inner[1], f"{name}.values")
    elif origin in (list, tuple):
        for each in dict.fromkeys(inner):
            yield from parts(each, f"{name}[]")


def fields() -> dict[str, list[TypeAdapter[Any]]]:
    """Every typed field of every record, and what it holds: the types that a value there may have."""
    found: dict[str, list[TypeAdapter[Any]]] = {}
    for record in dict.fromkeys(records_types()):
        for name, field in record.model_fields.items():
            kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            for place, each in parts(kind, f"{record.__name__}.{name}"):
                if not (isinstance(each, type) and issubclass(each, Data)):
                    found.setdefault(place, []).append(TypeAdapter(each))
    return found


def accepts(kinds: list[TypeAdapter[Any]], value: Any) -> bool:
    for kind in kinds:
        try:
            kind.validate_python(value)
        except ValidationError:
            continue
        return True
    return False


def test_no_field_of_a_record_accepts_a_number_past_its_bounds() -> None:
    found = fields()
    assert len(found) > 200
    accepted = {
        place: {name for name, value in NUMBERS.items() if accepts(kinds, value)}
        for place, kinds in found.items()
    }
    assert {place: names for place, names in accepted.items() if names} == ACCEPTED_NUMBERS


def test_no_field_that_needs_one_accepts_an_empty_list() -> None:
    refused = {
        place
        for place, kinds in fields().items()
        if any(map(holds, kinds)) and not accepts(kinds, []) and not accepts(kinds, {})
    }
    assert FILLED - refused == set()


def holds(kind: TypeAdapter[Any]) -> bool:
    """Whether a type is a list or a mapping of any length, by the JSON schema of it."""
    schema = kind.json_schema()
    return schema.get("type") in ("array", "object") and "prefixItems" not in schema


def test_names_of_files_are_refused_where_they_lead_elsewhere() -> None:
    found = fields()
    for place, names in FILES.items():
        assert {name for name, text in TEXTS.items() if accepts(found[place], text)} == names, place


# ---- the extremes that are left ----

TYPES: dict[str, type[Data]] = {
    "manifest": Manifest, "latent": ShotRecord, "state": SavedState, "report": ReportRecord,
    "comparison": ComparisonRecord, "map": BlockMap, "claim": ClaimRecord, "rates": RateFile,
}  # fmt: skip
Extreme = Literal["largest", "smallest", "empty"]
VALUES: dict[Extreme, tuple[Any, ...]] = {
    "largest": (1e308, 10**39, 2**62, 2**31 - 1, 99_999, 999, 200),
    "smallest": (-1e308, -1e6, -1, 0, 1),
    "empty": (),
}


def fill(document: Any, kind: type[Data], extreme: Extreme) -> Any:
    """A document whose numbers are the most extreme that its type accepts, or whose lists are empty."""
    document = copy.deepcopy(document)
    sort = (list, dict) if extreme == "empty" else (int, float)
    for path in [*places(document)][1:]:
        holder = document
        try:
            for key in path[:-1]:
                holder = holder[key]
            before = holder[path[-1]]
        except (KeyError, IndexError, TypeError):  # what it was in is empty by now
            continue
        if isinstance(before, bool) or not isinstance(before, sort):
            continue
        values = (type(before)(),) if extreme == "empty" else VALUES[extreme]
        for value in values:
            holder[path[-1]] = value
            try:
                kind.model_validate(document)
            except ValidationError:
                holder[path[-1]] = before
            else:
                break
    return document


@pytest.mark.parametrize(
    ("kind", "extreme"),
    [(kind, extreme) for kind in TYPES for extreme in VALUES if (kind, extreme) != ("claim", "empty")],
)  # a claim has no list
def test_a_record_full_of_extremes_is_shown_or_refused_by_name(
    kind: str, extreme: Extreme, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANCLI_CACHE", str(made / "cache"))
    (path,) = made.glob(KINDS[kind])
    kept = path.read_bytes()
    try:
        seal(kind, path, lambda body: fill(body, TYPES[kind], extreme))
        assert path.read_bytes() != kept
        page = ["-o", tmp_path / "page.html", "--csv", tmp_path / "page.csv"]
        out, job = made / "out", made / ("half.yaml" if kind in ("state", "claim") else "job.yaml")
        for command in (
            ["check", out],
            ["status", job],
            ["plan", job],
            ["report", out, *page],
            ["inspect", path],
        ):
            said = run_wancli(capsys, *command)
            assert said.code in (0, 1, 2, 3, 4), (command, said.err)
            assert "Traceback" not in said.err, (command, said.err)
    finally:
        path.write_bytes(kept)
