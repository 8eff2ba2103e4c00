"""Which attention maps a shot records, as data: words of its prompt, and groups of blocks and steps.

An attention map is the probability of a word for every video token: softmax over all 512 rows of the prompt,
summed over the rows of the word's pieces, in the mean over heads and over the blocks and steps of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """Blocks or steps whose maps are averaged. `label` is how the user wrote them."""

    members: tuple[int, ...]
    label: str = field(compare=False)


@dataclass(frozen=True)
class AttentionSpec:
    """The maps of a shot: one for every word, group of blocks and group of steps."""

    words: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]  # of each word: the rows of its pieces in the context of the prompt
    blocks: tuple[Group, ...]
    steps: tuple[Group, ...]

    @property
    def count(self) -> int:
        """The number of maps."""
        return len(self.words) * len(self.blocks) * len(self.steps)

    def blocks_at(self, step: int) -> frozenset[int]:
        """Return the blocks whose attention is recorded at a step."""
        if all(step not in group.members for group in self.steps):
            return frozenset()
        return frozenset(block for group in self.blocks for block in group.members)
