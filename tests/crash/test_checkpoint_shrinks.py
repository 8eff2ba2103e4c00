"""A checkpoint that is cut while it is mapped: an error, or SIGBUS of the kernel, and no file is lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

from batch import Rig, in_memory
from jobs import TRANSFORMER


def test_weights_that_are_cut_under_a_run_cost_that_run_alone(one_block: Path, tmp_path: Path) -> None:
    model = shutil.copytree(one_block, tmp_path / "model")
    with in_memory() as folder, Rig(folder, model, sampler={"steps": 20}) as rig:
        rig.start(watched=False)
        while not list(rig.out.glob("*.state.safetensors")):
            time.sleep(0.001)
        weights = model / TRANSFORMER
        whole = weights.read_bytes()
        with weights.open("r+b") as file:
            file.truncate(4096)
        ran = rig.ended()
        assert ran.code in (0, 1, 4, -signal.SIGBUS), ran.err
        assert "Traceback" not in ran.err
        assert rig.torn() == []
        for path in rig.cache.glob("hashes.json"):
            assert json.loads(path.read_bytes())
        ran = rig.run()
        if not all(rig.is_done(name) for name in "ab"):
            assert ran.code == 4
            assert f"{weights}: truncated or damaged" in ran.err
        weights.write_bytes(whole)
        assert rig.resumes() == []
