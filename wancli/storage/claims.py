"""Divide shots among workers that share an output folder, on one host or on many.

A claim is the file .wancli/claims/NAME.json beside the output NAME.mp4. The worker that creates it (O_EXCL)
renders the shot, touches the file at every heartbeat, and removes it at the end. Any worker may take a stale
claim. On the host of the claim's process, the claim is stale when that process is dead. On other hosts, it is
stale when a worker has looked at it a number of times, one heartbeat apart, without seeing a touch. No clocks
of two hosts are compared, and a file system that hangs makes no claim stale: looks wait as long as touches
do.

A claim saves work, it protects no file: `wancli.storage.atomic` makes every write safe, whoever writes. So
claims need neither fsync nor locks, and a network file system that shows one late costs a wait. A worker that
was suspended for so long that another took its claim learns that from `holds_all()` or `holds()`, and leaves
the shot to the other.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.storage import atomic
from wancli.storage.claim_file import ClaimSnapshot, Holder, create_new, current_process, is_dead, read_claim

if TYPE_CHECKING:
    from wancli.plan.shot import Shot
    from wancli.signals import Stop

HEARTBEAT_SECONDS = 5.0
STALE_LOOKS = 12  # without a touch: a minute


@dataclass
class _WatchedClaim:
    """A claim of another worker when it last changed, and how many looks saw no change since."""

    claim: ClaimSnapshot
    last_counted: float  # monotonic seconds
    looks: int = 0


def find_holder(shot: Shot) -> Holder | None:
    """Return the holder of a shot by one look; None if nobody holds it, or its process died on this host."""
    claim = read_claim(claim_path(shot))
    return None if claim is None or is_dead(claim) else claim.holder


def claim_path(shot: Shot) -> Path:
    """Return the path of a shot's claim, which the output names: two workers would write that, its state and
    its latent."""
    return shot.output.parent / ".wancli" / "claims" / f"{shot.output.stem}.json"


class Claims:
    """The claims of one worker. A thread touches them from the first `take()` until the block ends:

        with Claims() as claims:
            mine = claims.take(shots)
            ...
            claims.release(mine)

    The end of the block releases the claims that are still held.
    """

    def __init__(
        self,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale_looks: int = STALE_LOOKS,
        waits_for_others: bool = True,
    ) -> None:
        self._heartbeat, self._stale_looks = heartbeat, stale_looks
        self.waits_for_others = waits_for_others  # for shots claimed by other workers, when no others remain
        self._process = current_process()
        self._held: dict[Path, str] = {}  # path to the token in the file
        self._own_tokens: set[str] = set()  # of all claims that this worker ever made
        self._watched: dict[Path, _WatchedClaim] = {}  # claims of others
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()
        self._remove(list(self._held))

    def take(self, shots: Sequence[Shot]) -> list[Shot]:
        """Claim the shots that are free or stale; return them in their order.

        The caller then checks their outputs again: another worker may have finished one just now.
        Raises MachineError or NoSpace if a claim cannot be written.
        """
        if self._thread is None and shots:
            self._thread = threading.Thread(target=self._run_heartbeat, name="wancli-claims", daemon=True)
            self._thread.start()
        return [shot for shot in shots if self._take_one(claim_path(shot))]

    def require_claimable(self, folder: Path) -> None:
        """Raise MachineError or NoSpace if no claim can be written for outputs of this folder."""
        path = folder / ".wancli" / "claims" / f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp"
        self._create(path)
        self._remove([path])

    def release(self, shots: Iterable[Shot]) -> None:
        """Release those of the shots that are held."""
        self._remove([path for path in map(claim_path, shots) if path in self._held])

    def holds(self, shot: Shot) -> bool:
        """Return whether this worker still holds the shot, by what the disk says now."""
        path = claim_path(shot)
        return path in self._held and self._is_ours(path)

    def holds_all(self) -> bool:
        """Return whether no other worker has taken a shot that this one holds."""
        return all(map(self._is_ours, list(self._held)))

    def held_by_others(self, shots: Sequence[Shot]) -> dict[int, Holder]:
        """Return who holds each shot, by index, except free and stale shots and those of this worker."""
        holders = {}
        for shot in shots:
            path = claim_path(shot)
            if path not in self._held and (holder := self._find_other_holder(path)):
                holders[shot.index] = holder
        return holders

    def name_holders(self, shots: Sequence[Shot]) -> str:
        """Name the workers that hold some of the shots, for people; empty if nobody holds one any more."""
        return ", ".join(dict.fromkeys(map(str, self.held_by_others(shots).values())))

    def wait_for_release(self, shots: Sequence[Shot], stop: Stop) -> list[Shot]:
        """Wait until other workers release some of the shots, and return these; none after a stop request."""
        while not stop.requested:
            time.sleep(self._heartbeat / 5)
            held = self.held_by_others(shots)
            if len(held) < len(shots):
                return [shot for shot in shots if shot.index not in held]
        return []

    def touch_and_watch(self) -> None:
        """Touch the claims that are held, and count how long others have not touched theirs."""
        for path in list(self._held):
            if self._is_ours(path):  # else this would keep the claim of another worker alive
                with suppress(OSError):
                    os.utime(path)
        for path in list(self._watched):
            self._find_other_holder(path)

    # ---- one claim ----

    def _take_one(self, path: Path) -> bool:
        if path in self._held:
            return True
        for _ in range(3):  # another worker may be faster each time
            if self._create(path):
                with self._lock:
                    self._watched.pop(path, None)
                return True
            if self._find_other_holder(path):
                return False
            self._evict(path)
        return False

    def _create(self, path: Path) -> bool:
        """Create a claim; return False if there is one."""
        token = secrets.token_hex(8)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        body = self._process.as_dict() | {"started": started, "token": token}
        with atomic.writing(path):
            try:
                fd = create_new(path)
            except FileExistsError:
                return False
            try:
                atomic.write_all(fd, (json.dumps(body) + "\n").encode())
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(fd)
        self._held[path] = token
        self._own_tokens.add(token)
        return True

    def _is_ours(self, path: Path) -> bool:
        claim = read_claim(path)
        return claim is not None and (claim.body is None or claim.token == self._held.get(path))

    def _find_other_holder(self, path: Path) -> Holder | None:
        """Return the holder of another worker's claim, None if it is free or stale.

        Counts a look if the last counted one is a heartbeat ago.
        """
        with self._lock:
            claim = read_claim(path)
            if claim is None or self._is_free_at_once(claim):
                self._watched.pop(path, None)
                return None
            now = time.monotonic()
            watched = self._watched.get(path)
            if watched is None or watched.claim != claim:
                watched = self._watched[path] = _WatchedClaim(claim, now)
            elif now - watched.last_counted >= self._heartbeat:
                watched.looks, watched.last_counted = watched.looks + 1, now
            return None if watched.looks >= self._stale_looks else claim.holder

    def _is_free_at_once(self, claim: ClaimSnapshot) -> bool:
        """Return whether its process is dead, or it is an own claim that could not be removed."""
        return is_dead(claim) or (
            claim.token in self._own_tokens and claim.token not in list(self._held.values())
        )

    def _evict(self, path: Path) -> None:
        """Move a stale claim away.

        Of several workers that do so at once, one creates the next claim. A worker that has moved away the
        claim that another just created puts it back.
        """
        with self._lock:
            watched = self._watched.pop(path, None)
        atomic.remove_stale_temp_files(path.parent)
        # a name that `remove_stale_temp_files` knows
        tombstone = path.with_name(f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp")
        try:
            path.rename(tombstone)
        except FileNotFoundError:
            return
        except OSError as error:
            raise atomic.translate(error, path) from error
        claim = read_claim(tombstone)
        if claim is None or not (self._is_free_at_once(claim) or (watched and watched.claim == claim)):
            with suppress(OSError):  # a third worker was faster; the second will find out
                os.link(tombstone, path)
        with suppress(OSError):
            tombstone.unlink()

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            is_ours = self._is_ours(path)
            del self._held[path]
            with suppress(OSError):  # a claim that cannot be removed now becomes stale
                if is_ours:
                    path.unlink()
                path.parent.rmdir()  # the last worker leaves the folder as it was
                path.parent.parent.rmdir()

    def _run_heartbeat(self) -> None:
        while not self._end.wait(self._heartbeat):
            self.touch_and_watch()
