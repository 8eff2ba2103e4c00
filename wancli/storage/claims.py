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
from wancli.storage.claim_file import Holder, Seen, gone, look, new, process

if TYPE_CHECKING:
    from wancli.plan.shot import Shot
    from wancli.signals import Stop

BEAT = 5.0  # seconds
STALE = 12  # looks without a touch: a minute


@dataclass
class _Watch:
    """What was seen when it last changed, and how often it was the same since."""

    seen: Seen
    counted: float  # monotonic seconds
    looks: int = 0


def holder(shot: Shot) -> Holder | None:
    """Who holds a shot, as far as one look tells; None where nobody does, or where it died on this host."""
    seen = look(claim_path(shot))
    return None if seen is None or gone(seen) else seen.holder


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

    def __init__(self, beat: float = BEAT, stale: int = STALE, waits: bool = True) -> None:
        self._beat, self._stale = beat, stale
        self.waits = waits  # for shots of others, when nothing else is left
        self._me = process()
        self._held: dict[Path, str] = {}  # path to the token in the file
        self._made: set[str] = set()  # every token of ours
        self._watched: dict[Path, _Watch] = {}  # claims of others
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()
        self._drop(list(self._held))

    def take(self, shots: Sequence[Shot]) -> list[Shot]:
        """Claims the shots that are free or stale; returns those, in their order. The caller looks again what
        is left to do of them: another worker may have ended one just now.

        Raises MachineError or NoSpace where no claim can be written.
        """
        if self._thread is None and shots:
            self._thread = threading.Thread(target=self._beats, name="wancli-claims", daemon=True)
            self._thread.start()
        return [shot for shot in shots if self._take(claim_path(shot))]

    def possible(self, folder: Path) -> None:
        """Raises MachineError or NoSpace where no claim on an output of this folder can be written."""
        path = folder / ".wancli" / "claims" / f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp"
        self._create(path)
        self._drop([path])

    def release(self, shots: Iterable[Shot]) -> None:
        """Gives up those of the shots that are held."""
        self._drop([path for path in map(claim_path, shots) if path in self._held])

    def holds(self, shot: Shot) -> bool:
        """Whether the shot is still ours, by what the disk says now."""
        path = claim_path(shot)
        return path in self._held and self._is_ours(path)

    def intact(self) -> bool:
        """Whether nothing that was taken and not released has gone to another worker."""
        return all(map(self._is_ours, list(self._held)))

    def others(self, shots: Sequence[Shot]) -> dict[int, Holder]:
        """The shots that other workers hold, by index. Free and stale ones are not among them."""
        found = {}
        for shot in shots:
            path = claim_path(shot)
            if path not in self._held and (who := self._other(path)):
                found[shot.index] = who
        return found

    def names(self, shots: Sequence[Shot]) -> str:
        """The workers that hold some of the shots, for people; empty where nobody does any more."""
        return ", ".join(dict.fromkeys(map(str, self.others(shots).values())))

    def wait(self, shots: Sequence[Shot], stop: Stop) -> list[Shot]:
        """Waits until other workers give up some of the shots, and returns these; none where somebody asked
        for an end."""
        while not stop.requested:
            time.sleep(self._beat / 5)
            held = self.others(shots)
            if len(held) < len(shots):
                return [shot for shot in shots if shot.index not in held]
        return []

    def beat(self) -> None:
        """Touches what is held, and counts how long others have not touched what they hold."""
        for path in list(self._held):
            if self._is_ours(path):  # else it would be the thief's that stays alive
                with suppress(OSError):
                    os.utime(path)
        for path in list(self._watched):
            self._other(path)

    # ---- one claim ----

    def _take(self, path: Path) -> bool:
        if path in self._held:
            return True
        for _ in range(3):  # each time another may be faster
            if self._create(path):
                with self._lock:
                    self._watched.pop(path, None)
                return True
            if self._other(path):
                return False
            self._bury(path)
        return False

    def _create(self, path: Path) -> bool:
        """False where there is a claim."""
        token = secrets.token_hex(8)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        body = self._me.as_dict() | {"started": started, "token": token}
        with atomic.writing(path):
            try:
                fd = new(path)
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
        self._made.add(token)
        return True

    def _is_ours(self, path: Path) -> bool:
        seen = look(path)
        return seen is not None and (seen.body is None or seen.token == self._held.get(path))

    def _other(self, path: Path) -> Holder | None:
        """Who holds a claim that is not ours; None where it is free or stale. Counts a look where the last
        one that counted is a beat ago."""
        with self._lock:
            seen = look(path)
            if seen is None or self._is_dead(seen):
                self._watched.pop(path, None)
                return None
            now = time.monotonic()
            watch = self._watched.get(path)
            if watch is None or watch.seen != seen:
                watch = self._watched[path] = _Watch(seen, now)
            elif now - watch.counted >= self._beat:
                watch.looks, watch.counted = watch.looks + 1, now
            return None if watch.looks >= self._stale else seen.holder

    def _is_dead(self, seen: Seen) -> bool:
        """Whether a claim may be taken at once; also one of ours that could not be removed."""
        return gone(seen) or (seen.token in self._made and seen.token not in list(self._held.values()))

    def _bury(self, path: Path) -> None:
        """Moves a stale claim away. Of several workers that do so at once one creates the next claim; one
        that finds it has moved away what another just created puts it back."""
        with self._lock:
            watch = self._watched.pop(path, None)
        atomic.sweep(path.parent)
        grave = path.with_name(f".wancli-{os.getpid()}-{secrets.token_hex(6)}.tmp")  # `sweep` knows the name
        try:
            path.rename(grave)
        except FileNotFoundError:
            return
        except OSError as error:
            raise atomic.translate(error, path) from error
        seen = look(grave)
        if seen is None or not (self._is_dead(seen) or (watch and watch.seen == seen)):
            with suppress(OSError):  # a third worker was faster; the second will find out
                os.link(grave, path)
        with suppress(OSError):
            grave.unlink()

    def _drop(self, paths: Iterable[Path]) -> None:
        for path in paths:
            ours = self._is_ours(path)
            del self._held[path]
            with suppress(OSError):  # who cannot remove it now is gone later
                if ours:
                    path.unlink()
                path.parent.rmdir()  # the last worker leaves the folder as it was
                path.parent.parent.rmdir()

    def _beats(self) -> None:
        while not self._end.wait(self._beat):
            self.beat()
