"""Records with odd contents under a valid seal: every command judges them, and none breaks or hangs.

A folder of real outputs is written once. Then one record of it at a time gets another value somewhere, or
becomes something else than a plain file, and a command looks at the folder. Every command that reads records
of a kind sees each way to spoil one at least once, then chance decides until the time is over.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from fuzzing import Budget
from jobs import count_forwards, rule, run_wancli, tiny_job, write_job
from safetensors.torch import load, save

from wancli.cli import run
from wancli.storage import cache, manifest

JOB = {
    "items": [{"id": "a"}, {"id": "b", "seed": 2**63 - 1, "inject": [rule(blocks="2-3")]}],
    "output": "out/{id}.mp4",
    "video": {"keep_latents": True},
    "measure": True,
    "compare": True,
}
LEAVES: list[Any] = [
    *(None, [], {}, "", "x", "0", True, -1, 0, 1, 10**18, 10**39, 10**60, 1e308, -0.5, "NaN"),
    *("a\0b", "/dev/zero", "../../x", "..", "/", "\ud800", "x" * 5000, "<script>", [None], {"": None}),
    *(float("nan"), float("inf"), json.loads("[" * 60 + "]" * 60), {"a": {"b": [{}]}}),
]
Way = Literal["gone", "other key", "other value", "other tensors", "no record"]
WAYS: tuple[Way, ...] = get_args(Way)
KINDS = {
    "manifest": "out/a.manifest.json",
    "latent": "out/b.latents.safetensors",
    "state": "out/half.state.safetensors",
    "report": "out/job.report.json",
    "comparison": "out/job.compare.json",
    "map": "out/job.map.inject.json",
    "claim": "out/.wancli/claims/half.json",
    "rates": "cache/rates.json",
    "digests": "cache/hashes.json",
    "entry": "cache/embeddings/*/*.entry",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """A folder with two jobs, all kinds of records of them, and the cache."""
    from block_maps import measured_map

    from wancli.injection import block_map

    folder = tmp_path_factory.mktemp("records")
    options = ["-q", "--cache-dir", str(folder / "cache")]
    assert run(["render", str(write_job(folder, tiny_job(quick, **JOB))), *options]) == 0
    half = tiny_job(quick, output="out/half.mp4", seed=7, sampler={"steps": 3})
    with pytest.MonkeyPatch.context() as patch:
        count_forwards(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 2 else None)
        assert run(["render", str(write_job(folder, half, "half.yaml")), *options]) == 75
    block_map.write(folder / KINDS["map"], measured_map())
    claim = folder / KINDS["claim"]
    claim.parent.mkdir(parents=True)
    body = {"host": "elsewhere", "boot": "b", "space": "s", "pid": 7, "born": "1", "started": "2026-01-01"}
    claim.write_text(json.dumps(body | {"token": "t"}))
    return folder


def canonical(value: Any) -> bytes:
    """What is hashed."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")


def seal_manifest(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_bytes())
    body = change({key: value for key, value in document.items() if key not in ("schema", "seal")})
    content = {"schema": manifest.SCHEMA, **body} if isinstance(body, dict) else {"schema": body}
    content["seal"] = hashlib.sha256(canonical(content)).hexdigest()
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode(errors="surrogatepass"))


def rewrite_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))


def seal_tensors(path: Path, change: Callable[[Any], Any], dice: random.Random | None = None) -> None:
    """A latent or a state with another record, or with `dice` other tensors, and the checksum of these."""
    payload = path.read_bytes()
    size = int.from_bytes(payload[:8], "little")
    document = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["wancli"])
    tensors = load(payload)
    if dice:
        name = dice.choice([*tensors])
        forms: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda x: x.bfloat16(),
            lambda x: x.to(torch.float8_e4m3fn),
            lambda x: x[:, :0],
            lambda x: x.flatten(),
            lambda x: torch.tensor(1.0),
            lambda x: torch.cat([x, x], -1),
            lambda x: torch.cat([x, x]),
            lambda x: x * float("nan"),
        ]
        tensors[name] = dice.choice(forms)(tensors[name]).contiguous()
        if dice.random() < 0.2:
            tensors[dice.choice(["history.9", "", "z"])] = torch.ones(2)
    record = change(document["record"])
    about = [[name, [*tensors[name].shape], str(tensors[name].dtype)] for name in sorted(tensors)]
    digest = hashlib.sha256(canonical({"tensors": about, "record": record}))
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    document = {"record": record, "sha256": digest.hexdigest()}
    path.write_bytes(save(tensors, {"wancli": json.dumps(document)}))


def seal_entry(path: Path, change: Callable[[Any], Any]) -> None:
    """An entry of the cache whose embedding has other texts or rows, all sealed."""
    payload = cache.unseal(path.read_bytes(), path.stem)
    size = int.from_bytes(payload[:8], "little")
    record = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["wancli"])
    tensors = load(payload)
    del record["sha256"]
    record = change(record)
    rows = [tensors[name] for name in sorted(tensors)]
    if isinstance(record, dict):
        forms = [[str(each.dtype), *each.shape] for each in rows]
        text = json.dumps(record | {"forms": forms}, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode())
        for each in rows:
            digest.update(each.contiguous().view(torch.uint8).numpy().data)
        record["sha256"] = digest.hexdigest()
    path.write_bytes(cache.seal(save(tensors, {"wancli": json.dumps(record)}), path.stem))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def mutate(value: Any, way: Way, dice: random.Random) -> Any:
    """A document in which one value is gone, has another key, or is another."""
    value = copy.deepcopy(value)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(value):
        if way == "other value" or (path and (way == "gone" or isinstance(path[-1], str))):
            by_depth.setdefault(len(path), []).append(path)
    path = dice.choice(by_depth[dice.choice([*by_depth])])  # else most were numbers in long lists
    if not path:
        return dice.choice(LEAVES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    match way:
        case "gone":
            del holder[path[-1]]
        case "other key":
            holder[dice.choice(["evil", "", "x\0", "0", "999999"])] = holder.pop(path[-1])
        case _:
            holder[path[-1]] = dice.choice(LEAVES)
    return value


def replace_file(path: Path, dice: random.Random) -> None:
    """What is not a record at all."""
    data = path.read_bytes()
    path.unlink()
    forms: list[Callable[[], object]] = [
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(data + data),
        lambda: path.write_bytes(data[: dice.randrange(len(data))]),
        lambda: path.write_bytes(b"\0" * 100),
        lambda: path.write_bytes(struct.pack("<Q", 2**62) + data),
        lambda: path.write_bytes(b"[" * 100_000),
    ]
    dice.choice(forms)()


def spoil(kind: str, way: Way, path: Path, dice: random.Random) -> None:
    def change(value: Any) -> Any:
        value = mutate(value, way, dice)
        if dice.random() < 0.3 and isinstance(value, dict | list):
            value = mutate(value, "other value", dice)
        return value

    match way:
        case "no record":
            replace_file(path, dice)
        case "other tensors":
            seal_tensors(path, lambda record: record, dice)
        case _:
            seal(kind, path, change)


def seal(kind: str, path: Path, change: Callable[[Any], Any]) -> None:
    """Change a record and make its checksum agree."""
    match kind:
        case "manifest":
            seal_manifest(path, change)
        case "latent" | "state":
            seal_tensors(path, change)
        case "entry":
            seal_entry(path, change)
        case _:
            rewrite_json(path, change)


def commands(folder: Path, kind: str, path: Path) -> list[list[object]]:
    """The commands that read records of this kind."""
    out, job, half = folder / "out", folder / "job.yaml", folder / "half.yaml"
    page = ["-o", folder / "page.html", "--csv", folder / "page.csv"]
    looks: list[list[object]] = [
        ["check", out],
        ["check", job],
        ["status", job],
        ["status", half],
        ["report", out, *page],
        ["report", job, *page],
        ["inspect", path],
        ["inspect", out],
    ]
    render, resume = ["render", job, "-q"], ["render", half, "-q", "--no-wait"]
    compare = ["compare", out / "a.mp4", out / "b.mp4", "-o", folder / "sheet.png", "-q"]
    match kind:
        case "latent":
            return [*looks, ["decode", path, "-o", folder / "new.mp4"], render]
        case "manifest":
            return [*looks, compare, render]
        case "report" | "comparison":
            return [*looks, render]
        case "state" | "claim":
            return [*looks, resume]
        case "map":
            return looks
        case "rates":
            return [["plan", job], ["plan", job, "--json"], ["status", job], render]
        case "digests":
            return [["plan", job], ["status", half], render]
        case _:
            return [["plan", job], ["status", half], resume, ["cache", "ls"], ["cache", "verify"]]


def trials(dice: random.Random) -> list[tuple[str, int, Way]]:
    """Every kind with the number of every command and every way, in any order."""
    every = [
        (kind, number, way)
        for kind in KINDS
        for number in range(len(commands(Path(), kind, Path())))
        for way in WAYS
        if way != "other tensors" or kind in ("latent", "state")
    ]
    return dice.sample(every, len(every))


def restore(made: Path, kept: Path) -> None:
    """Undo what a trial changed: files by their size and time of change, and whatever is no file."""
    for path in sorted(made.rglob("*"), reverse=True):
        before = kept / path.relative_to(made)
        if path.is_dir() and not path.is_symlink():
            if not before.is_dir():
                shutil.rmtree(path)
        elif stamp(path) != stamp(before):
            path.unlink()
    for before in sorted(kept.rglob("*")):
        path = made / before.relative_to(kept)
        if before.is_dir():
            path.mkdir(exist_ok=True)
        elif not path.exists():
            shutil.copy2(before, path)


def stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_mode, found.st_size, found.st_mtime_ns


def names(text: str, path: Path) -> bool:
    """Whether a text names a record or the video that it is of; tables break long lines anywhere."""
    video = path.with_name(path.name.partition(".")[0] + ".mp4")
    joined = "".join(text.split())
    return any(str(each) in joined or each.name in joined for each in (path, video))


def test_a_record_that_the_rig_seals_unchanged_verifies(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the rig would show no more than that a broken seal is noticed."""
    before = run_wancli(capsys, "check", made / "out", "--json")
    assert (before.code, json.loads(before.out)["verified"]) == (0, {"videos": 3, "latents": 3, "states": 1})
    for kind in ("manifest", "latent", "state", "entry"):
        for path in made.glob(KINDS[kind]):
            seal(kind, path, lambda value: value)
    assert run_wancli(capsys, "check", made / "out", "--json").out == before.out
    assert run_wancli(capsys, "cache", "verify", "--cache-dir", made / "cache").code == 0
    listed = run_wancli(capsys, "cache", "ls", "--cache-dir", made / "cache")
    assert "damaged" not in listed.out


def test_any_record_is_used_or_refused_by_its_name(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, budget = random.Random(11), Budget(1)
    kept = made.with_name("kept")
    shutil.copytree(made, kept)
    monkeypatch.setenv("WANCLI_CACHE", str(made / "cache"))
    failures, every = [], trials(dice)
    while budget.count < len(every) or not budget.over:
        kind, number, way = every[budget.count] if budget.count < len(every) else dice.choice(every)
        path = dice.choice(sorted(made.glob(KINDS[kind])))
        with contextlib.suppress(UnicodeEncodeError):  # a change that no file can hold
            spoil(kind, way, path, dice)
        data = path.read_bytes()[:3000] if path.is_file() else b"not a file"
        command = [str(word) for word in commands(made, kind, path)[number]]
        with budget.attempt(data):
            result = run_wancli(capsys, *command)
        budget.refused += result.code != 0
        if result.code not in (0, 1, 2, 3, 4, 75) or "Traceback" in result.err:
            failures.append((kind, way, command, result.code, result.err, data))
        elif result.code in (3, 4) and not names(result.err + result.out, path):
            failures.append((kind, way, command, "names no file", result.err + result.out, data))
        restore(made, kept)
    budget.check()
    assert not failures, "\n\n".join(map(str, failures[:5]))
