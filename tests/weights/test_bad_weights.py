"""Weights that are damaged, lie, or are another model's, as a user meets them: the message and the exit code.

Every case goes through the command line and ends before anything is sampled, with the file, what in it
is wrong, and a way out.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import gguf
import pytest
import torch
from jobs import (
    SPIECE,
    T5,
    TRANSFORMER,
    VAE,
    CommandResult,
    change_tensors,
    checkpoint,
    forbid_calls,
    run_wancli,
    tiny_job,
    write_job,
)
from safetensors.torch import load_file, save_file
from weight_files import write_gguf

Q = "blocks.0.self_attn.q.weight"
E4M3 = torch.float8_e4m3fn
Damage = Callable[[Path], Any]  # of a copy of the checkpoint; returns what the job says about it, if anything


@pytest.fixture
def model(tmp_path: Path, shallow: Path) -> Path:
    return checkpoint(tmp_path, shallow)


@pytest.fixture
def meet(
    model: Path,
    tmp_path: Path,
    warm: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., CommandResult]:
    """What a command says about the checkpoint after it was damaged. Nothing may be encoded or sampled."""
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    forbid_calls(monkeypatch)

    def met(damage: Damage, verb: str = "render") -> CommandResult:
        said = damage(model) or {}
        if verb == "inspect":
            return run_wancli(capsys, verb, model)
        return run_wancli(capsys, verb, write_job(tmp_path, tiny_job(**{"model": model} | said)))

    return met


def cut(path: Path, count: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def in_shards(model: Path) -> list[Path]:
    tensors = load_file(model / TRANSFORMER)
    (model / TRANSFORMER).unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = {n: {k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == n} for n in (0, 1)}
    for n, half in halves.items():
        save_file(half, model / names[n])
    index = {"weight_map": {key: names[n] for n, half in halves.items() for key in half}}
    (model / f"{TRANSFORMER}.index.json").write_text(json.dumps(index))
    return [model / name for name in names]


def truncated_shard(model: Path) -> None:
    cut(in_shards(model)[1])


def missing_shard(model: Path) -> None:
    in_shards(model)[1].unlink()


def in_fp8(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """The transformer as ComfyUI's fp8_scaled, changed."""

    def damage(model: Path) -> None:
        def quantize(tensors: dict[str, torch.Tensor]) -> None:
            for name in [n for n in tensors if n.endswith("attn.q.weight")]:
                tensors[name] = tensors[name].to(E4M3)
                tensors[name.replace("weight", "scale_weight")] = torch.tensor(1.0)
            tensors["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
            change(tensors)

        change_tensors(model / TRANSFORMER, quantize)

    return damage


def scale(value: float) -> Damage:
    return in_fp8(lambda tensors: tensors.update({Q.replace("weight", "scale_weight"): torch.tensor(value)}))


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The transformer's file with a header that was changed, over the same data."""

    def damage(model: Path) -> None:
        path = model / TRANSFORMER
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        document = json.loads(data[8 : 8 + size])
        text = change(document)
        text = (text if isinstance(text, str) else json.dumps(document)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def twice(document: dict[str, Any]) -> str:
    return json.dumps(document)[:-1] + f', "{Q}": ' + json.dumps(document[Q]) + "}"


def long_header(count: int) -> Damage:
    def damage(model: Path) -> None:
        data = (model / TRANSFORMER).read_bytes()
        (model / TRANSFORMER).write_bytes(struct.pack("<Q", count) + data[8:])

    return damage


def changed(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda model: change_tensors(model / name, change)


CASES: dict[str, tuple[Damage, str]] = {
    "a truncated file": (
        lambda model: cut(model / TRANSFORMER),
        rf"{TRANSFORMER}: truncated or damaged: its tensors fill [\d,]+ bytes, the file has [\d,]+ for them",
    ),
    "a truncated shard": (truncated_shard, r"-00002-of-00002.safetensors: truncated or damaged: its tensors"),
    "a missing shard": (missing_shard, r"-00002-of-00002.safetensors: no such file"),
    "a missing scale": (
        in_fp8(lambda tensors: tensors.pop(Q.replace("weight", "scale_weight"))),
        rf"{TRANSFORMER}: {Q} is scaled fp8, but its scale is missing",
    ),
    **{
        f"a scale of {value}": (
            scale(value),
            rf"{TRANSFORMER}: blocks.0.self_attn.q.scale_weight holds {shown}, and scales are positive",
        )
        for value, shown in ((math.nan, "nan"), (0.0, "0"), (-1.0, "-1"), (math.inf, "inf"))
    },
    "offsets beyond the file": (
        header(lambda found: found[Q].update(data_offsets=[10**12, 10**12 + 9216])),
        rf"{TRANSFORMER}: truncated or damaged: the bytes of ",
    ),
    "ranges that overlap": (
        header(lambda found: found[Q].update(data_offsets=[0, 9216])),
        rf"{TRANSFORMER}: truncated or damaged: the bytes of \S+, [\d,]+ to [\d,]+, overlap those",
    ),
    "a negative size": (
        header(lambda found: found[Q].update(shape=[-48, 48])),
        rf"{TRANSFORMER}: .*{Q} says no usable dtype, shape and data_offsets \(-48 is not a natural number\)",
    ),
    "a shape for other bytes": (
        header(lambda found: found[Q].update(shape=[48, 480])),
        rf"{TRANSFORMER}: .*{Q}, F32 \[48, 480\], needs 92,160 bytes and has 9,216",
    ),
    "an unknown dtype": (
        header(lambda found: found[Q].update(dtype="F7")),
        rf"{TRANSFORMER}: .*{Q} has the unknown dtype F7",
    ),
    "a key twice": (header(twice), rf"{TRANSFORMER}: .*{Q} appears twice"),
    "a header longer than the file": (
        long_header(10**15),
        rf"{TRANSFORMER}: .*its header claims 1,000,000,000,000,000 bytes, the file has [\d,]+",
    ),
    "a tensor that is missing": (
        changed(TRANSFORMER, lambda tensors: tensors.pop(Q)),
        rf"{TRANSFORMER}: the tensors do not fit the model: missing {Q}",
    ),
    "a tensor that no Wan has": (
        changed(TRANSFORMER, lambda tensors: tensors.update(surprise=torch.zeros(2))),
        rf"{TRANSFORMER}: the tensors do not fit the model: unexpected surprise",
    ),
    "a tensor of another shape": (
        changed(TRANSFORMER, lambda tensors: tensors.update({Q: torch.zeros(48, 49)})),
        rf"{TRANSFORMER}: the tensors do not fit the model: {Q} is \[48, 49\], expected \[48, 48\]",
    ),
    "a text encoder without a norm": (
        changed(T5, lambda tensors: tensors.pop("norm.weight")),
        rf"{T5}: the tensors do not fit the model: missing encoder.final_layer_norm.weight",
    ),
    "a VAE without a bias": (
        changed(VAE, lambda tensors: tensors.pop("decoder.conv1.bias")),
        rf"{VAE}: the tensors do not fit the model: missing decoder.conv1.bias",
    ),
    "a VAE with another shape": (
        changed(VAE, lambda tensors: tensors.update({"decoder.conv1.bias": torch.zeros(3)})),
        rf"{VAE}: the tensors do not fit the model: decoder.conv1.bias is \[3\], expected \[",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_reported_before_anything_is_sampled(case: str, meet: Callable[..., CommandResult]) -> None:
    damage, message = CASES[case]
    result = meet(damage)
    first, *hint = result.err.splitlines()
    assert re.search(message, first), result.err
    assert (result.code, result.out, bool(hint)) == (4, "", True)


# ---- .pth ----


def members(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], object]) -> Damage:
    """The VAE's .pth rewritten member by member."""

    def damage(model: Path) -> None:
        path = model / VAE
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(model / "new.pth", "w") as target:
            change(source, target)
        (model / "new.pth").replace(path)

    return damage


def deflated(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
    for member in source.infolist():
        target.writestr(member.filename, source.read(member), compress_type=zipfile.ZIP_STORED)
    target.writestr("archive/data/bomb", bytes(2**28), compress_type=zipfile.ZIP_DEFLATED)


def pickled(text: bytes) -> Damage:
    """The VAE's .pth with another pickle in it."""

    def change(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for member in source.infolist():
            data = text if member.filename.endswith("data.pkl") else source.read(member)
            target.writestr(member.filename, data)

    return members(change)


def claiming(model: Path) -> None:
    data = bytearray((model / VAE).read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last member's entry in the central directory
    data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    (model / VAE).write_bytes(data)


EXECUTES = b"cpathlib\nPath.touch\n(cpathlib\nPath\n(Vran-code\ntRtR."
BOMBS: dict[str, tuple[Damage, str]] = {
    "a member that unpacks": (members(deflated), "archive/data/bomb is compressed, as in a zip bomb"),
    "a member that claims": (claiming, r"its members claim [\d,]+ bytes of [\d,]+, as in a zip bomb"),
    "a pickle that runs code": (pickled(EXECUTES), "it wants pathlib.Path.touch, which no state dict"),
    "a pickle with a vast memo": (
        pickled(b"\x80\x02}r\xff\xff\xff\x0f."),
        "it numbers 268,435,455 objects in 9 bytes",
    ),
    "a pickle that claims text": (
        pickled(b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"a."),
        "not a readable .pth",
    ),
}


@pytest.mark.parametrize("verb", ["render", "plan", "inspect"])
@pytest.mark.parametrize("case", BOMBS)
def test_a_pth_that_is_an_attack_is_refused_by_every_command(
    case: str, verb: str, meet: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = BOMBS[case]
    result = meet(damage, verb)
    assert re.search(rf"{VAE}: .*{message}", result.err), result.err
    assert (result.code, result.out) == (4, "")
    assert not (tmp_path / "ran-code").exists()


HUGE = 2**27  # a limit on memory beyond what a plan needs: the bombs ask for 256 MiB to 1 TiB
PLAN = """
import resource, sys
from pathlib import Path
from wancli.cli import run
run(["plan", sys.argv[2]])
status = Path("/proc/self/status").read_text()
now = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[3]),) * 2)
sys.exit(run(["plan", sys.argv[1]]))
"""
MEMORY: dict[str, Damage] = {
    **{name: damage for name, (damage, _) in BOMBS.items()},
    "a header that claims": long_header(2**50),
    "a shape that claims": header(lambda found: found[Q].update(shape=[2**40, 2**40])),
}


@pytest.mark.parametrize("case", MEMORY)
def test_no_lie_about_sizes_makes_wancli_allocate(
    case: str, model: Path, shallow: Path, tmp_path: Path
) -> None:
    """In a process that may take 128 MiB more once it has planned a sound checkpoint."""
    MEMORY[case](model)
    jobs = [
        write_job(tmp_path / name, tiny_job(model=folder))
        for name, folder in (("bad", model), ("good", shallow))
    ]
    done = forked.run(*jobs, HUGE, program=PLAN)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith(f"wancli: {jobs[0]}:1: model: {model}"), done.stderr


# ---- GGUF ----


def damaged_gguf(architecture: str, change: Callable[[bytearray], object] = lambda _: None) -> Damage:
    """The transformer as a GGUF of plain numbers, changed byte by byte."""

    def damage(model: Path) -> dict[str, Any]:
        names = {"wan": str, "llama": lambda name: f"blk.{len(name)}.{name}"}[architecture]

        def fill(writer: gguf.GGUFWriter) -> None:
            for name, tensor in load_file(model / TRANSFORMER).items():
                writer.add_tensor(names(name), tensor.numpy())

        path = write_gguf(model / "wan.gguf", fill, architecture)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        named = {"text_encoder": model / T5, "tokenizer": SPIECE, "vae": model / VAE}
        said = {"transformer": path, **named}
        return {"model": {key: str(value) for key, value in said.items()} | {"heads": 2}}

    return damage


def more_tensors(data: bytearray) -> None:
    data[8:16] = (2**40).to_bytes(8, "little")


GGUFS: dict[str, tuple[Damage, str]] = {
    "of a language model": (damaged_gguf("llama"), "this is a GGUF file of the architecture 'llama'"),
    "cut short": (
        damaged_gguf("wan", lambda data: data.__delitem__(slice(-4096, None))),
        "is not in its place",
    ),
    "with a lying count": (
        damaged_gguf("wan", more_tensors),
        r"it claims 1,099,511,627,776 entries at [\d,]+ of [\d,]+ bytes",
    ),
}


@pytest.mark.parametrize("verb", ["render", "plan"])
@pytest.mark.parametrize("case", GGUFS)
def test_a_bad_gguf_is_refused_with_the_reason(
    case: str, verb: str, meet: Callable[..., CommandResult]
) -> None:
    damage, message = GGUFS[case]
    result = meet(damage, verb)
    assert re.search(rf"wan.gguf: .*{message}", result.err), result.err
    assert (result.code, len(result.err.splitlines())) == (4, 2)


# ---- LoRAs ----


def lora(name: str, rows: int, columns: int) -> Damage:
    def damage(model: Path) -> dict[str, Any]:
        tensors = {
            f"{name}.lora_A.weight": torch.ones(2, columns),
            f"{name}.lora_B.weight": torch.ones(rows, 2),
        }
        save_file(tensors, model / "a.safetensors")
        return {"loras": [{"path": str(model / "a.safetensors")}]}

    return damage


LORAS: dict[str, tuple[Damage, str, str]] = {
    "of 1.3B": (
        lora("diffusion_model.blocks.0.self_attn.q", 1536, 1536),
        r"lora_B.weight makes a change of \[1536, 1536\] to blocks.0.self_attn.q.weight, which is \[48, 48\]",
        "This LoRA was made for Wan2.1 1.3B, and this is a model of width 48.",
    ),
    "of a deeper model": (
        lora("diffusion_model.blocks.39.self_attn.q", 48, 48),
        "blocks.39.self_attn.q.weight, which is not in this model, whose last block is 3",
        "This LoRA was made for another model.",
    ),
    "of a model of pictures": (
        lora("transformer.transformer_blocks.0.attn.to_q", 48, 48),
        "changes nothing in this model; none of its 2 keys names a part of it, 'transformer.tr",
        "Is it a LoRA for a Wan text-to-video model?",
    ),
    "of an image-to-video model": (
        lora("diffusion_model.blocks.0.cross_attn.k_img", 48, 48),
        "changes nothing in this model; all 1 changes are of layers that only image-to-video models have",
        "Take the text-to-video version of this LoRA.",
    ),
    "of a text encoder": (
        lora("lora_te_encoder_block_0_layer_0_SelfAttention_q", 32, 32),
        "changes nothing in this model; none of its 2 keys",
        "Its keys are those of a text encoder; wancli applies LoRAs to the transformer.",
    ),
}


@pytest.mark.parametrize("verb", ["render", "plan"])
@pytest.mark.parametrize("case", LORAS)
def test_a_lora_for_something_else_is_refused(
    case: str, verb: str, meet: Callable[..., CommandResult]
) -> None:
    damage, message, hint = LORAS[case]
    result = meet(damage, verb)
    assert re.search(rf"a.safetensors: .*{message}", result.err), result.err
    assert hint in result.err
    assert result.code == 4


# ---- experts ----


def experts(high: str | None, low: str | None) -> Damage:
    """Two experts of one transformer, under these file names; without a name there is none."""

    def damage(model: Path) -> dict[str, Any]:
        named: dict[str, str | int] = {"text_encoder": str(model / T5), "tokenizer": str(SPIECE)}
        named |= {"vae": str(model / VAE), "heads": 2}
        for role, name in (("high_noise", high), ("low_noise", low)):
            if name:
                shutil.copy(model / TRANSFORMER, model / name)
                named[role] = str(model / name)
        return {"model": named}

    return damage


EXPERTS: dict[str, tuple[Damage, str, str]] = {
    "exchanged": (
        experts("wan_low_noise.safetensors", "wan_high_noise.safetensors"),
        "wan_low_noise.safetensors: high_noise: this is the low-noise expert by its name",
        "exchange high_noise and low_noise",
    ),
    "one twice": (
        experts("wan_high_noise.safetensors", "HIGH.safetensors"),
        "HIGH.safetensors: low_noise: this is the high-noise expert by its name",
        "exchange high_noise and low_noise",
    ),
    "no low": (
        experts("wan_high_noise.safetensors", None),
        "missing beside it: the low-noise expert",
        "name the files",
    ),
    "no high": (
        experts(None, "wan_low_noise.safetensors"),
        "missing beside it: the high-noise expert",
        "name the files",
    ),
}


@pytest.mark.parametrize("verb", ["render", "plan"])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_out_of_place_are_refused(case: str, verb: str, meet: Callable[..., CommandResult]) -> None:
    damage, message, hint = EXPERTS[case]
    result = meet(damage, verb)
    assert (message in result.err, hint in result.err, result.code) == (True, True, 4), result.err


# ---- values ----


def test_a_nan_in_a_weight_ends_the_shot_with_its_block_and_inspect_finds_the_tensor(
    render: Callable[..., CommandResult], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(model / TRANSFORMER, lambda tensors: tensors[Q].view(-1)[:1].fill_(math.nan))
    result = render(model=model)
    assert (result.code, result.out) == (1, "")
    assert "step 0" in result.err
    assert "block 0" in result.err
    assert "wancli inspect --deep" in result.err
    found = run_wancli(capsys, "inspect", "--deep", model)
    assert (found.code, f"NaN or Inf in {Q}" in found.out) == (4, True)
