"""Block maps: which block's text moves the output most, measured for one model and one pair of prompts.

`wancli probe` writes them: beside the outputs of a job, and onto the shelf, a folder of the cache, where
`inject.blocks: auto:top8` finds them. Pure, and without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from wancli.errors import JobError
from wancli.storage import sidecars
from wancli.units import format_ranges

SCHEMA = "wancli/map/1"
Method = Literal["inject", "gradient", "skip", "render"]
METHODS: tuple[Method, ...] = get_args(Method)  # the most direct measurement of a block first
BRIEF = 40  # characters of a prompt in a warning
AUTO = re.compile(r"auto:(top|bottom)(\d{1,4})")


class MapPart(BaseModel):
    """What maps are made of: plain data, of which later versions may hold more."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class MapModel(MapPart):
    root: str
    sha256: str  # of the transformer
    blocks: int


class PromptPair(MapPart):
    main: str
    injected: str
    ids: list[str]  # of their embeddings


class NoiseLevel(MapPart):
    step: int
    sigma: float


class BlockMap(MapPart):
    """A measured map. `values` has a row for each level, and in it a number for each block, or for each of
    `ranges` where these were measured; `total` is their mean over the levels. Full renders have no levels."""

    job: str
    shot: str
    model: MapModel
    loras: list[str]
    method: Method
    prompts: list[PromptPair]
    size: str
    frames: int
    seed: int
    levels: list[NoiseLevel]
    unit: str
    values: list[list[float]]
    ranges: list[list[int]] | None
    total: list[float]
    suggestion: str
    seconds: float
    forwards: float
    versions: dict[str, str]
    created: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": SCHEMA, **self.model_dump()}

    @property
    def key(self) -> str:
        """The same for maps of the same thing, of which the newest is kept."""
        same = (self.model.sha256, self.loras, self.method, [p.ids for p in self.prompts], self.size)
        at = (self.frames, self.seed, [level.step for level in self.levels], self.ranges)
        return hashlib.sha256(json.dumps([same, at]).encode()).hexdigest()[:32]

    @property
    def block_totals(self) -> list[float] | None:
        """The total of each block; None for a map of wider ranges, or of not all blocks."""
        if self.ranges is None:
            return self.total
        if sorted(block for r in self.ranges for block in r) != list(range(self.model.blocks)):
            return None
        if any(len(r) != 1 for r in self.ranges):
            return None
        return [value for _, value in sorted(zip((r[0] for r in self.ranges), self.total))]

    @property
    def texts(self) -> tuple[str, str]:
        """The prompt, and the one that was injected."""
        return self.prompts[0].main, self.prompts[0].injected

    def matches_prompts(self, ids: Sequence[str]) -> bool:
        """Whether it is of these two prompts."""
        return any(prompts.ids == list(ids) for prompts in self.prompts)

    def describe(self) -> str:
        """Which map it is, in words: `the inject map of shot 0001 of reef, 2026-11-23`."""
        return f"the {self.method} map of shot {self.shot} of {self.job}, {self.created[:10]}"


def _quote_brief(text: str) -> str:
    return repr(text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…")


def rank(values: Sequence[float]) -> list[int]:
    """Places from the largest value to the smallest; of equal ones the first comes first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def suggest_blocks(total: Sequence[float], ranges: Sequence[Sequence[int]] | None) -> str:
    """What to write after `blocks:`, the quarter of the blocks that moved the output most, or the range."""
    ranking = rank(total)
    if ranges is not None:
        return format_blocks(ranges[ranking[0]])
    return format_blocks(ranking[: max(1, len(total) // 4)])


def format_blocks(blocks: Sequence[int]) -> str:
    """`27-34`, or `[3, 7-9]` where they are several runs: YAML for a job."""
    text = format_ranges(blocks)
    return f"[{text.replace(',', ', ')}]" if "," in text else text


def write(path: Path, block_map: BlockMap) -> None:
    """Puts a map there. An earlier map is replaced; another file of that name is moved aside."""
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(block_map.as_dict(), indent=1, ensure_ascii=False) + "\n"
    sidecars.write_sidecar(path, text.encode(errors="backslashreplace"), SCHEMA.encode(), 100)


def read(path: Path) -> BlockMap | None:
    """The map in a file; None where there is none that is whole."""
    try:
        block_map = BlockMap.model_validate(sidecars.read_document(path, SCHEMA))
    except ValidationError:
        return None
    return block_map if _is_sound(block_map) else None


def _is_sound(block_map: BlockMap) -> bool:
    width = block_map.model.blocks if block_map.ranges is None else len(block_map.ranges)
    rows = [*block_map.values, block_map.total]
    if not block_map.prompts or not width:
        return False
    return len(block_map.values) == len(block_map.levels) and all(len(row) == width for row in rows)


@dataclass(frozen=True)
class AutoBlocks:
    """What `auto:top8` became, by which map, and of which prompts that is if not of those of the rule."""

    rule: int
    spec: str
    blocks: str
    map_name: str
    other_prompts: str = ""


@dataclass(frozen=True)
class BlockMapStore:
    """The block maps of this user, in a folder for each transformer. With `allow_missing`, `auto` is every
    block if there is no map, for a run that is about to measure one."""

    root: Path
    allow_missing: bool = False
    _cached: dict[str, list[BlockMap]] = field(
        default_factory=dict, repr=False, compare=False
    )  # by transformer

    def put(self, block_map: BlockMap) -> Path:
        """Puts a map on the shelf, in place of one of the same thing. Raises MachineError or NoSpace."""
        self._cached.clear()
        path = self._folder(block_map.model.sha256) / f"{block_map.key}.json"
        write(path, block_map)
        return path

    def select_blocks(
        self, spec: str, rule: int, transformer: str, depth: int, ids: Sequence[str]
    ) -> tuple[list[int], AutoBlocks | None]:
        """The blocks that `auto:top8` or `auto:bottom8` stands for, in rising order, and by which map.

        Maps of the same two prompts come before those of others, those by `inject` before `gradient`, `skip`
        and `render`, and of what is left the newest. Raises ValueError for what is no such set, JobError
        where no map of the model is known.
        """
        match = AUTO.fullmatch(spec)
        if not match:
            raise ValueError(f"{spec!r} is no block set; write auto:top8 or auto:bottom8")
        count = int(match[2])
        if not 1 <= count <= depth:
            raise ValueError(f"{spec!r} is not within 1 and the model's {depth} blocks")
        if self.allow_missing:
            return list(range(depth)), None
        candidates = sorted(self._candidates(transformer, depth), key=lambda m: m.created, reverse=True)
        candidates.sort(key=lambda m: (not m.matches_prompts(ids), METHODS.index(m.method)))
        if not candidates:
            raise JobError(
                f"{spec} needs a map, and none was measured with this model",
                hint="`wancli probe JOB` measures one; --method gradient is the quick way.",
            )
        best = candidates[0]
        values = best.block_totals
        assert values is not None
        ranking = rank(values)
        blocks = sorted(ranking[:count] if match[1] == "top" else ranking[-count:])
        others = "" if best.matches_prompts(ids) else " against ".join(map(_quote_brief, best.texts))
        return blocks, AutoBlocks(rule, spec, format_blocks(blocks), best.describe(), others)

    def _folder(self, transformer: str) -> Path:
        return self.root / transformer[:16]

    def _candidates(self, transformer: str, depth: int) -> list[BlockMap]:
        """The maps of single blocks of a transformer, read once: the shots of a sweep all ask."""
        if transformer not in self._cached:
            self._cached[transformer] = [*self._read(transformer, depth)]
        return self._cached[transformer]

    def _read(self, transformer: str, depth: int) -> Iterator[BlockMap]:
        with suppress(OSError):
            for path in sorted(self._folder(transformer).glob("*.json")):
                block_map = read(path)
                model = block_map and (block_map.model.sha256, block_map.model.blocks)
                if block_map and block_map.block_totals and model == (transformer, depth):
                    yield block_map
