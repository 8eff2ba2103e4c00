"""Fetch files of a repository into the Hugging Face cache, by huggingface_hub, and verify them.

A file is downloaded as `blobs/DIGEST.incomplete`, continued where an earlier run ended, compared in size and
digest with what the hub says, renamed to `blobs/DIGEST`, and linked into the snapshot. `http_get` of
huggingface_hub resumes; its `hf_hub_download` begins a file again after its process died.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from wancli import __version__
from wancli.errors import HubError, HubRefused, IntegrityError, JobError, NoSpace, WancliError
from wancli.storage import atomic, disk, partial_file
from wancli.units import format_bytes
from wancli.weights.hub import cache
from wancli.weights.hub.name import HubName
from wancli.weights.hub.selection import choose_files

_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_MIB = 2**20


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, and the size and digest of each of its files by path.

    A digest is the SHA-256 of the content or, of a small file, the SHA-1 that git has for it.
    """

    repo: str
    revision: str
    commit: str
    files: dict[str, tuple[int, str]]
    licence: str = ""


@dataclass(frozen=True)
class Download:
    """A file to fetch, and how many of its bytes are in the cache: all of them, or a part."""

    repository: Repository
    path: str
    cached: int

    @property
    def size(self) -> int:
        return self.repository.files[self.path][0]

    @property
    def digest(self) -> str:
        return self.repository.files[self.path][1]

    @property
    def missing(self) -> int:
        return max(0, self.size - self.cached)

    @property
    def snapshot_path(self) -> Path:
        folder = cache.repository_folder(self.repository.repo)
        return folder / "snapshots" / self.repository.commit / self.path

    @property
    def blob(self) -> Path:
        return cache.repository_folder(self.repository.repo) / "blobs" / self.digest

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.digest}.incomplete")


def plan_downloads(names: Sequence[HubName]) -> list[Download]:
    """Ask the hub which files these names need. Raises JobError, HubError or HubRefused."""
    repositories: dict[tuple[str, str], Repository] = {}
    downloads: dict[Path, Download] = {}
    for name in names:
        repository = repositories.get((name.repo, name.revision)) or _ask_hub(name)
        repositories[name.repo, name.revision] = repository
        try:
            chosen = choose_files([*repository.files], name.path)
        except JobError as error:
            raise JobError(error.message, where=str(name), hint=error.hint) from None
        for path in chosen:
            download = _look(Download(repository, path, 0))
            downloads[download.snapshot_path] = download
    return [*downloads.values()]


def require_space(downloads: Sequence[Download]) -> None:
    """Raise NoSpace if the disk of the cache cannot hold what is missing."""
    needed, folder = sum(download.missing for download in downloads), cache.cache_folder()
    if needed > (free := disk.free_space(folder)):
        raise NoSpace(
            f"{format_bytes(needed)} are to be fetched, and {format_bytes(free)} are free there",
            where=str(folder),
            hint="Free some space, or set HF_HOME to a folder on a larger disk. Nothing was started.",
        )


def fetch(download: Download, advance: Callable[[int], None]) -> Path:
    """Fetch a file that is not in the cache, and return its path there. `advance` is called with bytes.

    Raises IntegrityError if its bytes are not those that the hub names, HubError, HubRefused or NoSpace. What
    arrived stays for the next run, unless it is damaged.
    """
    from huggingface_hub.utils import WeakFileLock

    lock = cache.cache_folder() / ".locks" / download.blob.parents[1].name / f"{download.digest}.lock"
    with atomic.writing(lock):
        atomic.make_folder(lock.parent)
    with WeakFileLock(lock):
        download = _look(download)  # another process may have fetched it meanwhile
        if disk.is_file(download.snapshot_path) and not download.missing:
            return download.snapshot_path
        if not disk.is_file(download.blob):
            _download(download, advance)
            _verify(download)
            partial_file.complete(download.partial, download.blob)
        partial_file.link(download.blob, download.snapshot_path)
    return download.snapshot_path


def finish(repository: Repository) -> None:
    """Let the revision mean this commit in the cache, now that its files are there."""
    if repository.revision != repository.commit:
        path = cache.repository_folder(repository.repo) / "refs" / repository.revision
        atomic.replace(path, repository.commit.encode())


# ---- one file ----


def _look(download: Download) -> Download:
    """Return the download with what the cache has of it. A file of another size is not in the cache."""
    for path in (download.snapshot_path, download.blob, download.partial):
        found = disk.status(path)
        is_part = path == download.partial
        if found and (found.st_size == download.size or (is_part and found.st_size < download.size)):
            return Download(download.repository, download.path, found.st_size)
    return Download(download.repository, download.path, 0)


def _download(download: Download, advance: Callable[[int], None]) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    found = disk.status(download.partial)
    if found and found.st_size > download.size:
        atomic.remove(download.partial)
    repository = download.repository
    url = hf_hub_url(repository.repo, download.path, revision=repository.commit, endpoint=_endpoint())
    with partial_file.appending(download.partial) as file, _translated(HubName(repository.repo)):
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(library_name="wancli", library_version=__version__),
            expected_size=download.size,
            tqdm_class=_meter(advance),
        )


def _verify(download: Download) -> None:
    """Compare the digest of a partial file with that of the hub; a damaged one is removed."""
    found = _hash(download.partial, is_git=len(download.digest) == 40)
    if found != download.digest:
        atomic.remove(download.partial)
        kind = "SHA-1" if len(download.digest) == 40 else "SHA-256"
        raise IntegrityError(
            f"the {kind} of what arrived is {found[:12]}..., and the hub says {download.digest[:12]}...",
            where=f"{download.repository.repo}:{download.path}",
            hint="The damaged file was removed. Run the command again, or set HF_ENDPOINT to another mirror.",
        )


def _hash(path: Path, *, is_git: bool) -> str:
    """Return the SHA-256 of a file, or the SHA-1 that git gives a blob of this content."""
    if not is_git:
        return disk.sha256(path)
    content = disk.read_bytes(path)
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _meter(advance: Callable[[int], None]) -> Any:
    """Return a class with the interface of tqdm that `http_get` uses."""

    class Meter:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            advance(count)

    return Meter


# ---- the hub ----


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _ask_hub(name: HubName) -> Repository:
    """Ask for the commit of a revision, and for the size and digest of each of its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise HubRefused(
            "HF_HUB_OFFLINE is set, and asking the hub needs the network",
            where=str(name),
            hint="Unset it, or copy the repository's folder into the cache of this machine.",
        )
    api = HfApi(endpoint=_endpoint(), library_name="wancli", library_version=__version__)
    with _translated(name):
        info = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=30)
    files: dict[str, tuple[int, str]] = {}
    for sibling in info.siblings or ():
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
        is_inside = not (sibling.rfilename.startswith("/") or ".." in sibling.rfilename.split("/"))
        if is_inside and sibling.size is not None and _DIGEST.fullmatch(digest):
            files[sibling.rfilename] = (sibling.size, digest)
    if not info.sha or not cache.COMMIT.fullmatch(info.sha) or not files:
        raise HubError(
            "does not answer as a hub does: commit, sizes and digests are missing", where=_endpoint()
        )
    card = info.card_data
    licence = getattr(card, "license_name", None) or getattr(card, "license", None)
    return Repository(name.repo, name.revision, info.sha, files, licence if isinstance(licence, str) else "")


@contextmanager
def _translated(name: HubName) -> Iterator[None]:
    """Raise the errors of huggingface_hub, and of the network below it, as those of wancli."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated_error(name) from error
    except errors.RepositoryNotFoundError as error:
        hint = "Check the name. For a private repository, set HF_TOKEN to a token that may read it."
        raise JobError("no such repository, or a private one", where=name.repo, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise JobError(f"has no revision {name.revision!r}", where=name.repo) from error
    except errors.HfHubHTTPError as error:
        raise _status_error(name, error.response.status_code) from error
    except httpx2.HTTPError as error:
        raise HubError(f"cannot be reached: {error}", where=_endpoint(), hint=_TRY_AGAIN) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise HubError(f"sent another number of bytes: {name}", where=_endpoint(), hint=_TRY_AGAIN) from error


_TRY_AGAIN = "Run the command again: it continues where this one ended."


def _gated_error(name: HubName) -> WancliError:
    page = f"{_endpoint()}/{name.repo}"
    return HubRefused(
        "is gated: its owner asks you to accept its terms",
        where=name.repo,
        hint=f"Accept them at {page}, and set HF_TOKEN to a token of that account (or run `hf auth login`).",
    )


def _status_error(name: HubName, status: int) -> WancliError:
    if status in (401, 403):
        hint = "Set HF_TOKEN to a token that may read this repository; an expired one is refused, too."
        return HubRefused(f"access is refused ({status})", where=name.repo, hint=hint)
    if status == 404:
        return JobError("not found (404)", where=str(name), hint="Check the name and HF_ENDPOINT.")
    if status == 429:
        return HubError("asks to wait: too many requests (429)", where=_endpoint(), hint=_TRY_AGAIN)
    return HubError(f"answers with an error ({status})", where=_endpoint(), hint=_TRY_AGAIN)


def in_mebibytes(count: int) -> int:
    """Return bytes as whole MiB, rounded up: what the progress of a download counts."""
    return -(-count // _MIB)


def count_mebibytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that is called with bytes and calls `advance` with each whole MiB of their sum."""
    total = 0

    def count(added: int) -> None:
        nonlocal total
        before, total = in_mebibytes(total), total + added
        if in_mebibytes(total) != before:
            advance(in_mebibytes(total) - before)

    return count
