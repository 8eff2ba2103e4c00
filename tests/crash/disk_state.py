"""What a run finds on the disk, as a short text: equal for trees that differ in times and random names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from wancli.errors import EntryError
from wancli.storage import records, tensor_file

_RANDOM_NAME = re.compile(r"\.wancli-[^/]*\.tmp")


def disk_state(home: Path) -> str:
    """SHA-256 of every name below `home` and of what a run reads in it.

    A record that verifies counts by what it proves: times, sizes of memory and process ids in it never are
    the same twice. Everything else counts by its bytes.
    """
    names = sorted(path for path in home.rglob("*") if not path.is_dir())
    found = [(_RANDOM_NAME.sub("temporary", str(path.relative_to(home))), _content(path)) for path in names]
    folders = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_dir())
    return hashlib.sha256(json.dumps([folders, sorted(found)]).encode()).hexdigest()


def _content(path: Path) -> object:
    data = path.read_bytes()
    try:
        if _RANDOM_NAME.search(str(path)):
            return None  # stays until it is a day old, whatever it holds
        if path.name == "rates.json":
            return len(json.loads(data))
        if path.name.endswith(".report.json"):
            return _report(json.loads(data))
        if path.name.endswith(".html") and data.rstrip().endswith(b"</html>"):
            return "a whole page"
        if "/claims/" in str(path):
            return sorted(json.loads(data))
        if path.suffix == ".safetensors":
            return _tensors(path)
    except (EntryError, ValueError, KeyError, AttributeError):
        pass
    return hashlib.sha256(data).hexdigest()


def _report(report: Mapping[str, Any]) -> object:
    return [(shot["id"], shot["status"]) for shot in report["shots"]]


def _tensors(path: Path) -> object:
    kind = records.LATENT if ".latents." in path.name else records.STATE
    tensors, record = tensor_file.load_tensors(path, kind)
    digest = hashlib.sha256(save(tensors)).hexdigest()
    return [digest, sorted(record), [record.get(name) for name in ("key", "latents_key", "step", "read")]]
