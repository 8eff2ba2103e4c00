"""The rig of the crash tests: one for each process of the test run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch import Rig, in_memory


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint cut down to one block, in the format that loads fastest."""
    from jobs import TRANSFORMER, change_tensors, checkpoint, pickles_to_safetensors

    model = checkpoint(tmp_path_factory.mktemp("one-block"))

    def cut(tensors: dict[str, object]) -> None:
        for name in [name for name in tensors if name.startswith("blocks.")]:
            if not name.startswith("blocks.0."):
                del tensors[name]

    change_tensors(model / TRANSFORMER, cut)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
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
