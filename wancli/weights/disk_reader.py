"""Weights that stay in their files and are read each time they are needed.

Reading is `pread`, not a mapping, although a mapping is twice as fast if the pages are cached (10 GB/s to 5;
from disk both reach the 1 to 2 GB/s of the disk; measured on two cores of an AMD EPYC). A file that fails
under a mapping kills the process with SIGBUS, whereas pread raises, and mapped pages count as memory of this
process. For a CPU a weight is read in chunks, which stay in the processor's cache until they are unpacked.
The kernel keeps what was read while there is room, so a checkpoint that fits into free memory is read from
disk once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from wancli.errors import CheckpointError
from wancli.storage import disk
from wancli.weights.formats.packed import Packed
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN

READ_CHUNK = 2**20  # bytes read at a time for a CPU


def unpack_to_device(weight: Packed, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """Unpack on the device of `out`. If `data` is pinned, the program does not wait for the copy."""
    data = weight.data.to(out.device, non_blocking=True)
    return replace(weight, data=data).unpack(dtype, out=out)


class FileOffset(NamedTuple):
    """The position of a tensor's bytes in a file."""

    path: str
    start: int


class OnDisk:
    """A packed weight whose bytes are on disk. Reading raises CheckpointError, naming weight and file."""

    def __init__(self, name: str, weight: Packed, file: _File, start: int, scratch: _Scratch) -> None:
        self.name, self.shape, self.nbytes = name, tuple(weight.shape), weight.nbytes
        self._meta = replace(weight, data=torch.empty_like(weight.data, device="meta"))
        self._file, self._start, self._scratch = file, start, scratch

    def unpack(self, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        """Read the weight into `out`. Not for two threads at a time: all weights share one buffer."""
        meta = self._meta.data
        if meta.dtype == dtype and out.device.type == "cpu":
            self._read(out, self._start)
            return out
        if len(self.shape) < 2:  # one row: GGUF blocks hold several elements of a norm or a bias
            data = self._scratch.reserve(meta.nbytes).view(meta.dtype).view(meta.shape)
            self._read(data, self._start)
            unpack_to_device(replace(self._meta, data=data), dtype, out=out)
            _await_copy(out)
            return out
        size = meta.nbytes // self.shape[0]
        count = self.shape[0] if out.is_cuda else max(1, READ_CHUNK // size)
        for first in range(0, self.shape[0], count):
            rows = slice(first, first + count)
            part = self._meta.select_rows(rows)
            data = self._scratch.reserve(part.data.nbytes).view(meta.dtype).view(part.data.shape)
            self._read(data, self._start + first * size)
            unpack_to_device(replace(part, data=data), dtype, out=out[rows])
        _await_copy(out)
        return out

    def read_rows(self, ids: Sequence[int]) -> Packed:
        """Read only the given rows of the weight."""
        meta = self._meta.data
        size = meta.nbytes // self.shape[0]
        data = torch.empty(len(ids), size, dtype=torch.uint8)
        for row, index in zip(data, ids, strict=True):
            self._read(row, self._start + index * size)
        data = data.view(-1).view(meta.dtype).view(-1, *meta.shape[1:])  # or flat, as GGUF's blocks are
        return replace(self._meta, data=data, shape=(len(ids), *self.shape[1:]))

    def _read(self, out: Tensor, start: int) -> None:
        remaining = out.view(-1).view(torch.uint8).numpy().data
        while remaining:
            with disk.reading_weights(self.name), disk.reading(Path(self._file.path)):
                count = os.preadv(self._file.number, [remaining], start)
            if not count:
                raise CheckpointError(
                    f"the file ends before {self.name} does", where=self._file.path, hint=DOWNLOAD_AGAIN
                )
            remaining, start = remaining[count:], start + count


def keep_on_disk(source: Mapping[str, Packed], device: torch.device | str = "cpu") -> dict[str, OnDisk]:
    """Return the same weights, left in the files that their data is mapped from. No mapping is kept.

    They will be unpacked to `device`. Raises ValueError for data that is not mapped from a file,
    CheckpointError for data that a .pth stores in another order than row by row.
    """
    ranges, files = Mappings.read_current(), dict[str, _File]()
    scratch = _Scratch(pinned=torch.device(device).type == "cuda")
    weights = {}
    for name, weight in source.items():
        offset = ranges.locate(weight.data)
        if not weight.data.is_contiguous():
            raise CheckpointError(
                f"{name} is stored transposed or with gaps, and wancli reads weights row by row",
                hint="save the .pth again with .contiguous() of every tensor, or as .safetensors",
            )
        if offset is None:
            raise ValueError(f"{name} is not mapped from a file in one piece")
        if offset.path not in files:
            files[offset.path] = _File(offset.path)
        weights[name] = OnDisk(name, weight, files[offset.path], offset.start, scratch)
    return weights


def _await_copy(out: Tensor) -> None:
    """Wait for copies to a GPU: they may still be reading the scratch."""
    if out.is_cuda:
        torch.cuda.current_stream(out.device).synchronize()


class _Scratch:
    """A buffer for the bytes of one weight, as large as the largest weight read so far."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, count: int) -> Tensor:
        if len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffer[:count]


class _File:
    """An open file, closed together with the last weight in it."""

    def __init__(self, path: str) -> None:
        self.path = path
        with disk.reading_weights():
            self.number = disk.open_descriptor(Path(path))
        weakref.finalize(self, os.close, self.number)


class Mappings:
    """The files that are mapped into this process. The kernel knows the file offset of every mapped tensor,
    so no reader of a format has to.
    """

    def __init__(self, ranges: Sequence[tuple[int, int, FileOffset]]) -> None:
        self._ranges = ranges

    @classmethod
    def read_current(cls) -> Self:
        ranges = []
        for line in (disk.read_system_text("/proc/self/maps") or "").splitlines():
            fields = line.split(maxsplit=5)  # proc(5): addresses, permissions, offset, device, inode, path
            if len(fields) == 6 and fields[5].startswith("/"):
                start, end = (int(address, 16) for address in fields[0].split("-"))
                ranges.append((start, end, FileOffset(fields[5], int(fields[2], 16))))
        return cls(ranges)

    def locate(self, tensor: Tensor) -> FileOffset | None:
        if not tensor.is_contiguous():
            return None
        at = tensor.data_ptr()
        for start, end, (path, offset) in self._ranges:
            if start <= at and at + tensor.nbytes <= end:
                return FileOffset(path, offset + at - start)
        return None

    def release_pages(self, tensor: Tensor) -> None:
        """Give back the memory of a mapped tensor. Its pages are read again when they are touched.

        Does nothing for a tensor that is not mapped from a file.
        """
        if self.locate(tensor):
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            length = tensor.data_ptr() + tensor.nbytes - start
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED)
            )
