"""The tiny checkpoint and what the official code makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny, and threads that wait for each other are not

TINY = Path(__file__).parent / "fixtures" / "wan21-tiny"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A whole Wan 2.1 checkpoint folder: 40 blocks, tiny widths, random weights."""
    return TINY


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Prompts, token ids and cases."""
    return json.loads((TINY / "reference.json").read_text())


@pytest.fixture(scope="session")
def numbers() -> dict[str, Any]:
    """The official tensors: contexts, velocities, latents, videos."""
    from safetensors.torch import load_file

    return load_file(TINY / "reference.safetensors")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache."""
    monkeypatch.setenv("WANCLI_CACHE", str(tmp_path_factory.mktemp("cache")))
