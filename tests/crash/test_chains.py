"""Many workers on chains of shots: everything is rendered once and in order, whoever is killed or stopped."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_cases import assemble
from jobs import TRANSFORMER, change_tensors, manifest_of, tiny_job
from PIL import Image
from workers import Folder, Notes

from wancli.engine import pipeline
from wancli.engine.batch import render
from wancli.engine.context import RenderContext
from wancli.errors import ClaimedElsewhere, ShotError
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan
from wancli.progress import Progress
from wancli.storage.cache import Store
from wancli.storage.claims import Claims, claim_path

STEPS = 3
CHAIN = [f"c{number}" for number in range(6)]
PICTURES = [f"p{number:02d}" for number in range(12)]
Make = Callable[..., Folder]


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny TI2V checkpoint cut down to two blocks."""
    model = assemble("wan22-ti2v-tiny", tmp_path_factory.mktemp("ti2v") / "model")
    for name in (TRANSFORMER, "config.json"):
        original = (model / name).resolve().read_bytes()
        (model / name).unlink()
        (model / name).write_bytes(original)

    def cut(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("blocks.") and int(name.split(".")[1]) > 1]:
            del tensors[name]

    change_tensors(model / TRANSFORMER, cut)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    return model


def chain(*ids: str) -> dict[str, Any]:
    """A chain: the first shot begins with a picture, each other one with the last frame of the one before."""
    return {id: {"shot": before} for before, id in pairwise(ids)} | {ids[0]: f"{ids[0]}.png"}


ALL = chain(*CHAIN) | {id: f"{id}.png" for id in PICTURES}


def job_of(images: dict[str, Any], model: Path, path: Path, cache: Path) -> Folder:
    """A job of shots by their id and how they begin. The id decides all else, also the pixels."""
    path.mkdir(exist_ok=True)
    lines = []
    for id, image in images.items():
        seed = int.from_bytes(id.encode())
        if not isinstance(image, dict):
            pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path / image)
        lines.append(json.dumps({"id": id, "image": image, "seed": seed}) + "\n")
    (path / "list.jsonl").write_text("".join(lines))
    keys = {"output": "out/{id}.mp4", "size": "32x32", "frames": 5, "sampler": {"steps": STEPS}}
    return Folder(path, tiny_job(model, images_from="list.jsonl", **keys), cache)


def outputs_of(path: Path) -> dict[str, bytes]:
    """The videos and the kept frames."""
    files = (path / "out").iterdir()
    return {file.name: file.read_bytes() for file in files if file.suffix in (".mp4", ".png")}


@pytest.fixture(scope="session")
def alone(two_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the chain and of the pictures."""
    path = tmp_path_factory.mktemp("alone")
    job = job_of(ALL, two_blocks, path, tmp_path_factory.mktemp("cache"))
    with job.start() as process:
        assert process.communicate()[1].count("failed") == 0
    assert Counter(job.steps()) == every_step(*ALL)
    return outputs_of(path)


@pytest.fixture
def make(tmp_path: Path, two_blocks: Path, warm: Path) -> Iterator[Make]:
    """Makes a job of shots by their id and how they begin, and ends its workers."""
    made: list[Folder] = []

    def folder(images: dict[str, Any]) -> Folder:
        made.append(job_of(images, two_blocks, tmp_path, warm))
        return made[-1]

    yield folder
    for one in made:
        one.end()


def every_step(*ids: str) -> Counter[tuple[str, int]]:
    return Counter((id, step) for id in ids for step in range(1, STEPS + 1))


def test_eight_workers_of_which_three_are_killed_render_chain_and_pictures_as_one_process_does(
    make: Make, alone: dict[str, bytes], tmp_path: Path
) -> None:
    job = make(ALL)
    killed = ("c2", "c4", "p05")
    workers = [job.start(event="SIGKILL", at=(",".join(killed), 2)) for _ in range(8)]
    ended = []
    for worker in workers:
        out, err = worker.communicate()
        ended.append(worker.returncode)
        if worker.returncode == 0:
            assert sorted(Path(line).stem for line in out.split()) == sorted(ALL), err
    assert sorted(ended) == [-signal.SIGKILL] * 3 + [0] * 5
    assert Counter(job.steps()) == every_step(*ALL) + Counter((id, 2) for id in killed)
    order = [id for id, _ in job.steps() if id in CHAIN]
    assert order == sorted(order)
    assert outputs_of(tmp_path) == alone
    for before, id in pairwise(CHAIN):
        assert manifest_of(tmp_path, id)["pictures"][0]["link"] == {"shot": before, "frame": 4}


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
def test_a_chain_goes_on_in_its_middle_after_a_kill_and_after_a_stop(
    make: Make, alone: dict[str, bytes], tmp_path: Path, end: str
) -> None:
    job = make(chain("c0", "c1", "c2"))
    with job.start(event=end, at=("c1", 2)) as first:
        first.communicate()
    assert first.returncode == (75 if end == "SIGTERM" else -signal.SIGKILL)
    assert job.start().communicate()[0].split() == [f"{tmp_path}/out/{id}.mp4" for id in ("c0", "c1", "c2")]
    repeated = [("c1", 2)] if end == "SIGKILL" else []
    assert Counter(job.steps()) == every_step("c0", "c1", "c2") + Counter(repeated)
    assert outputs_of(tmp_path).items() <= alone.items()


def claim_elsewhere(plan: Plan, id: str) -> Path:
    """Claim a shot as a worker on another host does."""
    path = claim_path(next(shot for shot in plan.shots if shot.id == id))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "other", "pid": 7, "born": "1", "started": "now", "token": "x"}))
    return path


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_takes_all_free_shots_before_it_waits_for_one_that_others_continue(
    make: Make, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    job = make(chain("c0", "c1", "c2") | chain("d0", "d1") | {"p00": "p00.png"})
    plan = build_plan(load(job.job), job.cache / "hashes.json")
    real = pipeline._finish_latent

    def finish(state: Any, *rest: Any) -> Any:
        if fails and state.shot.id == "c0":
            raise ShotError("is broken", where="shot c0")
        return real(state, *rest)

    monkeypatch.setattr(pipeline, "_finish_latent", finish)
    notes = Notes(claim_elsewhere(plan, "c0").unlink)
    over: list[tuple[str, str, int]] = []
    with Claims() as claims:
        context = RenderContext(Store(job.cache / "embeddings"), notes, claims=claims)
        over.extend((outcome.shot.id, outcome.status, len(notes.notes)) for outcome in render(plan, context))
    status = "failed" if fails else "rendered"
    others = [("d0", "rendered", 0), ("p00", "rendered", 0), ("d1", "rendered", 0)]
    assert over == [*others, ("c0", status, 1), ("c1", status, 1), ("c2", status, 1)]
    assert notes.notes == ["waiting for shot c0, rendered by other:7"]


def test_a_worker_that_does_not_wait_leaves_a_chain_to_the_worker_that_has_its_first_shot(
    make: Make,
) -> None:
    job = make(chain("c0", "c1") | {"p00": "p00.png"})
    plan = build_plan(load(job.job), job.cache / "hashes.json")
    claim_elsewhere(plan, "c0")
    over: list[tuple[str, str]] = []
    with Claims(waits_for_others=False) as claims:
        context = RenderContext(Store(job.cache / "embeddings"), Progress(), claims=claims)
        with pytest.raises(ClaimedElsewhere, match="2 shots are claimed by other workers: other:7"):
            over.extend((outcome.shot.id, outcome.status) for outcome in render(plan, context))
    assert sorted(over) == [("c0", "elsewhere"), ("c1", "elsewhere"), ("p00", "rendered")]


def test_a_worker_makes_a_missing_frame_if_the_worker_that_was_to_make_it_has_not(make: Make) -> None:
    assert make(chain("e0")).start().communicate()[1].count("failed") == 0
    job = make(chain("e0", "e1"))
    plan = build_plan(load(job.job), job.cache / "hashes.json")
    notes = Notes(claim_elsewhere(plan, "e0").unlink)
    with Claims() as claims:
        context = RenderContext(Store(job.cache / "embeddings"), notes, claims=claims)
        over = [(outcome.shot.id, outcome.status) for outcome in render(plan, context)]
    assert over == [("e0", "rendered"), ("e1", "rendered")]
    assert notes.notes == ["waiting for shot e0, rendered by other:7"]
