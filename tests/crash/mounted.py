"""Real power cuts on a real file system, as root: `make crash-mounts`, 30 of them.

A batch runs on an ext4 in a file that is mounted through a loop device; in the middle of it the file is
copied, which is what a power cut would leave, and the copy mounted. What the batch had said was done must
verify there.
With fsync taken away the same cuts must lose something, or the rig proves nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
sys.path.append(str(Path(__file__).parents[2]))

from batch import Rig
from jobs import TINY

CUTS = int(os.environ.get("WANCLI_CUTS", "30"))


def sh(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def cut(folder: Path, rig: Rig, draw: random.Random, *, syncs: bool) -> tuple[int, list[str]]:
    """One run and one cut: how many shots had been told, and what was wrong on the copy."""
    rig.reset()
    os.sync()
    rig.start(watched=not syncs)  # the shim's fsync does not reach the disk
    child, said = rig.child(), folder / "said.txt"
    if draw.random() < 0.8:
        while rig.is_running(child) and not said.read_text():
            time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.3))
    rig.signal(child, signal.SIGSTOP)
    told = [Path(line).stem for line in said.read_text().split()]
    shutil.copyfile(folder / "disk.img", folder / "cut.img")
    rig.signal(child, signal.SIGKILL)
    rig.ended()
    (folder / "cut").mkdir(exist_ok=True)
    sh("mount", "-o", "loop", folder / "cut.img", folder / "cut")
    try:
        home = folder / "cut" / "home"
        wrong = rig.torn(home) if syncs else []
        wrong += [f"{name} was told, and is lost" for name in told if not rig.is_done(name, home)]
    finally:
        sh("umount", folder / "cut")
    return len(told), wrong


def main() -> int:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="wancli-cuts-") as name:
        folder = Path(name)
        sh("truncate", "-s", "64M", folder / "disk.img")
        sh("mkfs.ext4", "-q", folder / "disk.img")
        (folder / "mnt").mkdir()
        sh("mount", "-o", "loop", folder / "disk.img", folder / "mnt")
        try:
            with Rig(folder / "mnt", TINY, talk=folder) as rig:
                results = [cut(folder, rig, draw, syncs=True) for _ in range(CUTS)]
                control = [cut(folder, rig, draw, syncs=False) for _ in range(max(5, CUTS // 3))]
        finally:
            sh("umount", folder / "mnt")
    wrong = [one for _, found in results for one in found]
    print(f"{CUTS} power cuts, {sum(told for told, _ in results)} shots told done: {len(wrong)} losses")
    lost, told = sum(len(found) for _, found in control), sum(told for told, _ in control)
    print(f"without fsync: {lost} of {told} lost")
    print("\n".join(wrong))
    return int(bool(wrong) or not lost or not any(told for told, _ in results))


if __name__ == "__main__":
    sys.exit(main())
