"""Many workers on one folder: each shot is rendered once, whoever dies or sleeps."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from failing_disk import fail_reading
from jobs import KEPT, NETWORKS, CommandResult, files_in, forbid_calls, latents_of, manifest_of, tiny_job
from workers import Folder, Notes

from wancli.engine.batch import render as render_plan
from wancli.engine.batch import track_outcomes
from wancli.engine.context import Force, RenderContext
from wancli.engine.outcome import Outcome
from wancli.errors import ClaimedElsewhere, MachineError, NoSpace, Stopped
from wancli.job.loader import load
from wancli.plan.planner import build_plan
from wancli.plan.render_plan import Plan
from wancli.progress import Progress
from wancli.signals import Stop
from wancli.storage import atomic, manifest
from wancli.storage.cache import Store
from wancli.storage.claim_file import current_process
from wancli.storage.claims import Claims, claim_path, find_holder
from wancli.text.encoder import encode

Render = Callable[..., CommandResult]
QUICK = {"heartbeat": 0.01, "stale_looks": 3}


class Some(NamedTuple):
    """All that claims need of a shot."""

    output: Path
    index: int = 0

    @property
    def manifest(self) -> Path:
        return manifest.manifest_path(self.output)


@pytest.fixture
def shot(tmp_path: Path) -> Any:
    return Some(tmp_path / "clip.mp4")


def put(shot: Any, content: str | dict[str, Any]) -> Path:
    """The claim of somebody else."""
    path = claim_path(shot)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def body(**changes: Any) -> dict[str, Any]:
    """What a live process of this host would write: that which runs the test."""
    me = current_process()
    return {**me.as_dict(), "started": "2026-11-23T00:00:00+00:00", "token": "theirs"} | changes


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# ---- claims alone ----


def test_one_of_two_workers_gets_a_shot_and_the_other_learns_who_holds_it(shot: Any) -> None:
    with Claims() as one, Claims() as other:
        assert one.take([shot]) == [shot]
        assert one.take([shot]) == [shot]  # it has it already
        assert other.take([shot]) == []
        found = find_holder(shot)
        assert found
        assert (found.host, found.pid) == (os.uname().nodename, os.getpid())
        assert other.held_by_others([shot]) == {0: found}
        assert (one.holds(shot), other.holds(shot)) == (True, False)
        one.release([shot])
        assert (one.holds(shot), find_holder(shot)) == (False, None)
        assert other.take([shot]) == [shot]
    assert list(shot.output.parent.iterdir()) == []  # the folder is as it was


def test_one_of_many_threads_that_find_a_dead_claim_gets_it(tmp_path: Path) -> None:
    shots: list[Any] = [Some(tmp_path / f"{n}.mp4", n) for n in range(40)]
    for one in shots:
        put(one, body(pid=dead_pid() if one.index == 0 else 2**22 + 1))
    workers = [Claims() for _ in range(8)]
    got: list[int] = []
    threads = [
        threading.Thread(target=lambda w=w: got.extend(one.index for one in w.take(shots))) for w in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [sum(worker.holds(one) for worker in workers) for one in shots]
    assert held == [1] * 40
    for worker in workers:
        worker.__exit__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "gone",
    [{"pid": 2**22 + 1}, {"born": "1"}],
    ids=["no such process", "another process has its number"],
)
def test_a_claim_of_a_dead_process_of_this_host_is_free_at_once(shot: Any, gone: dict[str, Any]) -> None:
    put(shot, body(**gone))
    assert find_holder(shot) is None
    with Claims() as claims:
        assert claims.take([shot]) == [shot]


def test_a_zombie_process_holds_nothing(shot: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    put(shot, body(pid=child.pid))
    assert find_holder(shot) is None
    child.wait()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"pid": "x"}', "\0" * 100, body(host="other"), body(boot="b"), body(space="pid:[1]")],
    ids=["empty", "cut", "list", "nonsense", "zeros", "host", "boot", "container"],
)
def test_a_claim_of_another_host_is_stale_after_some_looks_without_a_touch(
    shot: Any, content: str | dict[str, Any]
) -> None:
    path = put(shot, content if isinstance(content, str) else content | {"pid": 2**22 + 1})
    assert find_holder(shot)
    claims = Claims(**QUICK)
    assert claims.held_by_others([shot])  # the first look
    for _ in range(5):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # somebody is alive
        for _ in range(3):
            time.sleep(0.011)
            assert claims.held_by_others([shot])
    time.sleep(0.011)
    assert claims.held_by_others([shot]) == {}  # the third look that saw no change
    with claims:
        assert claims.take([shot]) == [shot]


def test_looks_in_quick_succession_count_once(shot: Any) -> None:
    put(shot, body(host="other"))
    claims = Claims(heartbeat=3600, stale_looks=1)
    for _ in range(100):
        assert claims.held_by_others([shot])


def test_a_heartbeat_touches_held_claims_and_no_claim_that_another_took(shot: Any) -> None:
    with Claims(heartbeat=3600) as claims:
        claims.take([shot])
        path = claim_path(shot)
        os.utime(path, ns=(0, 0))
        claims.touch_and_watch()
        assert path.stat().st_mtime_ns > 0
        put(shot, body())
        os.utime(path, ns=(0, 0))
        claims.touch_and_watch()
        assert path.stat().st_mtime_ns == 0
        assert (claims.holds(shot), claims.holds_all()) == (False, False)
        claims.release([shot])
        assert claims.holds_all()
    assert path.exists()  # it is another's


def test_the_thread_touches_claims_by_itself(shot: Any) -> None:
    with Claims(**QUICK) as claims:
        claims.take([shot])
        os.utime(claim_path(shot), ns=(0, 0))
        while claim_path(shot).stat().st_mtime_ns == 0:
            time.sleep(0.001)


def test_a_claim_of_ours_that_could_not_be_removed_does_not_lock_us_out(
    shot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claims() as claims:
        claims.take([shot])
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *_, **__: Path("/proc").rmdir())
            claims.release([shot])
        assert claim_path(shot).exists()
        assert claims.take([shot]) == [shot]


def test_a_worker_that_moved_a_fresh_claim_away_puts_it_back(
    shot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two judge a claim stale; one is faster, and the other moves what that one has just made."""
    put(shot, body(pid=2**22 + 1))
    with Claims() as fast, Claims() as slow:
        real = slow._find_other_holder

        def judged(path: Path) -> Any:
            found = real(path)
            fast.take([shot])
            return found

        monkeypatch.setattr(slow, "_find_other_holder", judged)
        assert slow.take([shot]) == []
        assert fast.holds(shot)


def test_a_folder_that_takes_no_claim_is_a_machine_error(shot: Any) -> None:
    (shot.output.parent / ".wancli").write_text("in the way")
    with Claims() as claims, pytest.raises(MachineError, match="cannot write"):
        claims.take([shot])


def test_nothing_is_encoded_if_no_claim_can_be_written(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.wancli").write_text("in the way")
    result = render(prompt="Never asked before.")
    assert (result.code, files_in(tmp_path)) == (3, [".wancli"]), result.err


def test_a_claim_that_cannot_be_read_belongs_to_another_worker(
    shot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(shot, body(pid=2**22 + 1))  # which nobody can see now
    with Claims() as claims:
        with monkeypatch.context() as patched:
            fail_reading(patched, lambda asked: asked == path, "EIO")
            assert claims.take([shot]) == []
            assert claims.name_holders([shot]) == "unknown:0"
        assert claims.take([shot]) == [shot]


def test_a_full_disk_leaves_no_claim(shot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Claims() as claims:
        with monkeypatch.context() as patched:
            patched.setattr(atomic, "write_all", full)
            with pytest.raises(NoSpace):
                claims.take([shot])
        assert not claim_path(shot).exists()
        assert claims.take([shot]) == [shot]


def test_a_worker_that_takes_over_removes_stale_files_of_earlier_takeovers(shot: Any) -> None:
    path = put(shot, body(pid=2**22 + 1))
    grave = path.with_name(f".wancli-{2**22 + 1}-abc.tmp")
    grave.touch()
    os.utime(grave, (0, 0))
    with Claims() as claims:
        assert claims.take([shot]) == [shot]
        assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert not (shot.output.parent / ".wancli").exists()


def test_a_folder_of_claims_that_another_worker_just_removed_is_created_again(
    shot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.open, [2]

    def opened(path: Any, *arguments: Any) -> int:
        if path == claim_path(shot) and left[0]:
            left[0] -= 1
            claim_path(shot).parent.rmdir()
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", opened)
    with Claims() as claims:
        assert claims.take([shot]) == [shot]
    assert left == [0]


# ---- workers on one job ----

STEPS = 6


@pytest.fixture
def folder(tmp_path: Path, quick: Path, warm: Path) -> Iterator[Callable[..., Folder]]:
    made: list[Folder] = []

    def make(ids: str, **changes: Any) -> Folder:
        items = [{"id": id, "seed": ord(id)} for id in ids]
        said = {"output": "out/{id}.mp4", "sampler": {"steps": STEPS}, "video": KEPT, "items": items}
        made.append(Folder(tmp_path, tiny_job(quick, **said | changes), warm))
        return made[-1]

    yield make
    for one in made:
        one.end()


def report_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out/job.report.json").read_text())["shots"]
    return found


def test_eight_workers_that_start_together_take_every_step_of_every_shot_once(
    folder: Callable[..., Folder], tmp_path: Path
) -> None:
    ids = "abcdefghijklmnop"
    job = folder(ids, prompt="A prompt that eight workers want to encode.")
    workers = [job.start() for _ in range(8)]
    for worker in workers:
        out, err = worker.communicate()
        assert worker.returncode == 0, err
        assert sorted(Path(line).stem for line in out.split()) == list(ids)
    assert Counter(job.steps()) == Counter((id, step) for id in ids for step in range(1, STEPS + 1))
    assert len({worker.pid for worker in workers if job.steps(worker.pid)}) > 1
    assert {shot["status"] for shot in report_of(tmp_path)} <= {"rendered", "already done"}
    assert all(shot["key"] == manifest_of(tmp_path, shot["id"])["key"] for shot in report_of(tmp_path))
    companions = {
        f"{id}{suffix}" for id in ids for suffix in (".mp4", ".manifest.json", ".latents.safetensors")
    }
    assert set(files_in(tmp_path)) == companions | {"job.report.json"}


def test_a_running_worker_resumes_from_the_saved_state_of_a_killed_one(
    folder: Callable[..., Folder], tmp_path: Path, render: Render
) -> None:
    job = folder("ab")
    victim = job.start(event="hang", at=("a", 4))
    job.until("hang.here")
    survivor = job.start()
    assert survivor.stderr
    said = next(line for line in survivor.stderr if line.startswith("waiting"))
    assert said == f"waiting for shot a, rendered by {os.uname().nodename}:{victim.pid}\n"
    victim.kill()
    out, err = survivor.communicate()
    assert survivor.returncode == 0, err
    assert sorted(Path(line).stem for line in out.split()) == ["a", "b"]
    assert job.steps(victim.pid) == [("a", step) for step in range(1, 5)]
    assert job.steps(survivor.pid)[STEPS:] == [("a", step) for step in range(4, STEPS + 1)]
    alone = {"output": "out/{id}.mp4", "sampler": {"steps": STEPS}, "video": KEPT}
    items = [{"id": id, "seed": ord(id)} for id in "ab"]
    assert render(folder=tmp_path / "alone", items=items, **alone).code == 0
    for id in "ab":
        assert torch.equal(latents_of(tmp_path, id), latents_of(tmp_path / "alone", id))


@pytest.mark.parametrize("at", [("a", 4), ("", -1)], ids=["in a step", "while decoding"])
def test_a_worker_that_was_suspended_until_another_did_its_work_publishes_nothing(
    folder: Callable[..., Folder], tmp_path: Path, at: tuple[str, int]
) -> None:
    job = folder("a")
    sleeper = job.start(event="stop", at=at)
    sleeper.until_suspended()
    with Claims(**QUICK) as claims:
        (outcome,) = render_plan(planned(job), tools(job, claims))
    assert outcome.status == "rendered"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("a.*")}
    assert sorted(before) == ["a.latents.safetensors", "a.manifest.json", "a.mp4"]
    os.kill(sleeper.pid, signal.SIGCONT)
    out, err = sleeper.communicate()
    assert (sleeper.returncode, out) == (0, f"{tmp_path}/out/a.mp4\n"), err
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("a.*")}
    assert files_in(tmp_path) == [*sorted(before), "job.report.json"]
    assert [shot["status"] for shot in report_of(tmp_path)] == ["already done"]


# ---- shots of other workers ----


def planned(job: Folder) -> Plan:
    return build_plan(load(job.job), job.cache / "hashes.json")


def tools(job: Folder, claims: Claims, progress: Progress | None = None, **changes: Any) -> RenderContext:
    return RenderContext(Store(job.cache / "embeddings"), progress or Progress(), claims=claims, **changes)


def forced(job: Folder) -> Force:
    return Force.snapshot(planned(job).shots)


def test_a_shot_that_another_worker_gives_up_is_rendered_once_the_others_are_done(
    folder: Callable[..., Folder],
) -> None:
    job = folder("ab")
    shots = planned(job)
    path = put(shots.shots[0], body(host="other", pid=7))
    notes = Notes(path.unlink)
    with Claims() as claims:
        outcomes = list(render_plan(shots, tools(job, claims, notes)))
    assert [(outcome.shot.id, outcome.status) for outcome in outcomes] == [
        ("b", "rendered"),
        ("a", "rendered"),
    ]
    assert notes.notes == ["waiting for shot a, rendered by other:7"]


def test_no_network_is_loaded_for_a_shot_that_another_worker_has_finished(
    folder: Callable[..., Folder],
) -> None:
    job = folder("a")
    (shot,) = planned(job).shots
    with Claims() as claims:
        assert [one.status for one in render_plan(planned(job), tools(job, claims))] == ["rendered"]
    there, hidden = shot.output, shot.output.with_suffix(".hidden")
    there.rename(hidden)
    path = put(shot, body(host="other", pid=7))
    phases: list[str] = []

    class Watch(Notes):
        def phase(self, name: str, shots: Any, total: int) -> Any:
            phases.append(name)
            return super().phase(name, shots, total)

    notes = Watch(lambda: (hidden.rename(there), path.unlink()))
    with Claims() as claims:
        (outcome,) = render_plan(planned(job), tools(job, claims, notes))
    assert (outcome.status, len(notes.notes), phases) == ("already done", 1, ["encode"])


def test_a_worker_waits_for_the_last_of_several_shots(folder: Callable[..., Folder]) -> None:
    job = folder("ab")
    with Claims() as claims:
        assert len([*render_plan(planned(job), tools(job, claims))]) == 2
    hidden = [(one.output, one.output.with_suffix(".hidden")) for one in planned(job).shots]
    for there, aside in hidden:
        there.rename(aside)
    paths = [put(shot, body(host="other", pid=7)) for shot in planned(job).shots]

    class OneByOne(Progress):
        def note(self, _: str) -> None:
            there, aside = hidden.pop()
            aside.rename(there)
            paths.pop().unlink()

    with Claims() as claims:
        outcomes = [*render_plan(planned(job), tools(job, claims, OneByOne()))]
    assert [(one.shot.id, one.status) for one in outcomes] == [("b", "already done"), ("a", "already done")]


def test_a_waiting_worker_can_be_stopped(folder: Callable[..., Folder], render: Render) -> None:
    job = folder("a")
    shots = planned(job)
    put(shots.shots[0], body(host="other"))
    stop = Stop()
    notes = Notes(lambda: setattr(stop, "reason", "SIGTERM"))
    with Claims() as claims, pytest.raises(Stopped, match="stopped by SIGTERM"):
        list(render_plan(shots, tools(job, claims, notes, stop=stop)))


@pytest.mark.parametrize("look", [*range(1, 12)])
def test_a_claim_that_is_unseen_for_one_look_costs_no_shot(
    folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """As where it was moved away and put back, or where NFS shows it late."""
    job = folder("ab")
    real = Claims.holds_all
    looks = 0

    def intact(self: Claims) -> bool:
        nonlocal looks
        looks += 1
        return looks != look and real(self)

    monkeypatch.setattr(Claims, "holds_all", intact)
    with Claims(**QUICK) as claims:
        outcomes = list(render_plan(planned(job), tools(job, claims, model_cache=NETWORKS)))
    assert looks >= look
    assert sorted((one.shot.id, one.status) for one in outcomes) == [("a", "rendered"), ("b", "rendered")]


def test_a_batch_with_an_unaccounted_shot_never_succeeds(folder: Callable[..., Folder]) -> None:
    job = folder("ab")
    a, b = planned(job).shots
    with Claims() as claims:
        for left in ([], [Outcome(b, "stopped")]):
            with pytest.raises(Stopped, match=r"1 (not started|shot is saved)"):
                list(track_outcomes(iter([Outcome(a, "rendered"), *left]), [a, b], tools(job, claims)))


def test_own_failures_decide_the_exit_code_before_shots_claimed_elsewhere(
    folder: Callable[..., Folder],
) -> None:
    job = folder("ab")
    a, b = planned(job).shots
    error = MachineError("ffmpeg died")
    with Claims() as claims:
        both = [Outcome(a, "failed", error=error), Outcome(b, "elsewhere")]
        assert list(track_outcomes(iter(both), [a, b], tools(job, claims))) == both
        with pytest.raises(ClaimedElsewhere, match="1 shot is claimed by other workers"):
            list(track_outcomes(iter(both[1:]), [b], tools(job, claims)))


def test_no_wait_exits_with_75_and_names_the_holders_of_the_rest(
    render: Render, tmp_path: Path, folder: Callable[..., Folder]
) -> None:
    put(planned(folder("ab")).shots[0], body(host="other", pid=7))
    items = [{"id": id, "seed": ord(id)} for id in "ab"]
    result = render("--no-wait", output="out/{id}.mp4", items=items)
    assert (result.code, result.out) == (75, f"{tmp_path}/out/b.mp4\n")
    assert result.err.startswith(
        "wancli: 1 shot is claimed by other workers: other:7\n  resume: wancli render "
    )
    assert [shot["status"] for shot in report_of(tmp_path)] == ["elsewhere", "rendered"]
    put(planned(folder("ab")).shots[0], body(host="other", pid=7))
    result = render("--no-wait", "--force", output="out/{id}.mp4", items=items)
    assert (result.code, "again from the first step" in result.err) == (75, False)  # nothing was on its way


def test_workers_that_all_have_force_render_each_shot_once(
    folder: Callable[..., Folder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = folder("a")
    with Claims() as claims, Claims() as others:
        list(render_plan(planned(job), tools(job, claims)))
        real = claims.take

        def late(shots: Any) -> Any:
            monkeypatch.undo()
            list(render_plan(planned(job), tools(job, others, force=forced(job))))
            return real(shots)

        monkeypatch.setattr(claims, "take", late)
        (outcome,) = render_plan(planned(job), tools(job, claims, force=forced(job)))
    assert outcome.status == "already done"
    assert [name for name in files_in(tmp_path) if name.endswith("mp4")] == ["a.mp4", "a.old-1.mp4"]


def test_workers_that_encode_together_encode_no_prompt_twice(
    folder: Callable[..., Folder], tmp_path: Path
) -> None:
    shots = planned(folder("a")).shots
    encoder, tokens = shots[0].model.encoder, [text.tokens for text in shots[0].prompts]
    prompts = [replace(tokens[0], text=f"never asked before, {n}") for n in range(4)]
    store = Store(tmp_path / "embeddings")
    one, other = encode(encoder, prompts, store), encode(encoder, prompts, store)
    found = [encoded for pair in zip(one, other) for encoded in pair]
    assert Counter(encoded.key for encoded in found) == Counter({encoder.key(p): 2 for p in prompts})
    assert sum(not encoded.hit for encoded in found) == 4
