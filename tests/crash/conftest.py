"""The rig of the crash tests: one for each process of the test run."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from batch import Rig


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint cut down to one block: a trial is as long as its calls."""
    import json

    from jobs import TRANSFORMER, change_tensors, checkpoint

    model = checkpoint(tmp_path_factory.mktemp("one-block"))

    def cut(tensors: dict[str, object]) -> None:
        for name in [name for name in tensors if name.startswith("blocks.") and not name.startswith("blocks.0.")]:
            del tensors[name]

    change_tensors(model / TRANSFORMER, cut)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    return model


@pytest.fixture(scope="session")
def rig(one_block: Path) -> Iterator[Rig]:
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="wancli-crash-", dir=place) as folder, Rig(Path(folder), one_block) as rig:
        yield rig
