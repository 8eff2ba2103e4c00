from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from wancli.errors import FfmpegError, NoSpace, OutputExists
from wancli.units import parse_frame_rate
from wancli.video import ffmpeg, mp4

WIDTH, HEIGHT = 64, 48
FRAME = WIDTH * HEIGHT * 3
REAL = imageio_ffmpeg.get_ffmpeg_exe()
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 100, 50)]
COLOURS += [(20, 60, 120)]


def picture(*, shift: int = 0) -> np.ndarray:
    """Eight upright bars of colour, moved to the right."""
    bars = np.repeat(np.array(COLOURS, np.uint8), WIDTH // 8, axis=0)
    return np.roll(np.broadcast_to(bars, (HEIGHT, WIDTH, 3)), shift, axis=1).copy()


def moving(count: int) -> list[bytes]:
    return [picture(shift=i).tobytes() for i in range(count)]


def render(
    final: Path,
    frames: list[bytes],
    *,
    frame_count: int | None = None,
    codec: str = "h264",
    fps: int | str = 16,
) -> Path:
    return mp4.write_mp4(
        iter(frames),
        final,
        width=WIDTH,
        height=HEIGHT,
        fps=fps,
        frame_count=len(frames) if frame_count is None else frame_count,
        crf=10,
        codec=codec,
        comment="shot 1 0123abcd",
    )


def described(path: Path) -> str:
    """What ffmpeg itself says about a file."""
    return subprocess.run(
        [REAL, "-hide_banner", "-i", path], capture_output=True, text=True, check=False
    ).stderr


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Puts a shell script in the place of ffmpeg; in it, $REAL is the true one."""

    def install(script: str) -> Path:
        path = tmp_path / "fake-ffmpeg"
        path.write_text(f"#!/bin/sh\nREAL='{REAL}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        return path

    return install


def assert_nothing_left(folder: Path) -> None:
    assert not list(folder.glob("*.mp4"))
    assert not list(folder.glob(".wancli-*"))


# ---- the file ----


@pytest.mark.parametrize("codec", ["h264", "h265"])
@pytest.mark.parametrize("count", [1, 9])
def test_a_video_has_exactly_the_frames_that_were_sent(tmp_path, codec, count):
    path = render(tmp_path / "new" / "a.mp4", moving(count), codec=codec)
    assert mp4.count_frames(path) == count
    frames = list(mp4.read_frames(path))
    assert [(f.width, f.height, len(f.rgb)) for f in frames] == [(WIDTH, HEIGHT, FRAME)] * count
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_colours_come_back_as_they_were_sent(tmp_path, codec):
    path = render(tmp_path / "a.mp4", [picture().tobytes()] * 3, codec=codec)
    for frame in mp4.read_frames(path):
        seen = np.frombuffer(frame.rgb, np.uint8).reshape(HEIGHT, WIDTH, 3)
        for i, colour in enumerate(COLOURS):
            assert np.abs(seen[HEIGHT // 2, 8 * i + 4].astype(int) - colour).max() <= 3


@pytest.mark.parametrize(
    ("pixels", "encoder"),
    [("yuv420p10le", "libx265"), ("yuv444p", "libx264"), ("yuv444p10le", "libx264"), ("gray", "libx264")],
)
def test_frames_of_any_depth_and_layout_are_read(tmp_path: Path, pixels: str, encoder: str) -> None:
    shades = [(200, 200, 200), (10, 10, 10), (90, 90, 90)]
    raw = b"".join(bytes(shade) * (64 * 48) for shade in shades)
    path = tmp_path / "deep.mp4"
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-video_size",
        "64x48",
        "-framerate",
        "8",
        "-i",
        "pipe:0",
    ]
    coded = ["-pix_fmt", pixels, "-c:v", encoder, "-crf", "1", str(path)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, *coded]
    subprocess.run(command, input=raw, check=True, capture_output=True)
    frames = [np.frombuffer(frame.rgb, np.uint8) for frame in mp4.read_frames(path)]
    assert [frame.size for frame in frames] == [64 * 48 * 3] * len(shades)
    for frame, shade in zip(frames, shades):
        assert np.abs(frame.astype(int) - shade[0]).max() <= 3


def test_the_samples_in_the_file_are_bt709_in_limited_range(tmp_path):
    path = render(tmp_path / "a.mp4", [picture().tobytes()] * 3)
    command = [
        REAL,
        "-v",
        "error",
        "-i",
        path,
        "-frames:v",
        "1",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "yuv420p",
        "-",
    ]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    luma = raw[: WIDTH * HEIGHT].reshape(HEIGHT, WIDTH)
    blue = raw[WIDTH * HEIGHT :][: WIDTH * HEIGHT // 4].reshape(HEIGHT // 2, WIDTH // 2)
    for i, (r, g, b) in enumerate(COLOURS):
        y = 0.2126 * r + 0.7152 * g + 0.0722 * b  # Rec. ITU-R BT.709-6, items 3.2 to 3.4
        assert abs(luma[24, 8 * i + 4] - (16 + 219 * y / 255)) <= 2
        assert abs(blue[12, 4 * i + 2] - (128 + 224 * (b - y) / 1.8556 / 255)) <= 2


@pytest.mark.parametrize(("codec", "name"), [("h264", "h264 (High) (avc1"), ("h265", "hevc (Main) (hvc1")])
def test_the_file_has_the_tags_of_codec_colours_and_speed(tmp_path, codec, name):
    said = described(render(tmp_path / "a.mp4", moving(5), codec=codec))
    assert name in said
    assert re.search(r"yuv420p\(tv, bt709(/bt709/bt709)?, progressive\)", said)
    assert "16 fps" in said
    assert re.search(r"comment +: shot 1 0123abcd\n", said)


def test_a_video_can_start_to_play_before_it_is_complete(tmp_path):
    data = render(tmp_path / "a.mp4", moving(5)).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_the_same_frames_make_the_same_bytes_on_any_number_of_cores(tmp_path, codec):
    cores = os.sched_getaffinity(0)
    one = render(tmp_path / "one.mp4", moving(20), codec=codec).read_bytes()
    os.sched_setaffinity(0, {min(cores)})
    try:
        two = render(tmp_path / "two.mp4", moving(20), codec=codec).read_bytes()
    finally:
        os.sched_setaffinity(0, cores)
    assert one == two


@pytest.mark.parametrize(
    "name", ["-y.mp4", "a:b.mp4", "http:x.mp4", "concat:a|b.mp4", "猫 'q\" %d.mp4", "x.avi"]
)
def test_no_name_is_taken_for_an_option_or_a_protocol(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    render(Path(name), moving(2))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert mp4.count_frames(Path(name)) == 2


def test_another_video_is_never_overwritten(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        render(tmp_path / "a.mp4", moving(2))
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    assert not list(tmp_path.glob(".wancli-*"))


def test_a_rerun_with_the_same_frames_finds_its_own_video(tmp_path):
    before = render(tmp_path / "a.mp4", moving(2)).stat().st_ino
    assert render(tmp_path / "a.mp4", moving(2)).stat().st_ino == before


def box(data: bytes, *path: bytes) -> bytes:
    """The content of a box of an MP4, ISO/IEC 14496-12; every name is that of the first such box."""
    for name in path:
        at = 0
        while data[at + 4 : at + 8] != name:
            at += int.from_bytes(data[at : at + 4])
        data = data[at + 8 : at + int.from_bytes(data[at : at + 4])]
    return data


@pytest.mark.parametrize(
    ("codec", "said"),
    [("h264", said) for said in (1, 16, 240, 23.976, 29.97, 59.94, 12.5, "24000/1001", 12.345)]
    + [("h265", 23.976), ("h265", 12.345)],
)
def test_the_file_has_exactly_the_frame_rate_of_the_job(tmp_path, codec, said):
    fps, count = parse_frame_rate(said), 6
    path = render(tmp_path / "a.mp4", moving(count), codec=codec, fps=fps)
    media = box(path.read_bytes(), b"moov", b"trak", b"mdia")
    ticks, duration = struct.unpack(">II", box(media, b"mdhd")[12:20])  # after version and two times
    entries = struct.unpack(">III", box(media, b"minf", b"stbl", b"stts")[4:16])
    assert entries[:2] == (1, count)  # every frame is shown as long as the others
    assert Fraction(ticks, entries[2]) == Fraction(fps)
    assert Fraction(duration, ticks) == count / Fraction(fps)
    assert mp4.read_info(path) == (count, Fraction(fps), WIDTH, HEIGHT)


# ---- what can go wrong ----


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: ld.so: object '/opt/site/libprofile.so' from LD_PRELOAD cannot be preloaded: ignored.",
        "libgomp: Invalid value for environment variable OMP_NUM_THREADS: ",
        "bash: warning: setlocale: LC_ALL: cannot change locale (en_US.UTF-8)",
        "/tmp/x: No space left on device",
    ],
)
def test_what_others_write_to_the_stderr_of_ffmpeg_changes_nothing(tmp_path, fake_ffmpeg, line):
    fake_ffmpeg(f'echo "{line}" >&2; exec $REAL "$@"')
    mp4.check_ffmpeg()
    assert ffmpeg.read_version() == imageio_ffmpeg.get_ffmpeg_version()
    path = render(tmp_path / "a.mp4", moving(5))
    assert mp4.count_frames(path) == len(list(mp4.read_frames(path))) == mp4.read_info(path).frame_count == 5
    assert mp4.extract_thumbnail(path, 0).startswith(b"\xff\xd8")


def test_an_ffmpeg_before_5_1_is_asked_in_its_own_words(tmp_path, fake_ffmpeg):
    fake_ffmpeg(
        'case "$*" in *-fps_mode*) echo "Unrecognized option \'fps_mode\'." >&2; exit 1;; esac\n'
        'for word; do shift; [ "$word" = -vsync ] && word=-fps_mode; set -- "$@" "$word"; done\n'
        'exec $REAL "$@"'
    )
    path = render(tmp_path / "a.mp4", moving(5))
    assert len(list(mp4.read_frames(path))) == 5


def test_all_damage_that_ffmpeg_reports_in_words_is_found_without_its_words(tmp_path):
    whole, path = render(tmp_path / "a.mp4", moving(30)).read_bytes(), tmp_path / "cut.mp4"
    reported = 0
    for at in range(60, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        command = [REAL, "-v", "error", "-i", path, "-f", "null", "-"]
        if subprocess.run(command, capture_output=True, check=False).stderr:
            reported += 1
            with suppress(FfmpegError):
                assert mp4.count_frames(path) < 30
    assert reported > 10


@pytest.mark.parametrize("asked", [4, 6])
def test_a_wrong_number_of_frames_is_not_published(tmp_path, asked):
    with pytest.raises(FfmpegError, match=f"{asked} frames were requested, 5 made"):
        render(tmp_path / "a.mp4", moving(5), frame_count=asked)
    assert_nothing_left(tmp_path)


def test_a_fault_while_frames_are_made_leaves_nothing(tmp_path):
    def failing():
        yield picture().tobytes()
        raise MemoryError

    with pytest.raises(MemoryError):
        render(tmp_path / "a.mp4", failing(), frame_count=5)
    assert_nothing_left(tmp_path)


def test_half_a_frame_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not whole frames"):
        render(tmp_path / "a.mp4", [bytes(FRAME + 1)])
    assert_nothing_left(tmp_path)


BIG = [bytes(FRAME)] * 50  # more than a pipe holds


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo bad luck >&2; head -c 20000 >/dev/null; exit 7", r"exit code 7\): bad luck"),
        ("exec <&-; echo gone >&2; exit 3", r"exit code 3\): gone"),
        ("exec <&-; exit 0", r"stopped reading \(exit code 0\)"),
        ("cat >/dev/null; kill -9 $$", "killed by SIGKILL"),
        ("cat >/dev/null; exit 0", "decode|moov|Invalid|failed"),
        ('head -c 40000 | $REAL "$@" 2>/dev/null', "stopped reading|50 frames were requested"),
    ],
    ids=["dies", "closes stdin", "closes stdin well", "is killed", "writes nothing", "drops frames"],
)
def test_an_ffmpeg_that_fails_leaves_nothing_and_is_quoted(tmp_path, fake_ffmpeg, script, message):
    fake_ffmpeg(f'case "$*" in *rawvideo*) {script};; *) exec $REAL "$@";; esac')
    with pytest.raises(FfmpegError, match=message) as caught:
        render(tmp_path / "a.mp4", BIG)
    assert caught.value.where == str(tmp_path / "a.mp4")
    assert_nothing_left(tmp_path)


def test_noise_on_both_outputs_does_not_block_and_only_its_end_is_kept(tmp_path, fake_ffmpeg):
    noise = "yes noise | head -c 3000000; yes noise | head -c 3000000 >&2"
    fake_ffmpeg(f'case "$*" in *rawvideo*) {noise}; echo the end >&2; exit 1;; *) exec $REAL "$@";; esac')
    with pytest.raises(FfmpegError, match="the end") as caught:
        render(tmp_path / "a.mp4", BIG)
    assert len(str(caught.value)) < 400


def alive(group: str) -> list[str]:
    """Members of a process group that still run; the dead may wait for init to reap them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp, *_ = stat.read_text().rpartition(")")[2].split()
            if pgrp == group and state not in "ZX":
                found.append(stat.parent.name)
    return found


def wait_until_dead(group: str) -> None:
    for _ in range(100):
        if not alive(group):
            return
        time.sleep(0.05)
    pytest.fail("ffmpeg is still running")


@pytest.mark.parametrize(
    "script", ["sleep 1000", "cat >/dev/null; sleep 1000", "exec >&-; exec 2>&-; sleep 1000"]
)
def test_an_ffmpeg_that_hangs_is_stopped_with_its_children(tmp_path, fake_ffmpeg, script):
    fake_ffmpeg(f"echo $$ >'{tmp_path}/pid'; {script}")
    encoder = mp4.Mp4Encoder(tmp_path / "x", WIDTH, HEIGHT, 16, 10, "h264", "", stall_timeout=0.5)
    with pytest.raises(FfmpegError, match=r"not moved for 0\.5 s"), encoder:
        encoder.write(b"".join(BIG))
    wait_until_dead((tmp_path / "pid").read_text().strip())


def test_a_full_disk_is_reported_as_such(tmp_path):
    encoder = mp4.Mp4Encoder(Path("/dev/full"), WIDTH, HEIGHT, 16, 10, "h264", "")
    with pytest.raises(NoSpace, match="are free"), encoder:
        encoder.write(b"".join(moving(5)))


def test_a_missing_ffmpeg_is_found_out_in_the_preflight(monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    with pytest.raises(FfmpegError, match="/no/such/ffmpeg") as caught:
        mp4.check_ffmpeg()
    assert "IMAGEIO_FFMPEG_EXE" in caught.value.hint


def test_an_ffmpeg_without_the_encoder_is_found_out_in_the_preflight(fake_ffmpeg):
    fake_ffmpeg("echo ' V....D libx264 H.264'")
    mp4.check_ffmpeg("h264")
    with pytest.raises(FfmpegError, match="no libx265"):
        mp4.check_ffmpeg("h265")


def test_the_bundled_ffmpeg_passes_the_preflight_and_has_a_version():
    mp4.check_ffmpeg("h264")
    mp4.check_ffmpeg("h265")
    assert ffmpeg.read_version() == imageio_ffmpeg.get_ffmpeg_version()


def test_a_truncated_video_is_never_taken_for_complete(tmp_path):
    whole = render(tmp_path / "a.mp4", moving(30)).read_bytes()
    for cut in range(0, len(whole), len(whole) // 12):
        (tmp_path / "cut.mp4").write_bytes(whole[:cut])
        with suppress(FfmpegError):
            assert mp4.count_frames(tmp_path / "cut.mp4") < 30


CHILD = """
import os, sys
from pathlib import Path
from wancli.video.mp4 import Mp4Encoder
encoder = Mp4Encoder(Path(sys.argv[1]), 64, 48, 16, 10, "h264", "")
encoder.write(bytes(64 * 48 * 3))
print(encoder._ffmpeg._process.pid, flush=True)
sys.stdin.read()
"""


def test_no_ffmpeg_outlives_a_killed_wancli(tmp_path, fake_ffmpeg):
    running = tmp_path / "running"
    fake_ffmpeg(f"touch '{running}'; exec sleep 1000")  # which does not care that its input ends
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        ffmpeg = child.stdout.readline().decode().strip()
        while not running.exists():
            assert child.poll() is None, "the child ended before it started ffmpeg"
            time.sleep(0.01)
        assert alive(ffmpeg)
        child.send_signal(signal.SIGKILL)
    wait_until_dead(ffmpeg)


# ---- to bytes ----


def test_floats_become_bytes_as_in_the_official_code():
    frames = torch.linspace(-1.2, 1.2, 3 * 5 * 4 * 6).view(3, 5, 4, 6)
    official = (frames.clamp(-1, 1).sub(-1).div(2).permute(1, 2, 3, 0) * 255).type(torch.uint8)
    got = mp4.to_rgb24(frames)
    assert got.shape == (5, 4, 6, 3)
    assert got.c_contiguous
    assert got.tobytes() == official.numpy().tobytes()


def test_the_callers_frames_stay_as_they_were():
    frames = torch.linspace(-2, 2, 3 * 2 * 4 * 4).view(3, 2, 4, 4)
    before = frames.clone()
    mp4.to_rgb24(frames)
    assert torch.equal(frames, before)


def test_frames_from_the_decoder_go_straight_into_a_video(tmp_path):
    frames = torch.from_numpy(np.stack([picture(shift=i) for i in range(5)])).permute(3, 0, 1, 2)
    path = render(tmp_path / "a.mp4", [mp4.to_rgb24(frames / 127.5 - 1)], frame_count=5)
    first = np.frombuffer(next(mp4.read_frames(path)).rgb, np.uint8)
    assert np.abs(first.astype(int) - picture().reshape(-1)).mean() < 6
