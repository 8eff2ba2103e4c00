"""An ffmpeg that misbehaves in a whole render: no video, the latents stay, and the next run only decodes."""

from __future__ import annotations

import imageio_ffmpeg
import pytest
from batch import SHOTS, Rig

FAULTS = {
    "fails after some frames": "head -c 3000 > /dev/null; echo 'it broke' >&2; exit 1",
    "closes its input": "exec 0<&-; sleep 0.2; exit 1",
    "writes nothing": "cat > /dev/null; exit 0",
    "says all is well of an empty file": """cat > /dev/null; for last; do :; done
        case "$last" in file:*) : > "${last#file:}";; esac; exit 0""",
    "is killed": "head -c 3000 > /dev/null; kill -9 $$",
    "ends at once": "exit 0",
    "meets a full disk": "cat > /dev/null; echo 'No space left on device' >&2; exit 228",
}


@pytest.mark.parametrize("script", FAULTS.values(), ids=FAULTS)
def test_a_bad_ffmpeg_costs_the_video_and_nothing_else(rig: Rig, script: str) -> None:
    rig.reset()
    ffmpeg = rig.folder / "quick-ffmpeg"
    good, real = ffmpeg.read_text(), imageio_ffmpeg.get_ffmpeg_exe()
    questions = f'case "$*" in *-version*|*-encoders*) exec {real} "$@";; esac'
    ffmpeg.write_text(f"#!/bin/sh\n{questions}\n{script}\n")
    try:
        ran = rig.run()
    finally:
        ffmpeg.write_text(good)
    assert ran.code in (1, 3), ran.err
    assert rig.promises(ran) == []
    assert rig.torn() == []
    assert not list(rig.out.glob("*.mp4"))
    assert not list(rig.home.rglob(".wancli-*"))
    assert any(rig.latent(name).exists() for name in SHOTS)
    assert rig.resumes() == []
