"""The measured block maps of a user, and the blocks that `inject.blocks: auto:top8` takes from them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wancli.errors import EntryError, JobError, Unreadable
from wancli.injection import block_map
from wancli.injection.block_map import METHODS, Attended, BlockMap, format_blocks, rank
from wancli.storage import disk
from wancli.units import quote

log = logging.getLogger(__name__)

AUTO = re.compile(r"auto:(top|bottom)(\d{1,4})")


@dataclass(frozen=True)
class AutoBlocks:
    """The blocks that replace `auto:top8` in a rule, and the map that chose them."""

    rule: int
    spec: str
    blocks: str
    map_name: str
    other_prompts: str = ""  # or pictures, of the map, if they are not those of the rule


@dataclass(frozen=True)
class BlockMapStore:
    """The block maps in the cache, in a folder for each transformer.

    With `allow_missing`, `auto` stands for every block and no map is read: for a run that will measure one.
    """

    root: Path
    allow_missing: bool = False
    _cached: dict[str, list[BlockMap]] = field(default_factory=dict, repr=False, compare=False)

    def put(self, measured: BlockMap) -> Path:
        """Store a map, in place of one with the same key. Raises MachineError or NoSpace."""
        self._cached.clear()
        path = self._folder(measured.model.sha256) / f"{measured.key}.json"
        block_map.write(path, measured)
        return path

    def select_blocks(
        self,
        spec: str,
        rule: int,
        transformer: str,
        depth: int,
        ids: Sequence[str],
        attended: Attended = "text",
    ) -> tuple[list[int], AutoBlocks | None]:
        """Select the blocks of `auto:top8` or `auto:bottom8`, in rising order, by one branch of the map.

        A map of the same two of them (`ids`) is preferred to one of others. Then the method decides:
        `inject` before `gradient`, `skip` and `render`. Then the newest map wins.

        Raises ValueError if `spec` is not such a set, and JobError if there is no map of the model.
        """
        match = AUTO.fullmatch(spec)
        if not match:
            raise ValueError(f"{spec!r} is not a block set; write auto:top8 or auto:bottom8")
        count = int(match[2])
        if not 1 <= count <= depth:
            raise ValueError(f"{spec!r} is not within 1 and the model's {depth} blocks")
        if self.allow_missing:
            return list(range(depth)), None
        known = [m for m in self._candidates(transformer, depth) if m.block_totals(attended)]
        candidates = sorted(known, key=lambda m: m.created, reverse=True)
        candidates.sort(key=lambda m: (not m.is_of(ids), METHODS.index(m.method)))
        if not candidates:
            of = " of a picture" if attended == "image" else ""
            raise JobError(
                f"{spec} needs a map{of}, and none was measured with this model",
                hint="`wancli probe JOB` measures one; --method gradient is the quickest.",
            )
        best = candidates[0]
        values, branch = best.block_totals(attended), best.branches[attended]
        assert values is not None
        ranking = rank(values)
        blocks = sorted(ranking[:count] if match[1] == "top" else ranking[-count:])
        pair = " against ".join(quote(text, 40) for text in (branch.main, branch.injected))
        others = "" if best.is_of(ids) else pair
        return blocks, AutoBlocks(rule, spec, format_blocks(blocks), best.describe(), others)

    def _folder(self, transformer: str) -> Path:
        return self.root / transformer[:16]

    def _candidates(self, transformer: str, depth: int) -> list[BlockMap]:
        """Return the maps of single blocks of a transformer. They are read once for all shots of a sweep."""
        if transformer not in self._cached:
            self._cached[transformer] = [*self._read(transformer, depth)]
        return self._cached[transformer]

    def _read(self, transformer: str, depth: int) -> Iterator[BlockMap]:
        folder = self._folder(transformer)
        with disk.reading_for_job(str(folder)):
            paths = disk.list_folder(folder)
        for path in paths:
            try:
                measured = block_map.read(path) if path.suffix == ".json" else None
            except (EntryError, Unreadable) as error:
                log.warning("%s; not used", error)
            else:
                model = measured and (measured.model.sha256, measured.model.blocks)
                if measured and model == (transformer, depth):
                    yield measured
