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


class Part(BaseModel):
    """What maps are made of: plain data, of which later versions may hold more."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class MapModel(Part):
    root: str
    sha256: str  # of the transformer
    blocks: int


class Prompts(Part):
    main: str
    injected: str
    ids: list[str]  # of their embeddings


class Level(Part):
    step: int
    sigma: float


class Map(Part):
    """A measured map. `values` has a row for each level, and in it a number for each block, or for each of
    `ranges` where these were measured; `total` is their mean over the levels. Full renders have no levels."""

    job: str
    shot: str
    model: MapModel
    loras: list[str]
    method: Method
    prompts: list[Prompts]
    size: str
    frames: int
    seed: int
    levels: list[Level]
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
    def by_block(self) -> list[float] | None:
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

    def of(self, ids: Sequence[str]) -> bool:
        """Whether it is of these two prompts."""
        return any(prompts.ids == list(ids) for prompts in self.prompts)

    def told(self) -> str:
        """Which map it is, in words: `the inject map of shot 0001 of reef, 2026-11-23`."""
        return f"the {self.method} map of shot {self.shot} of {self.job}, {self.created[:10]}"


def _brief(text: str) -> str:
    return repr(text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…")


def ranked(values: Sequence[float]) -> list[int]:
    """Places from the largest value to the smallest; of equal ones the first comes first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def suggestion(total: Sequence[float], ranges: Sequence[Sequence[int]] | None) -> str:
    """What to write after `blocks:`, the quarter of the blocks that moved the output most, or the range."""
    ranking = ranked(total)
    if ranges is not None:
        return as_blocks(ranges[ranking[0]])
    return as_blocks(ranking[: max(1, len(total) // 4)])


def as_blocks(blocks: Sequence[int]) -> str:
    """`27-34`, or `[3, 7-9]` where they are several runs: YAML for a job."""
    said = format_ranges(blocks)
    return f"[{said.replace(',', ', ')}]" if "," in said else said


def write(path: Path, found: Map) -> None:
    """Puts a map there. An earlier map is replaced; another file of that name is moved aside."""
    # Names of files that are not UTF-8 arrive as lone surrogates.
    text = json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n"
    sidecars.write_sidecar(path, text.encode(errors="backslashreplace"), SCHEMA.encode(), 100)


def read(path: Path) -> Map | None:
    """The map in a file; None where there is none that is whole."""
    try:
        found = Map.model_validate(sidecars.read_document(path, SCHEMA))
    except ValidationError:
        return None
    return found if _is_sound(found) else None


def _is_sound(found: Map) -> bool:
    places = found.model.blocks if found.ranges is None else len(found.ranges)
    rows = [*found.values, found.total]
    if not found.prompts or not places:
        return False
    return len(found.values) == len(found.levels) and all(len(row) == places for row in rows)


@dataclass(frozen=True)
class Choice:
    """What `auto:top8` became, by which map, and of which prompts that is if not of those of the rule."""

    rule: int
    said: str
    blocks: str
    by: str
    of_others: str = ""


@dataclass(frozen=True)
class Shelf:
    """The maps of this user, in a folder for each transformer. With `open_` there need be none: then `auto`
    is every block, for whoever is about to measure."""

    root: Path
    open_: bool = False
    _seen: dict[str, list[Map]] = field(default_factory=dict, repr=False, compare=False)  # by transformer

    def keep(self, found: Map) -> Path:
        """Puts a map on the shelf, in place of one of the same thing. Raises MachineError or NoSpace."""
        self._seen.clear()
        path = self._folder(found.model.sha256) / f"{found.key}.json"
        write(path, found)
        return path

    def chosen(
        self, said: str, rule: int, transformer: str, depth: int, ids: Sequence[str]
    ) -> tuple[list[int], Choice | None]:
        """The blocks that `auto:top8` or `auto:bottom8` stands for, in rising order, and by which map.

        Maps of the same two prompts come before those of others, those by `inject` before `gradient`, `skip`
        and `render`, and of what is left the newest. Raises ValueError for what is no such set, JobError
        where no map of the model is known.
        """
        match = AUTO.fullmatch(said)
        if not match:
            raise ValueError(f"{said!r} is no block set; write auto:top8 or auto:bottom8")
        count = int(match[2])
        if not 1 <= count <= depth:
            raise ValueError(f"{said!r} is not within 1 and the model's {depth} blocks")
        if self.open_:
            return list(range(depth)), None
        known = sorted(self._known(transformer, depth), key=lambda found: found.created, reverse=True)
        known.sort(key=lambda found: (not found.of(ids), METHODS.index(found.method)))
        if not known:
            raise JobError(
                f"{said} needs a map, and none was measured with this model",
                hint="`wancli probe JOB` measures one; --method gradient is the quick way.",
            )
        found = known[0]
        values = found.by_block
        assert values is not None
        ranking = ranked(values)
        blocks = sorted(ranking[:count] if match[1] == "top" else ranking[-count:])
        others = "" if found.of(ids) else " against ".join(map(_brief, found.texts))
        return blocks, Choice(rule, said, as_blocks(blocks), found.told(), others)

    def _folder(self, transformer: str) -> Path:
        return self.root / transformer[:16]

    def _known(self, transformer: str, depth: int) -> list[Map]:
        """The maps of single blocks of a transformer, read once: the shots of a sweep all ask."""
        if transformer not in self._seen:
            self._seen[transformer] = [*self._read(transformer, depth)]
        return self._seen[transformer]

    def _read(self, transformer: str, depth: int) -> Iterator[Map]:
        with suppress(OSError):
            for path in sorted(self._folder(transformer).glob("*.json")):
                found = read(path)
                model = found and (found.model.sha256, found.model.blocks)
                if found and found.by_block and model == (transformer, depth):
                    yield found
