"""Exported jobs are run: the Slurm script as Slurm would run it, OpenJD by its own runner."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import CommandResult, files_in, manifest_of, run_wancli, tiny_job, write_job

from wancli.farm.slurm_export import SlurmOptions, build_script

ROOT = Path(__file__).parents[2]
OPENJD = Path(sys.executable).with_name("openjd")
SWEEP = {"output": "out/{item}.mp4", "matrix": {"seed": [1, 2, 3, 4]}}


def export(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    result = run_wancli(capsys, "export", *arguments)
    assert (result.code, result.err) == (0, "")
    return result.out


@pytest.fixture
def other_folder(tmp_path: Path, warm: Path) -> dict[str, Any]:
    """Return options that run a process in another folder, with the wancli of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "WANCLI_CACHE": str(warm)}
    (tmp_path / "elsewhere").mkdir()
    return {"cwd": tmp_path / "elsewhere", "env": environment, "text": True}


# ---- Slurm ----


def test_the_script_requests_the_given_resources(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "2.13.0+cu130")
    job = write_job(tmp_path, tiny_job(quick, **SWEEP))
    options = ["--shards", 2, "--gpus", 0, "--time", "1:00:00", "--cpus", 4, "--mem", "32G", "--margin", 60]
    text = export(capsys, "slurm", job, *options)
    asked = dict(line.split(" --")[1].partition("=")[::2] for line in text.splitlines() if "SBATCH" in line)
    assert asked == {
        "job-name": "wancli-job",
        "array": "0-1",
        "cpus-per-task": "4",
        "mem": "32G",
        "time": "1:00:00",
        "signal": "B:USR1@60",
        "open-mode": "append",
        "output": "wancli-job-%A_%a.log",
        "requeue": "",
    }
    assert "#SBATCH --gres=gpu:1\n" in export(capsys, "slurm", job)
    assert "# from 0, 2 shots each; " in text
    assert "# from 0, 1 to 2 shots each; " in export(capsys, "slurm", job, "--shards", 3)
    text = export(capsys, "slurm", job, "--partition", "gpu", "--account", "film", "--gres", "gpu:a100:1")
    for line in ("--partition=gpu", "--account=film", "--gres=gpu:a100:1"):
        assert f"#SBATCH {line}\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "a b"], "--partition: 'a b' is not a name that Slurm reads"),
        (["--account", "x\n#SBATCH --nodes=9"], "--account: "),
        (["--gres", "gpu:2", "--gpus", 2], "--gres: says the same as --gpus; give one of them"),
    ],
)
def test_what_slurm_would_misread_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[object], message: str
) -> None:
    said = run_wancli(capsys, "export", "slurm", write_job(tmp_path, tiny_job()), *options)
    assert (said.code, said.err.startswith(f"wancli: {message}")) == (2, True)


def test_a_chain_is_one_task_of_slurm_and_refused_for_openjd(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    items = [{"id": "a", "image": "cat.png"}, {"id": "b", "image": {"shot": "a"}}, {"id": "c"}]
    job = write_job(tmp_path, tiny_job(output="out/{id}.mp4", items=items))
    assert "#SBATCH --array=0-1\n" in export(capsys, "slurm", job, "--shards", 2)
    result = run_wancli(capsys, "export", "slurm", job, "--shards", 3)
    assert (result.code, "3 is more than there are shots and chains (2)" in result.err) == (2, True)
    result = run_wancli(capsys, "export", "openjd", job)
    assert (result.code, "tasks of OpenJD do not wait" in result.err) == (2, True)


@pytest.mark.parametrize("scheduler", ["slurm", "openjd"])
def test_a_job_that_computes_on_cpus_requests_no_gpu_by_default(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = ["2.13.0"]
    monkeypatch.setattr(metadata, "version", lambda _: builds[-1])
    items = [{"id": "a", "memory": {"device": "cpu"}}, {"id": "b"}]
    job = write_job(tmp_path, tiny_job(output="out/{id}.mp4", items=items))

    def asks(*options: object) -> bool:
        return "gpu" in export(capsys, scheduler, job, *options)

    assert asks()
    assert not asks("--items", "0")
    assert not asks("--set", "memory.device=cpu")
    assert asks("--set", "memory.device=cpu", "--gpus", 1)
    builds.append("2.13.0+cpu")  # with which no task uses a GPU
    assert not asks()
    assert asks("--set", "memory.device=cuda")


def test_odd_names_reach_the_render_whole(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path, other_folder: dict[str, Any]
) -> None:
    name = 'it\'s $(touch oops) `x` "q" 猫.yaml'
    job = write_job(tmp_path, tiny_job(quick, **SWEEP), name)
    text = export(capsys, "slurm", job, "--set", "prompt=$HOME; 'a' \"b\"")
    assert "\n#SBATCH --job-name=wancli-it-s-touch-oops-x-q-\n" in text
    echo = tmp_path / "echo"
    echo.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    echo.chmod(0o755)
    wancli = str(Path(sys.executable).with_name("wancli"))
    script = tmp_path / "job.sbatch"
    script.write_text(text.replace(shlex.quote(wancli), shlex.quote(str(echo))))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    other_folder["env"]["SLURM_ARRAY_TASK_ID"] = "0"
    done = subprocess.run(["bash", script], capture_output=True, **other_folder)
    words = done.stdout.split("\0")
    assert words[:2] == ["render", str(job)]
    assert words[4:] == ["--set", "prompt=$HOME; 'a' \"b\"", "--shard", "0/1", ""]
    assert not list(tmp_path.rglob("oops"))


def test_a_task_that_is_out_of_time_saves_queues_again_and_finishes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path, other_folder: dict[str, Any]
) -> None:
    changes = {**SWEEP, "sampler": {"steps": 40}, "save_every": 1}
    job = write_job(tmp_path, tiny_job(quick, **changes))
    script = tmp_path / "job.sbatch"
    script.write_text(export(capsys, "slurm", job, "--shards", 2, "--gpus", 0))
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    other_folder["env"] |= slurm | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", script], stdout=subprocess.PIPE, **other_folder) as task:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("out/*.state.safetensors")):
            assert time.monotonic() < until
            time.sleep(0.01)
        task.send_signal(signal.SIGUSR1)
        assert task.wait(60) == 75
    assert (tmp_path / "asked").read_text() == "requeue 7_1\n"
    assert [name for name in files_in(tmp_path) if name.endswith(".state.safetensors")]
    done = subprocess.run(["bash", script], stdout=subprocess.PIPE, **other_folder)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{tmp_path}/out/{item}.mp4" for item in (2, 3)]
    assert (tmp_path / "asked").read_text() == "requeue 7_1\n"
    assert [name for name in files_in(tmp_path) if name.endswith(".mp4")] == ["2.mp4", "3.mp4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_cancelled_task_does_not_queue_again(
    tmp_path: Path, other_folder: dict[str, Any], number: signal.Signals
) -> None:
    stub = "trap 'exit 75' TERM USR1; pwd; touch ready; for n in {1..1000}; do sleep 0.02; done"
    batch = tmp_path / "job.sbatch"
    (tmp_path / "work here").mkdir()
    batch.write_text(build_script(["bash", "-c", stub], tmp_path / "work here", "job", SlurmOptions()))
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    other_folder["env"] |= ids | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", batch], stdout=subprocess.PIPE, **other_folder) as task:
        until = time.monotonic() + 15
        while not (tmp_path / "work here" / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        task.send_signal(number)
        assert task.wait(60) == 75
        assert task.stdout
        assert task.stdout.read().strip() == f"{tmp_path}/work here"
    assert (tmp_path / "asked").exists() is (number is signal.SIGUSR1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm", "JOB", "--shards", "5"], "--shards: 5 is more than there are shots and chains (4)"),
        (["slurm", "JOB", "--shard", "1/2"], "--shard: is set by the exported job"),
        (
            ["slurm", "JOB", "--force"],
            "--force: would start again from the first step in every task that queues again",
        ),
        (
            ["openjd", "JOB", "--force"],
            "--force: would start again from the first step in every task that queues again",
        ),
        (["slurm", "JOB", "--socket=x"], "--socket: is set by the exported job"),
        (["slurm", "JOB", "--bogus"], "No such option: --bogus"),
        (["slurm", "JOB", "--mem", "64G\nrm"], "--mem: '64G\\nrm' is not a value that Slurm reads"),
        (["slurm", "JOB", "--set", "framez=5"], "framez"),
        (["slurm", "-"], "JOB: must be a file, which the tasks read"),
        (["openjd", "JOB", "--items", "4"], "--items: 4 is past the last shot (3)"),
        (["openjd", "JOB", "--pick", "seed1"], "--pick: is set by the exported job"),
        (["openjd", "JOB", "--cache-dir", "{{x}}"], "'{{x}}' holds {{, which OpenJD replaces"),
    ],
)
def test_what_would_fail_on_the_farm_fails_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    job = str(write_job(tmp_path, tiny_job(**SWEEP)))
    result: CommandResult = run_wancli(
        capsys, "export", *[job if word == "JOB" else word for word in arguments]
    )
    assert (result.code, result.out) == (2, "")
    assert message in result.err


# ---- Open Job Description ----


def test_a_name_that_yaml_cannot_hold_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = write_job(tmp_path / os.fsdecode(b"u\xff"), tiny_job(**SWEEP))
    result = run_wancli(capsys, "export", "openjd", job)
    assert (result.code, result.out) == (2, "")
    assert "is not UTF-8" in result.err


def test_the_template_is_sound_and_its_defaults_are_all_shots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path
) -> None:
    job = write_job(tmp_path, tiny_job(quick, **SWEEP))
    path = tmp_path / "template.yaml"
    path.write_text(export(capsys, "openjd", job, "--gpus", 2, "--at-once", 3, "--save-every", "5"))
    done = subprocess.run([OPENJD, "check", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    template = yaml.safe_load(path.read_text())
    (step,) = template["steps"]
    assert [one["default"] for one in template["parameterDefinitions"]] == [str(job), "0-3"]
    assert step["hostRequirements"] == {"amounts": [{"name": "amount.worker.gpu", "min": 2}]}
    assert step["script"]["actions"]["onRun"]["args"][-2:] == ["--save-every", "5"]


def test_the_server_of_a_session_has_the_options_of_its_renders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path, other_folder: dict[str, Any]
) -> None:
    job = write_job(tmp_path, tiny_job("there/is/none", **SWEEP))  # without its options nothing can be loaded
    path, cache = tmp_path / "template.yaml", tmp_path / "another cache"
    options = ["--set", f"model={quick}", "--set=prompt=it's $HOME", "--cache-dir", cache, "--retries", 1]
    path.write_text(export(capsys, "openjd", job, "--gpus", 0, *options))
    other_folder["env"].pop("WANCLI_SOCKET", None)
    other_folder["env"]["WANCLI_CACHE"] = str(tmp_path / "unused")
    run = [OPENJD, "run", path, "--step", "Render", "-p", "Items=0"]
    done = subprocess.run(run, capture_output=True, timeout=300, **other_folder)
    assert done.returncode == 0, done.stdout
    phases = manifest_of(tmp_path, "0")["phases"]
    assert [phase["seconds"] for phase in phases if phase["name"] == "load"] == [0.0]
    assert (cache / "hashes.json").exists()
    assert not (tmp_path / "unused" / "hashes.json").exists()


def test_openjd_renders_the_shots_with_one_load_of_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: Path, other_folder: dict[str, Any]
) -> None:
    job = write_job(tmp_path, tiny_job(quick, **SWEEP), "it's a job.yaml")
    path = tmp_path / "template.yaml"
    path.write_text(export(capsys, "openjd", job, "--gpus", 0, "--at-once", 2))
    other_folder["env"].pop("WANCLI_SOCKET", None)
    run = [OPENJD, "run", path, "--step", "Render", "-p", "Items=0-2,3"]
    done = subprocess.run(run, capture_output=True, timeout=300, **other_folder)
    assert done.returncode == 0, done.stdout
    assert [name for name in files_in(tmp_path) if name.endswith(".mp4")] == [f"{i}.mp4" for i in range(4)]
    for item in range(4):
        phases = manifest_of(tmp_path, str(item))["phases"]
        assert [phase["seconds"] for phase in phases if phase["name"] == "load"] == [0.0], item
    processes = [entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline") if entry.exists()]
    assert not [line for line in processes if b"\0serve\0" in line and os.fsencode(job) in line]
