"""Videos of plain colours."""

from __future__ import annotations

from pathlib import Path

from wancli.video import mp4


def plain_video(path: Path, colours: list[tuple[int, int, int]], width: int = 64, height: int = 48) -> Path:
    """An MP4 of plain frames."""
    frames = [bytes(colour) * (width * height) for colour in colours]
    size = {"width": width, "height": height, "fps": 8, "frame_count": len(frames)}
    return mp4.write_mp4(frames, path, **size, crf=1, codec="h264", comment="")
