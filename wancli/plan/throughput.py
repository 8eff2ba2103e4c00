"""Measured rates of this machine, remembered from finished renders, and the time that a job will take.

A rate is FLOP/s of a phase, for `load` bytes/s. `encode` includes loading the text encoder, `pictures`
includes loading the VAE and CLIP.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from wancli.errors import EntryError, MachineError, Unreadable
from wancli.injection.exprs import Concat, Emphasis, Image, Lerp, Nag, Select, Steer, Text
from wancli.injection.token_sums import TokenSums, group_by_expr
from wancli.plan import memory_estimate
from wancli.plan.picture_entries import entry_flops
from wancli.resources import flops, machine
from wancli.storage import atomic, records
from wancli.storage.schema import Data, Positive

if TYPE_CHECKING:
    from wancli.injection.area import TokenGrid
    from wancli.injection.exprs import Branch, Cell, Expr
    from wancli.injection.table import Table
    from wancli.models.config import WanConfig
    from wancli.plan.model_spec import ModelSpec
    from wancli.plan.shot import Shot
    from wancli.storage.manifest_schema import ShotRecord

log = logging.getLogger(__name__)

PHASES = ("encode", "load", "sample", "decode", "pictures")
MIN_SECONDS = 1e-6  # less is no measurement
MAX_RATES = 400  # records, the newest
SAME_RATES = 5  # of one workload
EXTRAPOLATION_FACTOR = 4  # times the tokens


@dataclass(frozen=True)
class Rate:
    """The measured throughput of one phase, for a network of this width and so many tokens."""

    device: str
    dtype: str
    residency: str
    phase: str
    width: Positive
    tokens: Positive
    per_second: Annotated[float, Field(ge=1e-3, le=1e30)]
    date: str


class RateFile(Data):
    """The whole of `rates.json`."""

    KIND: ClassVar[records.Kind] = records.RATES
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Workload:
    """The work of a phase, `amount` in FLOPs or bytes, and everything that its speed depends on."""

    device: str
    dtype: str
    residency: str
    phase: str
    width: int
    tokens: int
    amount: int


def shot_workloads(shot: Shot) -> dict[str, Workload]:
    """Return the workload of each phase of a shot: encoding of all its prompts and pictures, loading of one
    expert."""
    model, wan = shot.model, shot.model.checkpoint.transformer_config
    here = machine.device_name(model.device)
    counts = [len(text.tokens.ids) for text in shot.prompts if not text.file]
    weights = memory_estimate.predict_phases(shot)[1].model
    return {
        "encode": encoding_workload(model, counts),
        "load": Workload(here, model.dtype, model.residency, "load", wan.dim, 1, max(1, weights)),
        "sample": Workload(
            here, model.dtype, model.residency, "sample", wan.dim, shot.tokens, sampling_flops(shot)
        ),
        "decode": Workload(
            here,
            "fp32",
            "resident",
            "decode",
            model.vae_sizes.dec_dim,
            shot.tokens,
            flops.decode_flops(model.vae_sizes, shot.latent_shape),
        ),
        "pictures": picture_workload(shot, sum(entry_flops(shot).values())),
    }


def picture_workload(shot: Shot, amount: int) -> Workload:
    """Return the workload of encoding pictures of this shot with so many FLOPs."""
    here = machine.device_name(shot.model.device)
    width = shot.model.vae_sizes.dim
    return Workload(here, "fp32", "resident", "pictures", width, shot.tokens, amount)


def encoding_workload(model: ModelSpec, counts: Sequence[int]) -> Workload:
    """Return the workload of encoding prompts with these token counts."""
    amount = sum(flops.encode_flops(model.text_encoder, count) for count in counts)
    encoder, width = model.encoder, model.text_encoder.d_model
    here = machine.device_name(model.device)
    return Workload(here, encoder.dtype, encoder.residency, "encode", width, max(1, sum(counts)), amount)


def read_rates(path: Path) -> tuple[Rate, ...]:
    """Read the remembered rates. Returns none if the file is missing; one that is damaged is a warning."""
    try:
        entries = records.read_json(path, records.RATES)
        return () if entries is None else RateFile.parse({"rates": entries}, path).rates
    except (EntryError, Unreadable) as error:
        log.warning("%s; times are not predicted from it", error)
        return ()


def remember_rates(path: Path, fresh: Iterable[Rate]) -> None:
    """Add rates to the file, which keeps the newest SAME_RATES of each workload. A full disk is ignored."""
    kept: list[Rate] = []
    counts: defaultdict[tuple[object, ...], int] = defaultdict(int)
    for rate in reversed((*read_rates(path), *fresh)):
        counts[_workload_of(rate)] += 1
        if counts[_workload_of(rate)] <= SAME_RATES:
            kept.insert(0, rate)
    text = json.dumps([asdict(rate) for rate in kept[-MAX_RATES:]], indent=1)
    with suppress(MachineError):
        atomic.replace(path, text.encode())


def nearest_rate(rates: Iterable[Rate], wanted: Workload) -> Rate | None:
    """Find the rate of the same phase, device, dtype and residency with the nearest width and tokens; of
    several renders of this workload the median."""

    def distance(rate: Rate) -> float:
        return abs(math.log(rate.width / wanted.width)) + abs(math.log(rate.tokens / wanted.tokens))

    same = (wanted.device, wanted.dtype, wanted.residency, wanted.phase)
    fitting = [rate for rate in rates if (rate.device, rate.dtype, rate.residency, rate.phase) == same]
    nearest = min(map(distance, fitting), default=0.0)
    alike = sorted((rate for rate in fitting if distance(rate) == nearest), key=lambda rate: rate.per_second)
    return alike[len(alike) // 2] if alike else None


def extreme_rates(rates: Iterable[Rate], *, fastest: bool) -> list[Rate]:
    """Return the fastest, or the slowest, of the rates of each workload."""
    ordered = sorted(rates, key=lambda rate: rate.per_second, reverse=not fastest)
    return list({_workload_of(rate): rate for rate in ordered}.values())


def _workload_of(rate: Rate) -> tuple[object, ...]:
    return tuple(asdict(rate).values())[:6]


def predict_seconds(wanted: Workload, rates: Iterable[Rate]) -> float | None:
    """Predict the seconds of a workload. Returns None if no rate is like it."""
    if not wanted.amount:
        return 0.0
    rate = nearest_rate(rates, wanted)
    return None if rate is None else wanted.amount / rate.per_second


def measured_rates(shots: Sequence[tuple[Shot, ShotRecord]], forked: Collection[int] = ()) -> list[Rate]:
    """Compute the rates of rendered shots from the phases that their manifests record. `forked` are the
    indices of shots whose first steps another shot took: their sampling tells no rate."""
    return [*_encoding_rates(shots), *_network_rates(shots, forked), *_picture_rates(shots)]


def _picture_rates(shots: Iterable[tuple[Shot, ShotRecord]]) -> Iterator[Rate]:
    """Yield one rate for the pictures of each round, which are encoded in one phase."""
    took: dict[str, tuple[Shot, float]] = {}
    amounts: defaultdict[str, int] = defaultdict(int)
    for shot, record in shots:
        for phase in record.phases:
            if phase.name == "pictures" and not phase.earlier:
                took[phase.identity] = shot, phase.seconds
                encoded = not all(picture.cached for picture in record.pictures)
                amounts[phase.identity] += sum(entry_flops(shot).values()) if encoded else 0
    for identity, (shot, seconds) in took.items():
        yield from _workload_rate(picture_workload(shot, amounts[identity]), seconds)


def _encoding_rates(shots: Iterable[tuple[Shot, ShotRecord]]) -> Iterator[Rate]:
    """Yield one rate for the prompts of a batch. They are encoded together, in one phase that each of the
    manifests has."""
    phases: dict[str, tuple[ModelSpec, float]] = {}
    texts: dict[str, dict[str, int]] = {}
    for shot, record in shots:
        phase = next((p for p in record.phases if p.name == "encode" and not p.earlier), None)
        if phase:
            phases[phase.identity] = shot.model, phase.seconds
            encoded = {prompt.id: prompt.tokens for prompt in record.prompts if not prompt.cached}
            texts.setdefault(phase.identity, {}).update(encoded)
    for identity, (model, seconds) in phases.items():
        yield from _workload_rate(encoding_workload(model, list(texts[identity].values())), seconds)


def _network_rates(shots: Iterable[tuple[Shot, ShotRecord]], forked: Collection[int]) -> Iterator[Rate]:
    for shot, record in shots:
        took: defaultdict[str, float] = defaultdict(float)
        for phase in record.phases:
            took[phase.name] += phase.seconds / phase.shots
        took["load"] /= max(1, sum(phase.name == "load" for phase in record.phases))
        for name, workload in shot_workloads(shot).items():
            if name in ("encode", "pictures") or (name == "sample" and shot.index in forked):
                continue
            yield from _workload_rate(workload, took[name])


def _workload_rate(done: Workload, took: float) -> Iterator[Rate]:
    """Yield the rate of a workload that took so many seconds, unless it took no longer than MIN_SECONDS."""
    facts = asdict(done)
    amount = facts.pop("amount")
    if amount and took > MIN_SECONDS:
        yield Rate(**facts, per_second=amount / took, date=datetime.now(UTC).date().isoformat())


def predict_phase_seconds(
    shots: Sequence[Shot], missing: frozenset[str], rates: Sequence[Rate], taken: Mapping[int, int]
) -> dict[str, float | None]:
    """Predict the seconds of each phase of a batch; None if unknown.

    Prompts and entries of pictures in `missing` are encoded once; a transformer, or each of two experts, is
    loaded once. `taken` has, by index, how many steps of a shot are left out: another shot takes them, or an
    earlier run has."""
    totals: dict[str, float | None] = dict.fromkeys(PHASES, 0.0)

    def add(name: str, one: Workload, times: int = 1) -> None:
        took, before = predict_seconds(one, rates), totals[name]
        totals[name] = None if took is None or before is None else before + times * took

    for model in dict.fromkeys(shot.model for shot in shots):
        own = [shot for shot in shots if shot.model == model]
        texts = {text.id: text for shot in own for text in shot.prompts if text.id in missing}
        add("encode", encoding_workload(model, [len(text.tokens.ids) for text in texts.values()]))
        add("load", shot_workloads(own[0])["load"], max(len(shot.stages) for shot in own))
        for shot in own:
            does = shot_workloads(shot)
            alone = 1 - taken.get(shot.index, 0) / shot.steps
            add("sample", replace(does["sample"], amount=int(does["sample"].amount * alone)))
            add("decode", does["decode"])
        pictures = {key: (shot, amount) for shot in own for key, amount in entry_flops(shot).items()}
        for key in pictures.keys() & missing:
            add("pictures", picture_workload(*pictures[key]))
    return totals


def is_extrapolated(rate: Rate, tokens: int) -> bool:
    """Return whether the rate was measured on shots of a very different size."""
    return (
        rate.phase == "sample"
        and not 1 / EXTRAPOLATION_FACTOR <= rate.tokens / tokens <= EXTRAPOLATION_FACTOR
    )


def rates_used(shots: Sequence[Shot], rates: Sequence[Rate]) -> dict[str, Rate]:
    """Return the rate that the prediction of the largest shot uses, by phase."""
    largest = max(shots, key=lambda shot: shot.tokens)
    rates_by_phase = {name: nearest_rate(rates, one) for name, one in shot_workloads(largest).items()}
    return {name: rate for name, rate in rates_by_phase.items() if rate}


def sampling_flops(shot: Shot) -> int:
    """Count the FLOPs of all forwards of a shot, including those that only measure."""
    wan = shot.model.checkpoint.transformer_config
    rows = {text.id: len(text.tokens.ids) + 1 for text in shot.prompts}
    image_rows = {read.id: read.rows for read in shot.clip_pictures}
    contexts = sum(flops.context_flops(wan, count) for count in rows.values())
    contexts += sum(flops.image_context_flops(wan, count) for count in image_rows.values())
    all_rows = tuple((rows | image_rows).items())
    steps = _step_flops(wan, shot.table, all_rows, shot.token_grid, shot.measure, shot.reused)
    return len(shot.stages) * contexts + steps + _attention_map_flops(shot)


def _attention_map_flops(shot: Shot) -> int:
    """Count the FLOPs of recording attention maps."""
    if shot.attention is None:
        return 0
    wan = shot.model.checkpoint.transformer_config
    block = flops.attention_map_flops(wan, shot.tokens, shot.prompt.rows, len(shot.attention.words))
    return block * sum(len(shot.attention.blocks_at(step)) for step in range(shot.steps))


@lru_cache(64)  # the shots of a sweep share tables, which are large
def _step_flops(
    wan: WanConfig,
    table: Table,
    text_rows: tuple[tuple[str, int], ...],
    grid: TokenGrid,
    measure: bool,
    reused: frozenset[tuple[int, Branch]],
) -> int:
    """Count the FLOPs of the forwards of all steps, for texts of so many rows."""
    rows, total, tokens, sums = dict(text_rows), 0, grid.tokens, TokenSums(grid)
    for branch in table.branches:
        base = table.base_cell(branch)
        plain = flops.forward_flops(wan, tokens, wan.num_layers * _count_read(base, rows, sums))
        took: dict[int, int] = {}  # by the id of a row: many steps have the same one
        for step in table.steps_by_branch[branch]:
            if (step, branch) in reused:
                total += flops.reused_forward_flops(wan, tokens)
                continue
            cells = table.row(step, branch)
            if id(cells) not in took:
                read = sum(_count_read(cell, rows, sums) for cell in cells)
                took[id(cells)] = flops.forward_flops(wan, tokens, read)
                if measure and any(cell != base for cell in cells):
                    took[id(cells)] += plain
            total += took[id(cells)]
    return total


def _count_read(cell: Cell, rows: dict[str, int], sums: TokenSums) -> float:
    """Count the rows that a token reads, on average: inside of an area it reads others than outside."""
    return sum(_row_count(expr, rows) * sums.share_read(own) for expr, own in group_by_expr(cell).items())


def _row_count(expr: Expr | Nag, rows: dict[str, int]) -> int:
    match expr:
        case Text(id) | Image(id):
            return rows[id]
        case Lerp(a, b):
            return max(_row_count(a, rows), _row_count(b, rows))
        case Concat(a, b, _, chosen):
            return _row_count(a, rows) + (_row_count(b, rows) if chosen is None else len(chosen))
        case Select(a, _, chosen):
            return max(_row_count(a, rows), max(chosen) + 2)
        case Steer(inner) | Emphasis(inner):
            return _row_count(inner, rows)
        case Nag(negative):
            return _row_count(negative, rows)
