"""Digests of weight files, remembered for as long as the files do not change."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from wancli.errors import CheckpointError
from wancli.storage import disk, links
from wancli.storage.file_memo import file_identity, read_memo, write_memo
from wancli.weights.formats.safetensors_header import DOWNLOAD_AGAIN

LOGGED_SIZE = 2**30  # bytes; hashing more takes long enough to say so
_DIGEST = re.compile("[0-9a-f]{64}")
LOG = logging.getLogger("wancli")  # to stderr, unless the command line turns it off


@disk.reading_weights()
def fingerprint(paths: Sequence[Path], hashes: Path) -> str:
    """Return the SHA-256, as hex, of the whole content of the files: of one file its plain digest, of several
    the digest of their digests in this order.

    The JSON file `hashes` remembers digests for as long as a file keeps its path, size, inode and times. A
    damaged or missing one is written again. A warning is logged before a file above 1 GiB is read.

    Raises CheckpointError for a blob of the Hugging Face cache whose digest is not its name, or if the disk
    does not give a file.
    """
    remembered = {key: digest for key, digest in read_memo(hashes).items() if _DIGEST.fullmatch(str(digest))}
    identities = {_file_identity(path): path for path in paths}
    digests = {key: remembered.get(key) or _sha256(path) for key, path in identities.items()}
    for key, path in identities.items():
        check_blob(path, digests[key])
    # A file that changed while it was read gets a new identity, and its digest no entry.
    fresh = {key: digest for key, digest in digests.items() if key == _file_identity(identities[key])}
    if not fresh.items() <= remembered.items():
        write_memo(hashes, remembered | fresh)
    if len(paths) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def remember(path: Path, digest: str, hashes: Path) -> None:
    """Let `hashes` remember the SHA-256 of a file that was just computed; no render computes it again."""
    write_memo(hashes, read_memo(hashes) | {_file_identity(path): digest})


def check_blob(path: Path, digest: str) -> None:
    """Raise CheckpointError for a blob of the Hugging Face cache, named by a digest that is not its own."""
    for name in links.list_names(path):
        if name.parent.name == "blobs" and _DIGEST.fullmatch(name.name) and name.name != digest:
            raise CheckpointError(
                f"damaged: the SHA-256 of its content is {digest[:12]}..., and its blob is named "
                f"{name.name[:12]}...",
                where=str(path),
                hint=f"delete {name}, and download the file again",
            )


def _file_identity(path: Path) -> str:
    """Return a text that changes whenever the file behind the path may have changed."""
    if identity := file_identity(path):
        return identity
    raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN)


def _sha256(path: Path) -> str:
    if (size := disk.size(path)) >= LOGGED_SIZE:
        LOG.warning("wancli: hashing %s, %.1f GB; this is done once", path.name, size / 1e9)
    return disk.sha256(path)
