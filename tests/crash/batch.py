"""A small real batch that is run again and again under faults, and what must hold after each run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import forked
import imageio_ffmpeg
import torch
from disk_state import disk_state
from jobs import tiny_job, write_job
from shim import Ask, Fault

from wancli.errors import EntryError
from wancli.sampling import state_file
from wancli.storage import manifest, tensor_file
from wancli.storage.cache import Store

LONG = bool(os.environ.get("WANCLI_CRASH_LONG"))  # `make crash-long`: the counts of a release
HERE = Path(__file__).parent
SHOTS = ("a", "b")
KEPT = ("a",)  # whose latent stays
_NAMES = re.compile(r"^[ab](\.old-\d+)?\.(mp4|manifest\.json|(latents|state)(\.old-\d+)?\.safetensors)$")


def job(model: Path, **changes: Any) -> dict[str, Any]:
    """Two shots of one frame and two steps; the state is saved after each, and one keeps its latent."""
    items = [{"id": name, "seed": ord(name), "video": {"keep_latents": name in KEPT}} for name in SHOTS]
    return tiny_job(model, output="out/{id}.mp4", items=items, save_every=1, **changes)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder where writing costs nothing, if there is such a place."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="wancli-crash-", dir=place) as folder:
        yield Path(folder)


class RunResult(NamedTuple):
    code: int  # negative: the signal that ended it
    out: str
    err: str
    log: list[dict[str, Any]]

    @property
    def told(self) -> list[Path]:
        """The videos that it said were done."""
        return [Path(line["told"]) for line in self.log if "told" in line]

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [line for line in self.log if "number" in line]

    @property
    def strays(self) -> list[dict[str, Any]]:
        return [line for line in self.log if "stray" in line]


class Rig:
    """The batch in a folder of its own, run in forked children of a zygote."""

    def __init__(
        self, folder: Path, model: Path, *, quick: bool = True, talk: Path | None = None, **changes: Any
    ) -> None:
        self.folder, self.home, self.model = talk or folder, folder / "home", model
        self.out, self.cache = self.home / "out", self.home / "cache"
        self.job = write_job(self.home, job(model, **changes))
        self.arguments = ["render", str(self.job), "-q"]
        self.environment = os.environ | {
            "IMAGEIO_FFMPEG_EXE": str(_quick_ffmpeg(self.folder))
            if quick
            else imageio_ffmpeg.get_ffmpeg_exe(),
            "WANCLI_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
        }
        read, write = os.pipe()
        self._trials = os.fdopen(write, "w")
        self._zygote = forked.start(
            json.dumps([self.arguments]),
            program=(HERE / "zygote.py").read_text(),
            env=self.environment,
            stdin=read,
            stderr=2,
        )
        os.close(read)
        assert self._answer() == "ready", "the rig does not run"
        self.wanted = {name: hashlib.sha256((self.out / f"{name}.mp4").read_bytes()) for name in SHOTS}
        self.latents = {
            name: tensor_file.load_latent(self.out / f"{name}.latents.safetensors")[0] for name in KEPT
        }
        self.recoveries: dict[str, list[str]] = {}  # what was wrong after resuming from a state of the disk
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._zygote.stdout
        self._trials.close()
        self._zygote.wait()
        self._zygote.stdout.close()

    def _answer(self) -> Any:
        assert self._zygote.stdout
        return json.loads(self._zygote.stdout.readline() or '"died"')

    def reset(self) -> None:
        """As if nothing had ever run here."""
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)

    def run(
        self,
        *faults: Fault,
        blobs: Path | None = None,
        options: Sequence[str] = (),
        watched: bool = True,
        beat: float | None = None,
        asks: Sequence[Ask] | None = None,
        command: Sequence[str] = (),
    ) -> RunResult:
        """The batch, or another command, on a disk that fails so; on the real one if it is not watched.

        `beat`: seconds between two touches of a claim, of which a torn one wants twelve without any."""
        self.start(
            *faults, blobs=blobs, options=options, watched=watched, beat=beat, asks=asks, command=command
        )
        return self.ended()

    def start(
        self,
        *faults: Fault,
        blobs: Path | None = None,
        options: Sequence[str] = (),
        watched: bool = True,
        beat: float | None = None,
        asks: Sequence[Ask] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        """`run` without waiting for its end."""
        out, err, log = (self.folder / name for name in ("said.txt", "complained.txt", "log.txt"))
        log.write_bytes(b"")
        trial = {
            "arguments": [*(command or self.arguments), *options],
            "watched": [str(self.home), str(self.model)] if watched else [],
            "asks": asks,
            "faults": faults,
            "log": str(log),
            "blobs": blobs and str(blobs),
            "out": str(out),
            "err": str(err),
            "beat": beat,
        }
        self._trials.write(json.dumps(trial) + "\n")
        self._trials.flush()

    def child(self) -> int:
        """The process of the run that was started."""
        while True:
            tasks = Path(f"/proc/{self._zygote.pid}/task/{self._zygote.pid}/children").read_text().split()
            if tasks:
                return int(tasks[0])

    def signal(self, child: int, number: int) -> None:
        """Sent to the run alone, if there still is one."""
        with suppress(ProcessLookupError):
            os.kill(child, number)

    def is_running(self, child: int) -> bool:
        """Whether it has not ended."""
        return Path(f"/proc/{child}").exists()

    def ended(self) -> RunResult:
        """What the run that was started came to."""
        code = self._answer()
        out, err, log = (
            (self.folder / name).read_text() for name in ("said.txt", "complained.txt", "log.txt")
        )
        return RunResult(code, out, err, [json.loads(line) for line in log.splitlines()])

    # ---- what must hold ----

    def trial(self, *faults: Fault, options: Sequence[str] = ()) -> list[str]:
        """What is wrong after a run with these faults and after the next without any; nothing should be."""
        ran = self.run(*faults, options=options)
        wrong = [*self.promises(ran), *self.torn()]
        removals = {call["number"] for call in ran.calls if call["kind"] in ("unlink", "remove")}
        if ran.code >= 0 and not any(fault.at in removals for fault in faults):
            wrong += [f"{path.name} stayed" for path in self.home.rglob(".wancli-*")]
        wrong += self._resumes_from_here()
        return [f"{' then '.join(f'{f.kind} at {f.at}' for f in faults)}: {one}" for one in wrong]

    def _resumes_from_here(self) -> list[str]:
        """`resumes`, tried once for each state of the disk.

        A recovery depends on what is on the disk alone, so faults that leave the same state share one.
        `make crash-long` tries every one, and so checks that.
        """
        if LONG:
            return self.resumes()
        state = disk_state(self.home)
        if state not in self.recoveries:
            self.recoveries[state] = self.resumes()
        return self.recoveries[state]

    def promises(self, ran: RunResult) -> list[str]:
        """Exit code and messages against what is on disk."""
        wrong = []
        if ran.code not in (0, 1, 3, -signal.SIGKILL):
            wrong.append(f"exit code {ran.code}: {ran.err}")
        if "Traceback" in ran.err or "a bug in wancli" in ran.err:
            wrong.append(f"a traceback: {ran.err}")
        if ran.code > 0 and not re.search("^wancli: ", ran.err, re.M):
            wrong.append(f"exit code {ran.code} without a word")
        if ran.code == 0 and not all(self.is_done(name) for name in SHOTS):
            wrong.append("exit code 0, and not all is done")
        wrong += [
            f"{path.name} was told, and is not done" for path in ran.told if not self.is_done(path.stem)
        ]
        wrong += [f"a stray {line['stray']} of {line['path']}" for line in ran.strays]
        return wrong

    def is_done(self, name: str, home: Path | None = None) -> bool:
        """Whether the manifest of a shot verifies: in this folder, or in a copy of it."""
        output = (home or self.home) / "out" / f"{name}.mp4"
        try:
            body = manifest.read_json(manifest.manifest_path(output))
        except EntryError:
            return False
        return body is not None and manifest.is_done(output, body["key"])

    def torn(self, home: Path | None = None) -> list[str]:
        """Files under final names that are not what they should be."""
        home = home or self.home
        wrong = []
        for path in sorted((home / "out").glob("*")):
            if path.name == ".wancli" or path.name.startswith(".wancli-"):  # claims, and debris
                continue
            if path.name == "job.report.json":
                json.loads(path.read_bytes())
            elif path.name == "job.report.html":
                if not path.read_text().rstrip().endswith("</html>"):
                    wrong.append(f"{path.name} is torn")
            elif not _NAMES.match(path.name):
                wrong.append(f"what is {path.name}?")
            elif ".old-" not in path.name and not self._is_right(path, home):
                wrong.append(f"{path.name} is torn or wrong")
        wrong += [f"{entry.path.name} is torn" for entry in Store(home / "cache/embeddings").verify()]
        for path in (home / "cache").glob("*.json"):
            json.loads(path.read_bytes())
        return wrong

    def _is_right(self, path: Path, home: Path) -> bool:
        name, _, kind = path.name.partition(".")
        try:
            if kind == "mp4":
                return hashlib.sha256(path.read_bytes()).digest() == self.wanted[name].digest()
            if kind == "manifest.json":
                return self.is_done(name, home)
            if kind == "state.safetensors":
                return state_file.load_state(path)[1]["step"] > 0
            z_CTYX, _ = tensor_file.load_latent(path)
        except EntryError:
            return False
        return name not in KEPT or torch.equal(z_CTYX, self.latents[name])

    def resumes(self) -> list[str]:
        """What is wrong after the same command once more, without faults."""
        finished = [name for name in SHOTS if self.is_done(name)]
        kept = [self.out / f"{name}.mp4" for name in finished]
        kept += [path for name in KEPT if (path := self.out / f"{name}.latents.safetensors").exists()]
        before = {path: _identity(path) for path in kept}
        ran = self.run(beat=0.05)
        wrong = [*self.promises(ran), *self.torn()]
        if ran.code != 0:
            wrong.append(f"resume ended with {ran.code}: {ran.err}")
        wrong += [f"no {name}.mp4" for name in SHOTS if not (self.out / f"{name}.mp4").exists()]
        wrong += [f"{path.name} was made again" for path in kept if before[path] != _identity(path)]
        wrong += [f"no {name}.latents.safetensors" for name in KEPT if not self.latent(name).exists()]
        return [f"resume: {one}" for one in wrong]

    def latent(self, name: str) -> Path:
        return self.out / f"{name}.latents.safetensors"


def _quick_ffmpeg(folder: Path) -> Path:
    """A program that keeps one raw frame for ffmpeg: other tests of the rig have the real one."""
    path = folder / "quick-ffmpeg"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-version*|*-encoders*) exec {real} "$@";;\n'
        '*framecrc*) for last; do case "$last" in\n'
        'file:*) test -s "${last#file:}" && echo one frame;; esac; done;;\n'
        '*) for last; do :; done; exec cat > "${last#file:}";;\nesac\n'
    )
    path.chmod(0o755)
    return path


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
