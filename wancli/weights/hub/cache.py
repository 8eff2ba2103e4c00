"""Find weights in the Hugging Face cache: without a network, and without huggingface_hub, a slow import.

The cache holds `models--ORG--NAME/` per repository: `refs/REVISION` has a commit, `snapshots/COMMIT/` the
files as links, and `blobs/` their contents, each under the digest that the hub names (its ETag).
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from wancli.storage import disk
from wancli.storage.paths import expand_home
from wancli.weights.hub.name import HubName

COMMIT = re.compile("[0-9a-f]{40}")
_FOLDER = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")


def cache_folder() -> Path:
    """Return the folder of the cache: $HF_HUB_CACHE, or `hub` in $HF_HOME, or in the user's cache folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return _expand(value, variable)
    if home := os.environ.get("HF_HOME"):
        return _expand(home, "HF_HOME") / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expand(base, "XDG_CACHE_HOME") / "huggingface" / "hub"


def repository_folder(repo: str) -> Path:
    """Return the folder of a repository in the cache; it need not exist."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def find_snapshot(name: HubName) -> Path | None:
    """Return the folder of a repository at a revision, None if it is not in the cache. Raises Unreadable."""
    folder = repository_folder(name.repo)
    commit = name.revision
    if not COMMIT.fullmatch(commit):
        commit = (disk.find_bytes(folder / "refs" / commit) or b"").decode("ascii", "replace").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and disk.is_folder(snapshot) else None


def find_path(name: HubName) -> Path | None:
    """Return what a name means in the cache: a snapshot, or a folder or file in it. Raises Unreadable.

    The name of a file without its folders means the only file of that name.
    """
    snapshot = find_snapshot(name)
    if snapshot is None or not name.path:
        return snapshot
    if disk.exists(snapshot / name.path):
        return snapshot / name.path
    files = [path for path in disk.walk(snapshot) if path.name == name.path and disk.exists(path)]
    return files[0] if len(files) == 1 else None


def name_of(path: Path) -> HubName | None:
    """Return the name of a repository whose snapshot holds the path; None for any other path."""
    for folder in (path, *path.parents):
        match = _FOLDER.fullmatch(folder.parent.parent.name)
        if match and folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
            repo = f"{match['org']}/{match['name']}"
            main = disk.find_bytes(folder.parent.parent / "refs" / "main") or b""
            at_main = main.decode("ascii", "replace").strip() == folder.name
            return HubName(repo) if at_main else HubName(repo, folder.name)
    return None


def _expand(value: str, variable: str) -> Path:
    return expand_home(os.path.expandvars(value), f"${variable}")
