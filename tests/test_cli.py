"""The command line: its commands and options, its output on both streams, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import typer
import yaml
from jobs import (
    CAT,
    FISH,
    TINY,
    TRANSFORMER,
    CommandResult,
    break_videos_of_5_frames,
    change_tensors,
    checkpoint,
    manifest_of,
    rule,
    run_wancli,
    tiny_job,
    write_job,
)
from safetensors.torch import load_file

from wancli import __version__, cli, errors
from wancli.engine import batch
from wancli.farm import client
from wancli.resources import machine
from wancli.text import encoder
from wancli.video import mp4
from wancli.weights import loader

MODEL = ("--model", TINY, "-q")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs one command line in an empty folder, with `stdin` as bytes."""
    monkeypatch.chdir(tmp_path)

    def said(*arguments: object, stdin: bytes = b"") -> CommandResult:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        return run_wancli(capsys, *arguments)

    return said


# ---- the surface ----


def surface(command: Any, name: str = "wancli") -> list[str]:
    words = [
        "/".join([*p.opts, *p.secondary_opts]) if p.param_type_name == "option" else p.metavar
        for p in command.params
    ]
    lines = [" ".join([name, *words])]
    for sub, inner in getattr(command, "commands", {}).items():
        lines += surface(inner, f"{name} {sub}")
    return lines


def test_these_are_all_commands_and_options_and_a_new_one_is_added_here_on_purpose() -> None:
    assert surface(typer.main.get_command(cli.app)) == [
        "wancli --version --install-completion --show-completion",
        "wancli render JOB --prompt --image -o/--output --model --negative --size --frames --steps --seed"
        " --save-job --set --sweep --items --pick --shard --save-every --fail-fast --max-failures --retries"
        " --no-wait --engine --address --cpus-per-worker --force --json --json-stream --cache-dir --socket"
        " --log-level --progress -q/--quiet",
        "wancli new sweep|render|chain|injection",
        "wancli plan JOB -v/--verbose --memory --set --sweep --items --pick --shard --json --cache-dir",
        "wancli status JOB --set --sweep --items --pick --shard --watch --json --cache-dir",
        "wancli check DIR|JOB --deep --set --sweep --items --pick --shard --json --cache-dir",
        "wancli schema --events",
        "wancli encode JOB|PROMPT... --toward --away --cache/--no-cache --out --model --max-tokens"
        " --truncate --set --sweep --items --pick --shard --json --cache-dir --progress -q/--quiet",
        "wancli decode FILE -o/--output --set --preview --model --force --json --progress -q/--quiet",
        "wancli diff A B --file --model --dit/--no-dit --set --sweep --items --pick --shard --json"
        " --cache-dir -q/--quiet",
        "wancli attention VIDEO|LATENT --word --sigmas --blocks --prompt -o/--output --force --json"
        " --cache-dir --progress -q/--quiet",
        "wancli probe JOB --method --levels --ranges --by --shot -o/--output --set --json --cache-dir"
        " --progress -q/--quiet",
        "wancli compare VIDEO... -o/--output --video --baseline --by --json --progress -q/--quiet",
        "wancli report DIR|JOB -o/--output --csv --cache-dir",
        "wancli explore MODEL -o/--output",
        "wancli fetch REPOSITORY... --list --dry-run --json --cache-dir --progress -q/--quiet",
        "wancli inspect FILE-OR-FOLDER --deep --json",
        "wancli errors --json",
        "wancli serve JOB --socket --idle --daemonize --wait-ready --stop --set --cache-dir",
        "wancli export",
        "wancli export slurm JOB --shards --gpus --time --cpus --mem --partition --account --gres --margin",
        "wancli export openjd JOB --gpus --at-once --items",
        "wancli cache",
        "wancli cache ls --json --cache-dir",
        "wancli cache verify --json --cache-dir",
        "wancli cache prune --max-size --older-than --json --cache-dir",
    ]


def test_every_option_has_help() -> None:
    def options(command: Any) -> Any:
        yield from ((command.name, p) for p in command.params if p.param_type_name == "option")
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    assert [(name, p.name) for name, p in options(typer.main.get_command(cli.app)) if not p.help] == []


def test_without_a_command_the_help_is_printed(say: Any) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = say(*arguments)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("Usage: wancli [OPTIONS] COMMAND")
        assert "render Render every shot of a job, or a prompt." in " ".join(result.out.split())


def test_the_version_is_all_that_version_prints(say: Any) -> None:
    assert say("--version") == (0, f"wancli {__version__}\n", "")
    assert say("--version", "plan", "no.yaml") == (0, f"wancli {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["foo"], "No such command 'foo'."),
        (["plan"], "Missing argument 'JOB'."),
        (["render", "a.yaml", "b.yaml"], "Got unexpected extra argument(s) (b.yaml)"),
        (
            ["render", "a.yaml", "--farce"],
            "No such option: --farce (Possible options: --address, --force, --frames)",
        ),
        (["render", "a.yaml", "--log-level", "loud"], "Invalid value for '--log-level': "),
        (["render", "a.yaml", "--progress", "x"], "Invalid value for '--progress': "),
        (["encode", "x", "--max-tokens", "many"], "Invalid value for '--max-tokens': "),
        (["cache"], "Missing command."),
        (["cache", "prune", "--older-than", "-1"], "Invalid value for '--older-than': "),
        (["plan", "--"], "Missing argument 'JOB'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_a_hint(say: Any, arguments: list[str], message: str) -> None:
    result = say(*arguments)
    first, *rest = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert first.startswith(f"wancli: {message}")
    assert rest == ["  `wancli COMMAND --help` lists the options."]


def test_an_option_that_is_a_key_of_a_job_is_told_how_to_set(say: Any) -> None:
    result = say("plan", "a.yaml", "--model", "DIR")
    assert result.err.splitlines()[1:] == ["  model is a key of a job: --set model=VALUE sets it."]


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--frames", "frames is a key of a job: --set frames=VALUE sets it."),
        ("--seed", "seed is a key of a job: --set seed=VALUE sets it."),
        ("--cfg", "In a job: sampler.guidance."),
        ("--num-frames", "In a job: frames."),
        ("--preview", "`wancli decode NAME.state.safetensors --preview` shows a shot in progress."),
    ],
)
def test_an_option_of_another_program_has_no_wrong_neighbours(say: Any, option: str, hint: str) -> None:
    said = say("plan", "a.yaml", option, "5")
    assert said.err == f"wancli: No such option: {option}\n  {hint}\n"


# ---- the keys that people say most ----


def test_keys_said_as_options_are_those_of_the_job_that_is_saved(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [*f"--size 64x64 --frames 5 --steps 1 --seed 7 --model {quick} --negative".split(), ""]
    say = partial(run_wancli, capsys, "render")
    said = say("--prompt", "A cat: 'grey' #1", *keys, "-o", "out/cat.mp4", "--save-job", "cat.yaml")
    assert said.code == 0, said.err
    assert yaml.safe_load(Path("cat.yaml").read_text()) == {
        "prompt": "A cat: 'grey' #1",
        "output": "out/cat.mp4",
        "model": str(quick),
        "negative": "",
        "size": "64x64",
        "frames": 5,
        "sampler": {"steps": 1},
        "seed": 7,
    }
    assert manifest_of(tmp_path, "cat")["shot"]["seed"] == 7
    assert "1 already done" in say("cat.yaml").err
    assert say("cat.yaml", "--seed", "8", "-o", "other.mp4").code == 0
    assert say("--prompt", "Another", *keys, "--save-job", "cat.yaml").code == 2  # never over another file
    assert say("--prompt", "Another", *keys, "--save-job", "../cat.yaml").code == 2
    both = say("cat.yaml", "--steps", "2", "--set", "sampler.steps=3")
    assert both.err.startswith("wancli: --steps and --set sampler.steps set the same key\n")


# ---- completion ----


COMPLETED = {
    "wancli ren": {"render"},
    "wancli che": {"check"},
    "wancli render --log-level ": {"off", "basic", "verbose", "trace"},
    "wancli render --progress o": {"openjd"},
    "wancli encode --progress ": {"auto", "bar", "plain", "none"},
    "wancli status --js": {"--json"},
    "wancli cache v": {"verify"},
}


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    program = tmp_path / "wancli"
    program.write_text(f"#!{sys.executable}\nfrom wancli.__main__ import main\nmain()\n")
    program.chmod(0o755)
    script = 'eval "$(_WANCLI_COMPLETE=source_bash wancli)"\n'
    for typed in COMPLETED:
        words = typed.split(" ")
        script += (
            f"COMP_WORDS=({' '.join(w or chr(39) * 2 for w in words)}) COMP_CWORD={len(words) - 1}\n"
            "_wancli_completion wancli\n"
            'echo "${COMPREPLY[@]}"\n'
        )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(errors.__file__).parents[1]),
    }
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert (
        dict(zip(COMPLETED, map(set, map(str.split, result.stdout.splitlines())), strict=True)) == COMPLETED
    )


# ---- exit codes ----


@pytest.mark.parametrize(
    "error",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.WancliError) and kind is not errors.WancliError
    ],
)
def test_every_error_exits_with_the_code_of_its_class_and_has_place_message_and_hint(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[errors.WancliError]
) -> None:
    def fails(*_: object) -> None:
        raise error("went wrong\nin two ways", where="here", hint="Try there.")

    monkeypatch.setattr(batch, "render", fails)
    result = say("render", write_job(tmp_path, tiny_job()))
    message = "wancli: here: went wrong\nwancli: in two ways\n  Try there.\n"
    if issubclass(error, errors.Stopped):  # after the summary, and with the command that goes on
        message += f"  resume: wancli render {tmp_path}/job.yaml\n"
        assert (result.code, result.out, result.err.endswith(message)) == (error.status, "", True)
    else:
        assert result == (error.status, "", message)


def test_the_codes_are_those_of_the_architecture() -> None:
    found = {kind.__name__: int(kind.status) for kind in errors.WancliError.__subclasses__()}
    assert (
        found
        | {
            "ShotError": 1,
            "JobError": 2,
            "MachineError": 3,
            "IntegrityError": 4,
            "DoesNotFit": 5,
            "Stopped": 75,
        }
        == found
    )
    assert int(errors.WancliError.status) == 70


def test_a_bug_is_one_line_and_a_log_with_the_traceback(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("so it goes")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(batch, "render", fails)
    result = say("render", write_job(tmp_path, tiny_job()))
    assert (result.code, result.out) == (70, "")
    (log,) = tmp_path.glob("wancli-*.log")
    assert result.err == f"wancli: a bug in wancli {__version__}; please report it with {log}\n"
    assert "ZeroDivisionError: so it goes" in log.read_text()


def test_a_bug_without_a_place_for_its_log_has_the_traceback_on_stderr(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no place")

    monkeypatch.setattr(batch, "render", fails)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", fails)
    result = say("render", write_job(tmp_path, tiny_job()))
    assert result.code == 70
    assert "Traceback" in result.err
    assert "please report it with the lines above" in result.err


def test_with_trace_an_error_shows_its_stack_and_the_shapes_in_it(say: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    change_tensors(model / TRANSFORMER, lambda tensors: tensors["head.head.bias"].fill_(float("nan")))
    result = say("render", write_job(tmp_path, tiny_job(model)), "-q", "--log-level", "trace")
    assert result.code == 1
    assert "denoise.py" in result.err
    assert "v_CTYX: [16, 1, 8, 8] torch.float32" in result.err
    assert "\nwancli: shot 0000: NaN or Inf at step 0, after the last block\n" in result.err


def test_control_characters_of_a_job_do_not_reach_the_terminal(say: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job(labels={"x": "\x1b[2J"}, output="out/{x}.mp4"))
    result = say("plan", job)
    assert result.code == 2
    assert "\x1b" not in result.err
    result = say("plan", write_job(tmp_path, tiny_job(**{"\x1b[2J": 1})))
    assert (result.code, "\x1b" in result.err) == (2, False)
    result = say("plan", write_job(tmp_path, tiny_job(id="\x1b[2J\u202e")), "-v")
    assert (result.code, "\x1b" in result.out) == (0, False)


def test_a_reader_that_closed_stdout_is_neither_a_bug_nor_a_success(tmp_path: Path, lost_reader: int) -> None:
    done = forked.run("plan", write_job(tmp_path, tiny_job()), stdout=lost_reader)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_reader_that_went_away_does_not_end_a_render(tmp_path: Path, known: Path, lost_reader: int) -> None:
    items = [{"id": "a"}, {"id": "b", "seed": 1}]
    job = write_job(tmp_path, tiny_job(known, output="{id}.mp4", items=items))
    done = forked.run("render", job, "-q", stdout=lost_reader)
    said = "wancli: stdout has no reader any more; the work continues\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert (tmp_path / "a.mp4").exists()
    assert (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("memory", "warned"),
    [
        (
            {"device": "cuda"},
            "memory.device is cuda, and no CUDA device is found here: `render` would refuse",
        ),
        ({"device": "cpu", "attention": "sage"}, "attention backend 'sage' is not available: "),
        ({"device": "cpu", "fp8_matmul": True}, "only CUDA devices multiply in fp8: `render` would refuse"),
    ],
)
def test_a_plan_warns_of_what_this_machine_lacks(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any], warned: str
) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    result = say("plan", write_job(tmp_path, tiny_job(memory=memory)))
    assert (result.code, warned in result.err) == (0, True), result.err


def test_names_in_any_alphabet_reach_a_terminal_of_any_encoding(tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job(id="猫", prompt=f"{CAT} 猫"))
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    program = [sys.executable, "-c", "from wancli.__main__ import main; main()", "plan", job, "-v"]
    done = subprocess.run(program, env=latin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u732b" in done.stdout


# ---- what goes to stdout ----


def test_render_prints_one_path_per_finished_shot(say: Any, tmp_path: Path, known: Path) -> None:
    job = write_job(tmp_path, tiny_job(known, output="out/{id}.mp4", items=[{"id": "a"}, {"id": "b"}]))
    result = say("render", job, "--progress", "plain")
    assert result.code == 0
    assert result.out == f"{tmp_path}/out/a.mp4\n{tmp_path}/out/b.mp4\n"
    assert "sample a: done in" in result.err
    assert "2 rendered" in result.err
    again = say("render", job, "-q")
    assert (again.out, again.err) == (result.out, "")


def test_flags_choose_shots_that_keep_their_numbers_and_the_report_keeps_the_others(
    say: Any, tmp_path: Path, known: Path
) -> None:
    job = write_job(tmp_path, tiny_job(known, output="out/{item}-{seed}.mp4", matrix={"seed": [5, 6, 7]}))
    result = say("render", job, "-q", "--items", "2,0")
    assert result == (0, f"{tmp_path}/out/0-5.mp4\n{tmp_path}/out/2-7.mp4\n", "")
    path = tmp_path / "out" / "job.report.json"
    shots = json.loads(path.read_text())["shots"]
    assert [shot["status"] for shot in shots] == ["rendered", "not started", "rendered"]
    result = say("render", job, "-q", "--shard", "1/3", "--json")
    assert [shot["id"] for shot in json.loads(result.out)["shots"]] == ["seed6"]
    after = json.loads(path.read_text())["shots"]
    assert [shot["status"] for shot in after] == ["rendered"] * 3
    assert (after[0], after[2]) == (shots[0], shots[2])
    assert say("render", job, "-q").out.count("\n") == 3


def test_a_picked_shot_is_rendered_larger_into_another_folder(say: Any, tmp_path: Path, known: Path) -> None:
    job = write_job(tmp_path, tiny_job(known, output="out/{seed}.mp4", matrix={"seed": [5, 6, 7]}))
    result = say("render", job, "-q", "--pick", "seed6", "--set", "size=96x64", "-o", f"{tmp_path}/finals/")
    assert result == (0, f"{tmp_path}/finals/seed6.mp4\n", "")
    record = json.loads((tmp_path / "finals" / "seed6.manifest.json").read_text())["shot"]
    assert (record["width"], record["height"], record["seed"]) == (96, 64, 6)
    assert not (tmp_path / "out").exists()
    plan = say(
        "plan", job, "--pick", "seed6,seed7", "--set", f"output={tmp_path}/finals/{{id}}.mp4", "--json"
    )
    assert [shot["id"] for shot in json.loads(plan.out)["shots"]] == ["seed6", "seed7"]
    result = say("render", job, "--pick", "seed9")
    assert (result.code, result.err.splitlines()[0]) == (2, "wancli: --pick: no shot has the id 'seed9'")


def test_choosing_no_shot_or_an_unknown_shot_is_a_usage_error(say: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job())
    for flags, message in (
        (("--shard", "0/2"), "--shard: 0/2 contains no shot"),
        (("--items", "1"), "--items: 1 is past the last shot (0)"),
    ):
        for name in ("render", "plan", "encode"):
            result = say(name, job, *flags)
            assert (result.code, result.out, result.err.splitlines()[0]) == (2, "", f"wancli: {message}")


def test_flags_change_a_job_a_prompt_and_what_is_encoded(say: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job(output="out/{id}.mp4"))
    flags = ("--set", "sampler.steps=3", "--sweep", "prompt=a cat,a dog", "--sweep", "seed=1,2")
    shots = json.loads(say("plan", job, *flags, "--json").out)["shots"]
    assert [(s["index"], s["id"], s["labels"], len(s["timesteps"])) for s in shots] == [
        (0, "a-cat-seed1", {"prompt": "a cat", "seed": 1}, 3),
        (1, "a-cat-seed2", {"prompt": "a cat", "seed": 2}, 3),
        (2, "a-dog-seed1", {"prompt": "a dog", "seed": 1}, 3),
        (3, "a-dog-seed2", {"prompt": "a dog", "seed": 2}, 3),
    ]
    rows = json.loads(say("encode", job, *flags, "--shard", "1/2", "--json", "-q").out)
    assert [row["text"] for row in rows] == ["a dog", "fog"]
    result = say("render", "--prompt", "a cat", "--sweep", "seed=1,2", "-o", "x.mp4")
    assert (result.code, "shots 0 and 1 would both write" in result.err) == (2, True)
    for arguments in (("encode", "a cat"), ("diff", "a", "b")):
        result = say(*arguments, *MODEL, "--set", "seed=1")
        assert (result.code, result.err) == (
            2,
            "wancli: --set, --sweep, --items, --pick and --shard are for a job, and none was given\n",
        )


def test_a_plan_of_many_shots_shows_the_first_and_the_last(say: Any, tmp_path: Path) -> None:
    many = list(range(40))
    job = write_job(
        tmp_path, tiny_job(output="out/{id}.mp4", matrix={"seed": many}, inject=[rule(strength=0)])
    )
    result = say("plan", job)
    lines = re.findall(r"^ *(?:\d+ +(seed\d+)|(…)) ", result.out, re.MULTILINE)
    shown = [name or dots for name, dots in lines]
    assert shown == [*(f"seed{n}" for n in range(8)), "…", *(f"seed{n}" for n in range(36, 40))]
    assert "40 shots: 40 to do; -v shows all" in result.out
    warning = "shots seed0, seed1, seed2 and 37 more: an injection has strength 0 and changes nothing"
    assert result.err == f"wancli: warning: {warning}\n"
    verbose = say("plan", job, "-v").out
    assert all(f"{n}  seed{n} " in verbose for n in many)
    assert verbose.count("sigma  0:") == 1
    assert verbose.count("sigma  as of shot seed0\n") == 39


def test_a_job_from_a_pipe_is_read_once_and_writes_into_the_current_folder(
    say: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = yaml.safe_dump(tiny_job(output="out/{job}.mp4")).encode()

    def pipe() -> str:
        """Return the path that a shell passes for <(cat job.yaml)."""
        reader, writer = os.pipe()
        os.write(writer, job)
        os.close(writer)
        return f"/dev/fd/{reader}"

    planned = say("plan", pipe(), "--json")
    assert json.loads(planned.out)["shots"][0]["output"] == f"{tmp_path}/out/pipe.mp4"
    path = pipe()
    exported = say("export", "slurm", path, "--shards", "2")
    assert (exported.code, exported.err) == (2, "wancli: JOB: must be a file, which the tasks read\n")
    assert client.render(["render", path], "auto", tmp_path, quiet=True) is None
    refusal = f"wancli: {path}: a server cannot read this pipe; rendering without it\n"
    assert capsys.readouterr().err == refusal


def test_a_job_on_stdin_starts_its_paths_in_the_current_folder(say: Any, tmp_path: Path) -> None:
    job = json.dumps(tiny_job(output="out/{job}.mp4", prompt=f"{CAT} 🐱")).encode()
    planned = say("plan", "-", "--json", stdin=job)
    assert json.loads(planned.out)["shots"][0]["output"] == f"{tmp_path}/out/stdin.mp4"
    said = say("render", "-", "-q", stdin=job)
    assert said == (0, f"{tmp_path}/out/stdin.mp4\n", "")
    bad = say("render", "-", stdin=b"prompt: [\n")
    assert bad.code == 2
    assert bad.err.startswith("wancli: stdin:2:1: is not YAML: ")


def test_json_of_a_render_is_one_document_also_when_a_shot_fails(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Path
) -> None:
    break_videos_of_5_frames(monkeypatch)
    items = [{"id": "a", "frames": 5}, {"id": "b"}]
    result = say("render", write_job(tmp_path, tiny_job(known, output="{id}.mp4", items=items)), "--json")
    report = json.loads(result.out)
    assert result.code == 1
    assert [shot["status"] for shot in report["shots"]] == ["failed", "rendered"]
    assert report["shots"][0]["error"]["code"] == "shot.not_finite"


def test_a_job_error_leaves_stdout_empty_also_with_json(say: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job(size="1x1"))
    for name in ("render", "plan", "encode"):
        result = say(name, job, "--json")
        assert (result.code, result.out) == (2, "")


def test_warnings_go_to_stderr(say: Any, tmp_path: Path, known: Path) -> None:
    job = write_job(tmp_path, tiny_job(known, inject=[rule(blocks="late", strength=0)]))
    for result in (say("plan", job), say("render", job)):
        assert result.code == 0
        assert "warning: shot 0000: an injection has strength 0 and changes nothing" in result.err
        assert "warning:" not in result.out


# ---- encode ----


def test_encode_prints_a_key_per_prompt_in_the_order_given(say: Any) -> None:
    result = say("encode", *MODEL, "a cat", "a dog", "  a   cat ")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[1:4] for row in rows] == [
        ["4", "tokens", "encoded"],
        ["6", "tokens", "encoded"],
        rows[0][1:4],
    ]
    assert rows[0][0] == rows[2][0] != rows[1][0]
    assert [row["cached"] for row in json.loads(say("encode", *MODEL, "--json", "a dog", "new").out)] == [
        True,
        False,
    ]


def test_encode_keeps_the_order_of_prompts_and_jobs(say: Any, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_job())
    rows = json.loads(say("encode", *MODEL, "--json", "first", job, "last").out)
    assert [row["text"] for row in rows] == ["first", CAT, "fog", "last"]


def test_encode_takes_prompts_or_a_job_on_stdin(say: Any, tmp_path: Path) -> None:
    lines = say("encode", *MODEL, "-", stdin=b"one cat\n\ntwo cats\r\n")
    assert [line.split("encoded  ")[1].rstrip() for line in lines.out.splitlines()] == ["one cat", "two cats"]
    job = tiny_job(inject=[rule()])
    for text in (yaml.safe_dump(job), json.dumps(job), f"# a comment\n{yaml.safe_dump(job)}"):
        rows = json.loads(say("encode", "-", "-q", "--json", stdin=text.encode()).out)
        assert [row["text"] for row in rows] == [CAT, "fog", FISH]
    assert say("encode", *MODEL, "-", stdin=b"\n\n").err == "wancli: stdin: no prompts to encode\n"
    assert say("encode", *MODEL, "-", stdin=b"\xff").code == 2


def test_encode_fills_the_cache_for_a_render(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path, tiny_job(inject=[rule()]))
    assert say("encode", "--cache", job, "-q", "--cache-dir", tmp_path / "c").code == 0
    monkeypatch.setattr(encoder, "load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
    assert say("render", job, "-q", "--cache-dir", tmp_path / "c").code == 0


def test_encode_without_the_cache_keeps_nothing(say: Any, tmp_path: Path) -> None:
    assert say("encode", "--no-cache", *MODEL, "a cat", "--cache-dir", tmp_path / "c").code == 0
    assert not list((tmp_path / "c").rglob("*.entry"))


def test_encode_writes_a_file_once(say: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.safetensors"
    assert say("encode", *MODEL, "--out", out, "a cat", "a dog").code == 0
    assert [tuple(rows.shape) for rows in load_file(out).values()] == [(4, 64), (6, 64)]
    assert say("encode", *MODEL, "--out", out, "a cat", "a dog").code == 0
    result = say("encode", *MODEL, "--out", out, "a fog")
    assert result.code == 2
    assert result.err.splitlines()[1:] == ["  Give --out another name."]
    assert len(load_file(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--model", "no"], "--model: 'no' not found"),
        (["x", "--model", TINY, "--max-tokens", "300"], "--max-tokens: 300 is not 256 or 512"),
        (["a " * 300, "--model", TINY], "the prompt has 301 tokens, text.max_tokens is 256"),
        (["no.yaml"], "no.yaml: cannot be read: No such file or directory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_encode_names_the_missing_argument(
    say: Any, tmp_path: Path, arguments: list[object], message: str
) -> None:
    result = say("encode", *arguments, "-q")
    assert result.code in (2, 4)
    assert result.err.splitlines()[0] == f"wancli: {message.format(tmp=tmp_path)}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--wait-ready"], "--wait-ready: needs --daemonize"),
        (["serve", "--set", "seed=1"], "--set: needs a JOB to load"),
        (["serve", "--idle", "soon"], "--idle: 'soon' is not a time; write 30s, 5min or 1h"),
        (
            ["render", "job.yaml", "--json", "--progress", "openjd"],
            "stdout can take one of --json, --json-stream and --progress openjd",
        ),
        (
            ["render", "job.yaml", "--fail-fast", "--max-failures", "2"],
            "--fail-fast is --max-failures 1; give one of them",
        ),
        (
            ["render", "job.yaml", "--engine", "ray", "--socket", "auto"],
            "--socket is for a server on this host; --engine ray has its own workers",
        ),
        (
            ["render", "job.yaml", "--address", "auto"],
            "--address and --cpus-per-worker are options of --engine ray",
        ),
        (
            ["render", "--prompt", "A red circle moves left.", "--engine", "ray"],
            "--engine ray needs a job file, which its workers read themselves",
        ),
        (["compare", "odd.mp4", "-o", "s.png"], "odd.mp4: has no frames"),
    ],
    ids=lambda said: " ".join(said) if isinstance(said, list) else "",
)
def test_what_does_not_go_together_is_one_line(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, tiny_job())
    (tmp_path / "odd.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    monkeypatch.setattr(mp4, "read_info", lambda _: mp4.VideoInfo(0, 8, 64, 64))
    said = say(*arguments)
    assert said.code == 2
    assert said.err.splitlines()[0] == f"wancli: {message}"


def test_encode_cuts_prompts_only_with_truncate(say: Any) -> None:
    (row,) = json.loads(say("encode", *MODEL, "--truncate", "--json", "a " * 300).out)
    assert (row["tokens"], row["truncated"]) == (256, True)


# ---- diff ----


def test_diff_compares_two_prompts_in_words_and_as_json(say: Any) -> None:
    result = say("diff", CAT, FISH, *MODEL)
    assert result.code == 0
    for part in (
        "token set, raw",
        "token set, projected",
        "legacy figures: ",
        "verdict: ",
        "K/V per block",
        "hint: ",
    ):
        assert part in result.out
    document = json.loads(say("diff", CAT, FISH, *MODEL, "--json").out)
    assert (document["a"]["text"], document["b"]["text"]) == (CAT, FISH)
    assert len(document["blocks"]) == 40
    assert document["verdict"]["figure"] == "token-set distance after the text projection"


def test_diff_without_the_transformer_does_not_load_it(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "load_transformer", lambda *_: pytest.fail("it was loaded"))
    document = json.loads(say("diff", CAT, FISH, *MODEL, "--json", "--no-dit").out)
    assert (document["projected"], document["blocks"]) == (None, [])


def test_diff_reads_a_job_a_text_and_an_embedding_file(say: Any, tmp_path: Path) -> None:
    options = ("--no-dit", "--json", "-q")
    items = [{"inject": [rule(), rule(prompt="rain")]}, {"seed": 2}, {"inject": [rule()]}]
    job = write_job(tmp_path, tiny_job(output="{item}.mp4", items=items))
    pairs = json.loads(say("diff", "--file", job, *options).out)
    assert [(pair["a"]["text"], pair["b"]["text"]) for pair in pairs] == [(CAT, FISH), (CAT, "rain")]
    for end in ("\n", "\r\n"):
        (tmp_path / "two.txt").write_bytes(f"{CAT}{end}{end}{FISH}{end}".encode())
        pair = json.loads(say("diff", "--file", "two.txt", "--model", TINY, *options).out)
        assert (pair["a"]["text"], pair["b"]["text"]) == (CAT, FISH)
    assert say("encode", *MODEL, "--out", "two.safetensors", CAT, FISH).code == 0
    assert json.loads(say("diff", "--file", "two.safetensors", "--model", TINY, *options).out) == pair


def test_diff_pairs_what_is_injected_with_each_segment_of_a_prompt_over_time(
    say: Any, tmp_path: Path, quick: Path
) -> None:
    segments = [{"text": "A cat", "frames": "0-4"}, {"text": "A dog", "frames": "5-8"}]
    job = write_job(tmp_path, tiny_job(quick, prompt=segments, frames=9, inject=[rule(blocks=0)]))
    pairs = json.loads(say("diff", "--file", job, "--json", "--no-dit").out)
    assert [(pair["a"]["text"], pair["b"]["text"]) for pair in pairs] == [
        ("A cat", FISH),
        ("A dog", FISH),
        ("A cat", "A dog"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give two prompts, or --file FILE"),
        (["a"], "give two prompts, or --file FILE"),
        (["a", "b", "c"], "give two prompts, or --file FILE"),
        (["a", "--file", "one.txt"], "give two prompts, or --file FILE"),
        (["a", "b", "--file", "one.txt"], "give two prompts, or --file FILE"),
        (["--file", "one.txt"], "one.txt: holds 1 prompts; two are needed, an empty line between"),
        (["--file", "no.txt"], "no.txt: cannot be read: No such file or directory"),
        (["--file", "plain.yaml"], "plain.yaml: injects no prompt, so there is nothing to compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_diff_names_the_missing_argument(
    say: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "one.txt").write_text("a cat\n")
    write_job(tmp_path, tiny_job(), "plain.yaml")
    result = say("diff", *arguments, *MODEL)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == f"wancli: {message}"


# ---- cache ----


@pytest.fixture
def cache(say: Any, tmp_path: Path) -> Path:
    """A cache of three entries, the first the oldest."""
    folder = tmp_path / "cache"
    assert say("encode", *MODEL, "--cache-dir", folder, "a cat", "a dog", "a very long fog").code == 0
    entries = {path.stat().st_size: path for path in folder.rglob("*.entry")}
    for age, size in enumerate(sorted(entries, reverse=True)):
        then = time.time() - 86400 * (age + 1)
        os.utime(entries[size], (then, then))
    return folder


def test_an_empty_cache_is_listed_verified_and_pruned(say: Any, tmp_path: Path) -> None:
    there = ("--cache-dir", tmp_path / "none")
    assert say("cache", "ls", *there).out.splitlines()[-1] == "0 entries, 0 B"
    assert say("cache", "verify", *there) == (0, "0 of 0 entries verify\n", "")
    assert say("cache", "prune", *there) == (0, "removed 0 entries, 0 B\n", "")
    assert not (tmp_path / "none").exists()


def test_ls_lists_the_newest_first_and_leaves_every_entry_as_old_as_it_is(say: Any, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.entry")}
    rows = json.loads(say("cache", "ls", "--json", "--cache-dir", cache).out)
    assert [row["text"] for row in rows] == ["a very long fog", "a dog", "a cat"]
    table = say("cache", "ls", "--cache-dir", cache).out
    assert table.index("a very long fog") < table.index("a dog") < table.index("a cat")
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*.entry")}


def test_a_damaged_entry_is_found_and_encoded_again(say: Any, cache: Path) -> None:
    there = ("--cache-dir", cache)
    assert say("cache", "verify", *there).out == "3 of 3 entries verify\n"
    path = next(p for p in cache.rglob("*.entry"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = say("cache", "verify", *there)
    assert (result.code, result.out) == (4, f"{path}\n2 of 3 entries verify\n")
    assert json.loads(say("cache", "verify", "--json", *there).out) == {"entries": 3, "damaged": [str(path)]}
    texts = [row["text"] for row in json.loads(say("cache", "ls", "--json", *there).out)]
    assert texts.count("(damaged; a render computes it again)") == 1
    rows = json.loads(say("encode", *MODEL, "--json", *there, "a cat", "a dog", "a very long fog").out)
    assert sorted(row["cached"] for row in rows) == [False, True, True]
    assert say("cache", "verify", *there).code == 0


def test_prune_keeps_the_newest_up_to_a_size(say: Any, cache: Path) -> None:
    sizes = sorted((path.stat().st_size for path in cache.rglob("*.entry")), reverse=True)
    result = say("cache", "prune", "--max-size", f"{sum(sizes[:2])}B", "--json", "--cache-dir", cache)
    assert json.loads(result.out)["bytes"] == sizes[2]
    assert [row["text"] for row in json.loads(say("cache", "ls", "--json", "--cache-dir", cache).out)] == [
        "a very long fog",
        "a dog",
    ]


def test_prune_removes_what_was_not_used_for_some_days(say: Any, cache: Path) -> None:
    result = say("cache", "prune", "--older-than", "1.5", "--cache-dir", cache)
    assert result.out.startswith("removed 2 entries, ")
    assert len(list(cache.rglob("*.entry"))) == 1


@pytest.mark.parametrize("size", ["", "x", "-1", "1.5.2GiB", "10 XB", "1e3"])
def test_prune_takes_only_sizes(say: Any, cache: Path, size: str) -> None:
    result = say("cache", "prune", f"--max-size={size}", "--cache-dir", cache)
    assert result.code == 2
    assert result.err == f"wancli: --max-size: {size!r} is not a size; write 500MiB or 2GiB\n"
    assert len(list(cache.rglob("*.entry"))) == 3


def test_the_cache_may_be_named_by_the_environment(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANCLI_CACHE", str(tmp_path / "mine"))
    assert say("encode", *MODEL, "a cat").code == 0
    assert len(list((tmp_path / "mine").rglob("*.entry"))) == 1


def test_a_cache_folder_that_cannot_be_is_an_error_of_the_machine(say: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = say("cache", "ls", "--cache-dir", tmp_path / "file" / "cache")
    assert result.code in (0, 3)
