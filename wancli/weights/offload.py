"""Offloading: where the weights of the blocks live. The network does not know.

    resident   every weight on the device, in the dtype that it computes in
    packed     packed weights in memory (`Packed`), unpacked block by block
    streamed   packed weights on disk (`OnDisk`), read and unpacked block by block

A network that loops over `OffloadedBlocks` finds the matrices of each block bound while that block runs. Only
the matrices of two blocks are in memory, whatever the depth: one block runs while the next is fetched. Small
tensors stay on the device: norms, modulation, biases, and everything outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from wancli.models.dit_layers import Blocks
from wancli.resources.memory_model import Residency
from wancli.weights.disk_reader import keep_on_disk, unpack_to_device
from wancli.weights.formats.packed import Packed


class Weight(Protocol):
    """The interface that a block needs of a weight: `Packed`, `PinnedWeight` and `OnDisk` have it."""

    @property
    def shape(self) -> Sequence[int]: ...
    def unpack(self, dtype: torch.dtype, *, out: Tensor) -> Tensor: ...


WeightSource = Mapping[str, Weight]  # canonical name of a parameter -> its weight
AfterUnpack = Callable[[str, Tensor], None]  # changes the unpacked weight of that name in place


def place_weights(
    source: Mapping[str, Packed], residency: Residency, device: torch.device | str
) -> WeightSource:
    """Return a source whose weights, mapped from their files, are where the residency keeps them.

    For a GPU, packed weights are copied to pinned memory. For a CPU they stay mapped, and the kernel keeps
    their pages as long as it can.
    """
    if residency == "streamed":
        return keep_on_disk(source, device)
    if torch.device(device).type == "cpu":
        return source
    return {name: PinnedWeight(weight) for name, weight in source.items()}


class PinnedWeight:
    """A packed weight in memory that a GPU copies while the program runs on."""

    def __init__(self, weight: Packed) -> None:
        self.shape = weight.shape
        self._weight = replace(weight, data=weight.data.pin_memory())

    def unpack(self, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return unpack_to_device(self._weight, dtype, out=out)


def find_matrices(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers of a block by the names of their weights, which are 98 % of its bytes."""
    layers = ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight": layer for name, layer in layers}


def matrix_names(blocks: nn.ModuleList, prefix: str) -> list[str]:
    """Return the names that a source for these blocks must hold: those of all their matrices."""
    return [f"{prefix}.{i}.{name}" for i in range(len(blocks)) for name in find_matrices(blocks[i])]


class OffloadedBlocks(Blocks):
    """Blocks of one shape whose matrices are bound only while the loop is at them.

    The matrices of the given blocks are on the meta device, in the dtype that each computes in, and return
    there after their turn. A thread fetches the next block while one runs; it ends with the loop, however the
    loop ends.

    Raises RuntimeError for a second loop at the same time, and for a loop with gradients, whose backward pass
    would find other weights in the buffers. An error of the source is raised by the loop, with a note that
    names the weight. Raises ValueError if the shapes of the source are not those of the blocks.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        prefix: str,
        source: WeightSource,
        device: torch.device | str,
        after_unpack: AfterUnpack | None = None,
    ) -> None:
        super().__init__(list(blocks))
        for name in matrix_names(blocks, prefix):
            expected = self.get_parameter(name.removeprefix(f"{prefix}.")).shape
            if tuple(source[name].shape) != tuple(expected):
                raise ValueError(f"{name} is {list(source[name].shape)}, expected {list(expected)}")
        self._prefix, self._source, self._after_unpack = prefix, source, after_unpack
        self._layers = [find_matrices(block) for block in blocks]
        self._running = False
        device = torch.device(device)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        like = {part: layer.weight for part, layer in self._layers[0].items()}
        self._stages = [_BlockBuffers(like, device, side) for _ in range(2)]

    __repr__ = nn.Module.__repr__  # the repr of a list would run the loop

    def __iter__(self) -> Iterator[nn.Module]:
        return self.iterate_from(0)

    def iterate_from(self, first: int) -> Iterator[nn.Module]:
        if torch.is_grad_enabled():
            raise RuntimeError("streamed blocks run without gradients only")
        if self._running:
            raise RuntimeError("these blocks are in another loop already")
        self._running = True
        try:
            # One thread beside those that compute: unpacking is bound by memory, and threads that wait for
            # each other on busy cores take a third longer than one alone.
            with ThreadPoolExecutor(1, "weights", torch.set_num_threads, (1,)) as reader:
                pending = reader.submit(self._fetch, first)
                for i, block in islice(enumerate(super().__iter__()), first, None):
                    stage = pending.result()
                    if i + 1 < len(self):
                        pending = reader.submit(self._fetch, i + 1)
                    with stage.reading(), _bind_weights(self._layers[i], stage.weights):
                        yield block
        finally:
            self._running = False

    @torch.inference_mode()  # a thread does not start in the mode of the one that started it
    def _fetch(self, index: int) -> _BlockBuffers:
        stage = self._stages[index % 2]
        with stage.writing():
            for part, buffer in stage.buffers.items():
                name = f"{self._prefix}.{index}.{part}"
                try:
                    self._source[name].unpack(buffer.dtype, out=buffer)
                    if self._after_unpack:
                        self._after_unpack(name, buffer)
                except Exception as error:
                    error.add_note(f"while fetching {name}")
                    raise
        return stage


class _BlockBuffers:
    """Memory for the matrices of one block.

    On a CPU the loop keeps writer and reader apart. CUDA runs asynchronously, so there the writer has a
    stream of its own: it waits until the kernels that read the last block have ended, and the kernels of this
    block wait until the writer is done.
    """

    def __init__(
        self, like: Mapping[str, Tensor], device: torch.device, side: torch.cuda.Stream | None
    ) -> None:
        with torch.inference_mode(False):  # so that both threads may write, whatever mode this one is in
            self.buffers = {
                name: torch.empty(weight.shape, dtype=weight.dtype, device=device)
                for name, weight in like.items()
            }
        self.weights = {name: nn.Parameter(b, requires_grad=False) for name, b in self.buffers.items()}
        self._side = side
        if side:
            self._written, self._read = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
            # The allocator orders memory by the stream that asked for it, here the main one: what had this
            # memory before must be done with it, and who gets it after must wait for the side stream.
            self._read.record(torch.cuda.current_stream(device))
            for buffer in self.buffers.values():
                buffer.record_stream(side)

    @contextmanager
    def writing(self) -> Iterator[None]:
        if not self._side:
            yield
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._read)
            yield
            self._written.record(self._side)

    @contextmanager
    def reading(self) -> Iterator[None]:
        if not self._side:
            yield
            return
        main = torch.cuda.current_stream(self._side.device)
        main.wait_event(self._written)
        try:
            yield
        finally:
            self._read.record(main)


@contextmanager
def _bind_weights(layers: Mapping[str, nn.Linear], weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    originals = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = weights[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = originals[name]


class DiskEmbedding(nn.Module):
    """An embedding whose table is not in memory: the rows of each call are read from disk."""

    def __init__(
        self, rows: Callable[[Sequence[int]], Packed], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self._rows, self._dtype, self._device = rows, dtype, device

    def forward(self, ids_BN: Tensor) -> Tensor:
        part = self._rows(ids_BN.flatten().tolist())
        rows = torch.empty(*part.shape, dtype=self._dtype)
        return part.unpack(self._dtype, out=rows).to(self._device).view(*ids_BN.shape, -1)


LoadBlock = Callable[[int], Mapping[str, Tensor]]  # a block's tensors, by their names in it; asked for once


class LazyBlocks(Blocks):
    """Blocks on the meta device that load their tensors when a loop reaches them, or an index selects them.

    From then on they are as if loaded at once, in the inference mode, or not, of that loop. Loop over the
    blocks before you iterate over the parameters of the network: blocks that have not run are still on the
    meta device.
    """

    def __init__(self, blocks: nn.ModuleList, take: LoadBlock) -> None:
        super().__init__(list(blocks))
        self._missing, self._take = set(range(len(blocks))), take

    __repr__ = nn.Module.__repr__  # the repr of a list would load all blocks

    def __iter__(self) -> Iterator[nn.Module]:
        return self.iterate_from(0)

    def iterate_from(self, first: int) -> Iterator[nn.Module]:
        for i in range(first, len(self)):
            yield self[i]

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]
        block = super().__getitem__(index)
        if (index := index % len(self)) in self._missing:
            block.load_state_dict(self._take(index), assign=True)
            self._missing.remove(index)
        return block
