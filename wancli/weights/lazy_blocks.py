"""Blocks that are converted when their turn comes, so that the first one runs before the last is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from wancli.models.dit_layers import Blocks

Take = Callable[[int], Mapping[str, Tensor]]  # a block's tensors, by their names in it; asked for once


class Arriving(Blocks):
    """Blocks on the meta device that get their tensors when a loop comes to them, or an index names them.

    From then on they are as if they had been loaded at once, in the mode, inference or not, of that loop. Who
    walks over the parameters of a network must have walked over its blocks before: those that nothing asked
    for yet are still on the meta device.
    """

    def __init__(self, blocks: nn.ModuleList, take: Take) -> None:
        super().__init__(list(blocks))
        self._missing, self._take = set(range(len(blocks))), take

    __repr__ = nn.Module.__repr__  # a list's own would load them all

    def __iter__(self) -> Iterator[nn.Module]:
        return self.since(0)

    def since(self, first: int) -> Iterator[nn.Module]:
        for i in range(first, len(self)):
            yield self[i]

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]
        block = super().__getitem__(index)
        if (index := index % len(self)) in self._missing:
            block.load_state_dict(self._take(index), assign=True)
            self._missing.remove(index)
        return block
