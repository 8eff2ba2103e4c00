"""The rig of the crash tests: one for each process of the test run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from batch import Rig, in_memory


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint cut down to one block, in the format that loads fastest."""
    from jobs import checkpoint, cut_blocks, pickles_to_safetensors

    model = checkpoint(tmp_path_factory.mktemp("one-block"))
    cut_blocks(model, 1)
    pickles_to_safetensors(model)
    return model


@pytest.fixture(scope="session")
def rig(one_block: Path) -> Iterator[Rig]:
    """Two shots, with a stand-in for ffmpeg."""
    with in_memory() as folder, Rig(folder, one_block) as rig:
        yield rig


@pytest.fixture(scope="session")
def long_rig(one_block: Path) -> Iterator[Rig]:
    """Two shots of 20 steps and 9 frames, with the real ffmpeg."""
    with in_memory() as folder, Rig(folder, one_block, quick=False, frames=9, sampler={"steps": 20}) as rig:
        yield rig
