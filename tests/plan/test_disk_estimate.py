"""Disk space: checked before anything is loaded; a batch that runs out of it ends and can resume."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import WANCLI, run
from jobs import CommandResult, files_in, forbid_calls, latents_of, tiny_job, write_job

from wancli.job.loader import load
from wancli.plan import disk_estimate
from wancli.plan.batching import build_schedule
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.storage import disk
from wancli.storage.cache import Store
from wancli.video import mp4

Render = Callable[..., CommandResult]


@pytest.fixture
def shots(tmp_path: Path) -> Callable[..., tuple[Shot, ...]]:
    def planned(**changes: Any) -> tuple[Shot, ...]:
        return build_plan(load(write_job(tmp_path, tiny_job(**changes))), tmp_path / "memo.json").shots

    return planned


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "wancli-test", str(folder)]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def disk_needs(shots: Sequence[Shot], *store: Store) -> list[disk_estimate.DiskNeed]:
    return disk_estimate.disk_needs(build_schedule(shots), *store)


def test_a_video_takes_two_bits_per_pixel_at_crf_16_and_never_more_than_raw(shots: Any) -> None:
    crf = {n: shots(size="160x96", frames=17, video={"crf": n})[0] for n in (0, 10, 16, 22, 51)}
    pixels = 160 * 96 * 17
    found = {n: disk_estimate.video_bytes(shot) / pixels * 8 for n, shot in crf.items()}
    assert found == pytest.approx({0: 12.6, 10: 4, 16: 2, 22: 1, 51: 2 ** (-29 / 6)}, abs=1e-3)


def test_only_pure_noise_takes_more_than_the_estimate_of_a_video(shots: Any, tmp_path: Path) -> None:
    (shot,) = shots(size="320x192", frames=17)[:1]
    dice = np.random.default_rng(0)
    slope = np.linspace(40, 200, 320)[None, None, :, None]
    grain = np.clip(slope + dice.normal(0, 3, (17, 192, 320, 1)), 0, 255)
    noise = dice.integers(0, 256, (17, 192, 320, 3))
    found = {}
    for name, pictures in {"grain": np.broadcast_to(grain, noise.shape), "noise": noise}.items():
        chunks = [picture.astype(np.uint8).tobytes() for picture in pictures]
        said = {"width": 320, "height": 192, "fps": 16, "frame_count": 17, "crf": 16, "codec": "h264"}
        path = mp4.write_mp4(iter(chunks), tmp_path / f"{name}.mp4", **said, comment="")  # type: ignore[arg-type]
        found[name] = path.stat().st_size / disk_estimate.video_bytes(shot)
    assert 0.5 < found["grain"] < 1, found
    assert 2 < found["noise"] < 4, found


def test_kept_latents_count_once_per_shot_and_others_once_per_round(shots: Any) -> None:
    seeds = {"output": "out/{seed}.mp4", "matrix": {"seed": [1, 2, 3, 4]}}
    (plain,) = disk_needs(shots(**seeds))
    (kept,) = disk_needs(shots(**seeds, video={"keep_latents": True}))
    latent = 4 * 16 * 1 * 8 * 8 + 2**16
    assert kept.needed - plain.needed == 4 * latent
    (one,) = disk_needs(shots()[:1])
    assert plain.needed - one.needed == 3 * (64 * 64 * 2 // 8 + 2**16)


def test_a_shot_in_progress_takes_its_latent_and_twice_its_state_less_what_exists(shots: Any) -> None:
    (shot,) = shots()[:1]
    latent = 4 * 16 * 1 * 8 * 8 + 2**16
    video = 64 * 64 * 2 // 8 + 2**16
    assert disk_needs([shot])[0].needed == video + latent + 2 * 4 * latent
    shot.state.parent.mkdir(exist_ok=True)
    shot.state.write_bytes(bytes(1000))
    assert disk_needs([shot])[0].needed == video + latent + 2 * 4 * latent - 1000


def test_missing_embeddings_count_if_the_cache_is_on_the_same_disk(shots: Any, tmp_path: Path) -> None:
    found = shots()
    (alone,) = disk_needs(found)
    (both,) = disk_needs(found, Store(tmp_path / "cache"))
    assert both.needed > alone.needed
    (elsewhere,) = disk_needs(found, Store(Path("/proc/nowhere")))
    assert elsewhere.needed == alone.needed


def test_too_little_space_is_reported_with_figures_before_anything_is_loaded(
    render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    monkeypatch.setattr(disk, "free_space", lambda _: 700 * 1024)
    result = render()
    assert result.code == 3
    line, hint = result.err.splitlines()
    assert line.startswith(f"wancli: {tmp_path}/out: 1 shot may need ")
    assert line.endswith(" on this disk, 700 KiB are free")
    assert "--items" in hint
    assert files_in(tmp_path) == []


def test_the_margin_is_a_twentieth_and_a_mebibyte() -> None:
    needed = 100 * 2**20
    least = int(needed * 1.05) + 2**20
    assert disk_estimate.DiskNeed(Path(), needed, least).fits
    assert not disk_estimate.DiskNeed(Path(), needed, least - 1).fits


def test_a_disk_that_fills_up_ends_the_batch_and_keeps_finished_shots(
    render: Render, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preflight sees more free space than there is, as if another program took it meanwhile."""
    items = [{"id": f"s{n}", "seed": n, "video": {"keep_latents": True}} for n in range(60)]
    said = {"output": "out/{id}.mp4", "items": items}
    assert render(folder=small, **said).code == 3
    assert files_in(small) == []
    (small / "ballast").write_bytes(b"x" * 3 * 2**19)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(disk_estimate, "require", lambda *_: None)
        ended = render(folder=small, **said)
    assert ended.code == 3
    assert "No space left on device; 0.0 MB are free there" in ended.err
    assert list(small.rglob(".wancli-*")) == []
    done = ended.out.split()
    assert 0 < len(done) < 60
    assert all(path.with_suffix(".manifest.json").exists() for path in map(Path, done))
    (small / "ballast").unlink()
    monkeypatch.setattr(disk_estimate, "require", lambda *_: None)
    assert render(folder=small, output="out/{id}.mp4", items=items[: len(done) + 1]).code == 0


def test_a_full_cache_costs_a_warning_and_nothing_else(
    small: Path, tmp_path: Path, quick: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    from jobs import run_wancli

    (small / "ballast").write_bytes(b"x" * 2**21)
    job = write_job(tmp_path, tiny_job(quick, prompt="one that no cache knows"))
    assert run_wancli(capsys, "render", job, "--cache-dir", small / "cache").code == 0
    assert "continuing without the cache: " in caplog.text
    assert list(small.rglob("*.entry")) == []


def test_a_limit_on_file_size_counts_as_a_full_disk_and_the_next_run_resumes(
    render: Render, tmp_path: Path, quick: Path
) -> None:
    job = write_job(tmp_path, tiny_job(quick, frames=17, video={"keep_latents": True}))

    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    cache = tmp_path / "cache"  # a file of digests that many tests share may be larger than the limit
    ended = run("render", job, "-q", "--cache-dir", cache, program=limit + WANCLI)
    assert ended.returncode == 3
    assert "File too large" in ended.stderr
    assert list(tmp_path.rglob(".wancli-*")) == []
    assert render(frames=17, video={"keep_latents": True}).code == 0
    assert latents_of(tmp_path).shape[1] == 5
