"""Which worker renders which shot, where several of them share an output folder, on one host or on many.

A claim is the file .wancli/claims/NAME.json beside the output NAME.mp4. Who creates it (O_EXCL) renders the
shot, touches the file every beat, and removes it at the end. A claim is stale, and anybody's to take, at
once when its process is known to be gone: one of this host, since its start; else when nothing has touched
it for so many looks, a beat apart each, as we count them. No clocks of two hosts are compared, and a file
system that hangs makes nobody stale: looks wait as long as touches do.

A claim saves work, it protects no file: what is written is safe by `wancli.storage.atomic` whoever writes it.
So claims need neither fsync nor locks, and a network file system that shows one late costs a wait. Whoever
was suspended for so long that its claim went to another finds that out by `intact()` or `holds()`, and leaves
the shot to it.
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
STALE_LOOKS = 12  # looks without a touch: a minute


@dataclass
class _WatchedClaim:
    """What was seen when it last changed, and how often it was the same since."""

    claim: ClaimSnapshot
    last_counted: float  # monotonic seconds
    looks: int = 0


def find_holder(shot: Shot) -> Holder | None:
    """Who holds a shot, as far as one look tells; None where nobody does, or where it died on this host."""
    claim = read_claim(claim_path(shot))
    return None if claim is None or is_dead(claim) else claim.holder


def claim_path(shot: Shot) -> Path:
    """By the name of the output, which is what two workers would both write, its state and its latent too."""
    return shot.output.parent / ".wancli" / "claims" / f"{shot.output.stem}.json"


class Claims:
    """The claims of one worker. A thread beats from the first `take()` until the block ends:

        with Claims() as claims:
            mine = claims.take(shots)
            ...
            claims.release(mine)

    What is still held at the end is released.
    """

    def __init__(
        self,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale_looks: int = STALE_LOOKS,
        waits_for_others: bool = True,
    ) -> None:
        self._heartbeat, self._stale_looks = heartbeat, stale_looks
        self.waits_for_others = waits_for_others  # for shots of others, when nothing else is left
        self._process = current_process()
        self._held: dict[Path, str] = {}  # path to the token in the file
        self._own_tokens: set[str] = set()  # every token of ours
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
        """Claims the shots that are free or stale; returns those, in their order. The caller looks again what
        is left to do of them: another worker may have ended one just now.

        Raises MachineError or NoSpace where no claim can be written.
        """
        if self._thread is None and shots:
            self._thread = threading.Thread(target=self._run_heartbeat, name="wancli-claims", daemon=True)
            self._thread.start()
        return [shot for shot in shots if self._take_one(claim_path(shot))]

    def require_claimable(self, folder: Path) -> None:
        """Raises MachineError or NoSpace where no claim on an output of this folder can be written."""
        path = folder / ".wancli" / "claims" / f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp"
        self._create(path)
        self._remove([path])

    def release(self, shots: Iterable[Shot]) -> None:
        """Gives up those of the shots that are held."""
        self._remove([path for path in map(claim_path, shots) if path in self._held])

    def holds(self, shot: Shot) -> bool:
        """Whether the shot is still ours, by what the disk says now."""
        path = claim_path(shot)
        return path in self._held and self._is_ours(path)

    def holds_all(self) -> bool:
        """Whether nothing that was taken and not released has gone to another worker."""
        return all(map(self._is_ours, list(self._held)))

    def held_by_others(self, shots: Sequence[Shot]) -> dict[int, Holder]:
        """The shots that other workers hold, by index. Free and stale ones are not among them."""
        holders = {}
        for shot in shots:
            path = claim_path(shot)
            if path not in self._held and (holder := self._find_other_holder(path)):
                holders[shot.index] = holder
        return holders

    def name_holders(self, shots: Sequence[Shot]) -> str:
        """The workers that hold some of the shots, for people; empty where nobody does any more."""
        return ", ".join(dict.fromkeys(map(str, self.held_by_others(shots).values())))

    def wait_for_release(self, shots: Sequence[Shot], stop: Stop) -> list[Shot]:
        """Waits until other workers give up some of the shots, and returns these; none where somebody asked
        for an end."""
        while not stop.requested:
            time.sleep(self._heartbeat / 5)
            held = self.held_by_others(shots)
            if len(held) < len(shots):
                return [shot for shot in shots if shot.index not in held]
        return []

    def touch_and_watch(self) -> None:
        """Touches what is held, and counts how long others have not touched what they hold."""
        for path in list(self._held):
            if self._is_ours(path):  # else it would be the thief's that stays alive
                with suppress(OSError):
                    os.utime(path)
        for path in list(self._watched):
            self._find_other_holder(path)

    # ---- one claim ----

    def _take_one(self, path: Path) -> bool:
        if path in self._held:
            return True
        for _ in range(3):  # each time another may be faster
            if self._create(path):
                with self._lock:
                    self._watched.pop(path, None)
                return True
            if self._find_other_holder(path):
                return False
            self._evict(path)
        return False

    def _create(self, path: Path) -> bool:
        """False where there is a claim."""
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
        """Who holds a claim that is not ours; None where it is free or stale. Counts a look where the last
        one that counted is a beat ago."""
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
        """Whether a claim may be taken at once; also one of ours that could not be removed."""
        return is_dead(claim) or (
            claim.token in self._own_tokens and claim.token not in list(self._held.values())
        )

    def _evict(self, path: Path) -> None:
        """Moves a stale claim away. Of several workers that do so at once one creates the next claim; one
        that finds it has moved away what another just created puts it back."""
        with self._lock:
            watched = self._watched.pop(path, None)
        atomic.remove_stale_temp_files(path.parent)
        tombstone = path.with_name(
            f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp"
        )  # `sweep` knows the name
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
            with suppress(OSError):  # who cannot remove it now is gone later
                if is_ours:
                    path.unlink()
                path.parent.rmdir()  # the last worker leaves the folder as it was
                path.parent.parent.rmdir()

    def _run_heartbeat(self) -> None:
        while not self._end.wait(self._heartbeat):
            self.touch_and_watch()
