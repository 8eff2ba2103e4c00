"""Block maps: which block's text or picture changes the output most, measured for one model and one pair of
prompts or pictures.

`wancli probe` writes a map beside the outputs of the job, and into the cache (`block_map_store`). Loads
without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from wancli.storage import records, sidecars
from wancli.storage.schema import Count, Data, Positive
from wancli.units import format_ranges

SCHEMA = "wancli/map/1"
Method = Literal["inject", "gradient", "skip", "render"]
Attended = Literal["text", "image"]  # what blocks attend to
Change = Annotated[float, Field(ge=0, le=2)]  # 1 - SSIM is up to 2
SUGGESTED = 8
METHODS: tuple[Method, ...] = get_args(Method)  # the most direct measurement of a block first


class MapPart(Data):
    """Base of the parts of a map. A file of a later version may have more keys; they are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class MapModel(MapPart):
    root: str
    sha256: str  # of the transformer
    blocks: Annotated[int, Field(ge=1, le=1000)]


class PromptPair(MapPart):
    main: str
    injected: str
    ids: list[str]  # of their embeddings


class MeasuredBranch(MapPart):
    """What one branch of the cross-attentions adds, measured with another prompt or picture.

    `values` has a row for each noise level, and `total` is the mean of the rows. A row has a number for each
    block, or, if the map has `ranges`, for each range. `hits` counts the blocks that read what was injected.
    `parts` has by name the total of parts of the video, such as `inside` and `outside`, and `changes` what
    changed in the pixels of whole renders: `colour`, `background`, `motion`, `structure`, as shares.
    """

    main: str  # the shot's own prompt, or the names of its pictures
    injected: str
    ids: list[str]  # of both: the embeddings, or the rows of CLIP
    values: list[list[float]]
    total: list[float]
    suggestion: str
    hits: Count | None = None
    parts: dict[str, list[float]] | None = None
    changes: dict[str, list[Change]] | None = None


class NoiseLevel(MapPart):
    step: int
    sigma: float


class BlockMap(MapPart):
    """A measured map: of what blocks read of prompts, of pictures (`image`), or of both.

    The fields from `prompts` to `hits` that `MeasuredBranch` has are those of the prompts. Without prompts
    they are empty. A map of full renders has no levels and no rows.
    """

    KIND: ClassVar[records.Kind] = records.BLOCK_MAP
    job: str
    shot: str
    model: MapModel
    loras: list[str]
    method: Method
    prompts: list[PromptPair]
    size: str
    frames: Positive
    seed: Count
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
    hits: Count | None = None
    parts: dict[str, list[float]] | None = None
    changes: dict[str, list[Change]] | None = None
    image: MeasuredBranch | None = None

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Self:
        width = self.model.blocks if self.ranges is None else len(self.ranges)
        if not width or not self.branches:
            raise ValueError("nothing was measured")
        for branch in self.branches.values():
            by_name = (branch.parts or {}) | (branch.changes or {})
            rows = [*branch.values, branch.total, *by_name.values()]
            if len(branch.values) != len(self.levels) or any(len(row) != width for row in rows):
                raise ValueError("the rows are not as long as the blocks are many")
        if any(not r or not 0 <= min(r) <= max(r) < self.model.blocks for r in self.ranges or []):
            raise ValueError("a range is of no block of the model")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Convert to the JSON object of a map file."""
        later = {name for name in ("hits", "parts", "changes", "image") if getattr(self, name) is None}
        document = self.model_dump(exclude=later)
        for name in ("parts", "changes") if self.image else ():
            if getattr(self.image, name) is None:
                del document["image"][name]
        return {"schema": SCHEMA, **document}

    @property
    def branches(self) -> dict[Attended, MeasuredBranch]:
        """What was measured: the branch of the prompts, that of the pictures, or both."""
        found: dict[Attended, MeasuredBranch] = {}
        for pair in self.prompts[:1]:
            found["text"] = MeasuredBranch(
                main=pair.main, injected=pair.injected, ids=pair.ids, values=self.values, total=self.total,
                suggestion=self.suggestion, hits=self.hits, parts=self.parts,
                changes=self.changes,
            )  # fmt: skip
        return found | ({"image": self.image} if self.image else {})

    @property
    def key(self) -> str:
        """Hash of what was measured. Maps with the same key replace each other in the store."""
        same = (self.model.sha256, self.loras, self.method, [p.ids for p in self.prompts], self.size)
        at = (self.frames, self.seed, [level.step for level in self.levels], self.ranges)
        pictures = [self.image.ids] if self.image else []
        return hashlib.sha256(json.dumps([same, at, *pictures]).encode()).hexdigest()[:32]

    def block_totals(self, attended: Attended) -> list[float] | None:
        """Return the total of each block; None if the map has wider ranges, or lacks a block or branch."""
        if (branch := self.branches.get(attended)) is None:
            return None
        if self.ranges is None:
            return branch.total
        if sorted(block for r in self.ranges for block in r) != list(range(self.model.blocks)):
            return None
        if any(len(r) != 1 for r in self.ranges):
            return None
        return [value for _, value in sorted(zip((r[0] for r in self.ranges), branch.total))]

    def is_of(self, ids: Sequence[str]) -> bool:
        """Whether this map is of these two prompts or pictures, named by the ids of what blocks read."""
        measured = [pair.ids for pair in self.prompts] + ([self.image.ids] if self.image else [])
        return list(ids) in measured

    def describe(self) -> str:
        """Name the map for people: `the inject map of shot 0001 of reef, 2026-11-23`."""
        return f"the {self.method} map of shot {self.shot} of {self.job}, {self.created[:10]}"


def rank(values: Sequence[float]) -> list[int]:
    """Return the indices from the largest value to the smallest. Equal values keep their order."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def suggest_blocks(total: Sequence[float], ranges: Sequence[Sequence[int]] | None) -> str:
    """Suggest a value for `blocks:`: the blocks, or the range, that changed the output most. Of blocks these
    are a quarter, and at most as many as `auto:top8` takes."""
    ranking = rank(total)
    if ranges is not None:
        return format_blocks(ranges[ranking[0]])
    return format_blocks(ranking[: max(1, min(SUGGESTED, len(total) // 4))])


def format_blocks(blocks: Sequence[int]) -> str:
    """Format blocks as YAML for a job: `27-34`, or `[3, 7-9]` for several runs."""
    text = format_ranges(blocks)
    return f"[{text.replace(',', ', ')}]" if "," in text else text


def write(path: Path, block_map: BlockMap) -> None:
    """Write a map. An earlier map at `path` is replaced; any other file there is moved aside."""
    # A file name that is not UTF-8 arrives as lone surrogates.
    text = json.dumps(block_map.as_dict(), indent=1, ensure_ascii=False) + "\n"
    sidecars.write_sidecar(path, text.encode(errors="backslashreplace"), SCHEMA.encode(), 100)


def read(path: Path) -> BlockMap | None:
    """Read the map in a file. Returns None if there is none. Raises EntryError if it is damaged."""
    return sidecars.read_document(path, SCHEMA, BlockMap)
