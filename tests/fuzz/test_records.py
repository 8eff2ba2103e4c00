"""Records with odd contents under a valid seal: every command judges them, and none breaks or hangs.

A folder of real outputs is written once. Then one record of it at a time gets another value somewhere, or
becomes something else than a plain file, and a command looks at the folder.
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
from typing import Any

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
def made(tmp_path_factory: pytest.TempPathFactory, shallow: Path) -> Path:
    """A folder with two jobs, all kinds of records of them, and the cache."""
    from block_maps import measured_map

    from wancli.injection import block_map

    folder = tmp_path_factory.mktemp("records")
    options = ["-q", "--cache-dir", str(folder / "cache")]
    assert run(["render", str(write_job(folder, tiny_job(shallow, **JOB))), *options]) == 0
    half = tiny_job(shallow, output="out/half.mp4", seed=7, sampler={"steps": 3})
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


def seal_tensors(path: Path, change: Callable[[Any], Any], dice: random.Random) -> None:
    """A latent or a state with another record or other tensors, and the checksum of these."""
    payload = path.read_bytes()
    size = int.from_bytes(payload[:8], "little")
    document = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["wancli"])
    tensors = load(payload)
    if dice.random() < 0.3:
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
        record = document["record"]
    else:
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


def mutate(value: Any, dice: random.Random) -> Any:
    """A document in which one value is gone, or another."""
    value = copy.deepcopy(value)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(value):
        by_depth.setdefault(len(path), []).append(path)
    path = dice.choice(by_depth[dice.choice([*by_depth])])  # else most were numbers in long lists
    if not path:
        return dice.choice(LEAVES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    match dice.randrange(6):
        case 0:
            del holder[path[-1]]
        case 1 if isinstance(holder, dict):
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


def spoil(kind: str, path: Path, dice: random.Random) -> None:
    def change(value: Any) -> Any:
        for _ in range(dice.choice((1, 1, 2))):
            value = mutate(value, dice) if isinstance(value, dict | list) else value
        return value

    if dice.random() < 0.15:
        replace_file(path, dice)
    else:
        seal(kind, path, change, dice)


def seal(kind: str, path: Path, change: Callable[[Any], Any], dice: random.Random) -> None:
    """Change a record and make its checksum agree."""
    match kind:
        case "manifest":
            seal_manifest(path, change)
        case "latent" | "state":
            seal_tensors(path, change, dice)
        case "entry":
            seal_entry(path, change)
        case _:
            rewrite_json(path, change)


def commands(folder: Path, kind: str, path: Path) -> list[list[object]]:
    """The commands that read records of this kind, the quick ones more than once."""
    out, job, half = folder / "out", folder / "job.yaml", folder / "half.yaml"
    page = ["-o", folder / "page.html", "--csv", folder / "page.csv"]
    videos = [out / "a.mp4", out / "b.mp4"]
    looks: list[list[object]] = [
        ["check", out],
        ["check", job],
        ["status", job],
        ["status", half],
        ["report", out, *page],
        ["report", job, *page],
        ["inspect", path],
    ]
    more: dict[str, list[list[object]]] = {
        "latent": [["decode", path, "-o", folder / "new.mp4"], ["render", job, "-q"]],
        "state": [["render", half, "-q", "--no-wait"], ["check", out]],
        "manifest": [
            ["compare", *videos, "-o", folder / "sheet.png", "-q"],
            ["render", job, "-q"],
        ],
        "report": [["render", job, "-q", "--items", "0"]],
        "comparison": [["render", job, "-q"]],
        "map": [["report", out, *page]],
        "claim": [["render", half, "-q", "--no-wait"], ["check", out]],
        "rates": [["plan", job], ["plan", job, "--json"]],
        "digests": [["plan", job], ["render", job, "-q"]],
        "entry": [["plan", job], ["render", half, "-q", "--no-wait"], ["cache", "ls"], ["cache", "verify"]],
    }
    few = ("rates", "digests", "entry")
    return (more[kind] * 2 + looks[2:4]) if kind in few else looks + more[kind] * 2


def test_a_record_that_the_rig_seals_unchanged_verifies(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the rig would show no more than that a broken seal is noticed."""
    before = run_wancli(capsys, "check", made / "out", "--json")
    assert (before.code, json.loads(before.out)["verified"]) == (0, {"videos": 2, "latents": 2, "states": 1})
    never = random.Random()
    never.random = lambda: 1.0  # type: ignore[method-assign]
    for kind in ("manifest", "latent", "state", "entry"):
        for path in made.glob(KINDS[kind]):
            seal(kind, path, lambda value: value, never)
    assert run_wancli(capsys, "check", made / "out", "--json").out == before.out
    assert run_wancli(capsys, "cache", "verify", "--cache-dir", made / "cache").code == 0
    listed = run_wancli(capsys, "cache", "ls", "--cache-dir", made / "cache")
    assert "damaged" not in listed.out


def test_any_record_is_used_or_refused_by_its_name(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, budget = random.Random(11), Budget(14)
    kept = made.with_name("kept")
    shutil.copytree(made, kept)
    monkeypatch.setenv("WANCLI_CACHE", str(made / "cache"))
    failures = []
    while not budget.over:
        kind = dice.choice([*KINDS])
        path = dice.choice(sorted(made.glob(KINDS[kind])))
        with contextlib.suppress(UnicodeEncodeError):  # a change that no file can hold
            spoil(kind, path, dice)
        data = path.read_bytes()[:3000] if path.is_file() else b"not a file"
        command = [str(word) for word in dice.choice(commands(made, kind, path))]
        with budget.attempt(data):
            said = run_wancli(capsys, *command)
        budget.refused += said.code != 0
        if said.code not in (0, 1, 2, 3, 4, 75) or "Traceback" in said.err:
            failures.append((kind, command, said.code, said.err, data))
        elif said.code in (3, 4) and path.stem.partition(".")[0] not in said.err + said.out:
            failures.append((kind, command, "names no file", said.err, data))
        shutil.rmtree(made)
        shutil.copytree(kept, made, symlinks=True)
    budget.check()
    assert not failures, "\n\n".join(map(str, failures[:5]))
