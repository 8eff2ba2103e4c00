"""`wancli inspect`: what it says of real layouts in real sizes, within 80 columns, from headers alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_files
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE, change_tensors, checkpoint, run_wancli
from safetensors.torch import load_file, save_file
from weight_files import cast, dit, pth, scalar, stored, umt5_official, write


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`wancli inspect` on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: run_wancli(capsys, "inspect", *arguments)


def document(look: Any, *arguments: object) -> dict[str, Any]:
    result = look(*arguments, "--json")
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def test_a_file_is_described_in_a_paragraph(look: Any, tmp_path: Path) -> None:
    entries = cast(stored(dit("14B"), "F16"), scale_weight=scalar) | {"scaled_fp8": ("F8_E4M3", (2,))}
    write(tmp_path / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", entries)
    result = look(tmp_path / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
    lines = result.out.splitlines()
    assert result.code == 0
    paragraph = lines[lines.index("transformer: Wan2.2-T2V-A14B, high-noise expert") :]
    assert paragraph == [
        "transformer: Wan2.2-T2V-A14B, high-noise expert",
        "  file          wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "  size          13.5 GiB, 14,288,491,584 parameters in 1,496 tensors",
        "  network       40 blocks of width 5120, 40 heads, feed-forward 13824, 16",
        "                channels in, 16 out",
        "  names         official",
        "  quantization  fp8 scaled (ComfyUI's first layout, kijai): 400 matrices in fp8",
        "                e4m3fn, a scale per tensor, to be multiplied in full precision",
        "  precision     block matrices: 400 fp8 e4m3fn",
        "                block biases, norms: 680 fp16",
        "                embeddings, head: 15 fp16",
        "                scales, markers: 400 fp32, 1 fp8 e4m3fn",
    ]
    assert lines[1:3] == [
        "  to render     missing beside it: the low-noise expert (low_noise), the text",
        "                encoder (text_encoder), UMT5's SentencePiece model (tokenizer),",
    ]


def test_nothing_is_wider_than_80_columns(look: Any, tmp_path: Path) -> None:
    root = checkpoint(tmp_path)
    shutil.copy(root / TRANSFORMER, root / "wan_i2v.safetensors")
    for path in (root, root / "wan_i2v.safetensors", root / T5):
        assert [line for line in look(path).out.splitlines()[1:] if len(line) > 80] == []


def test_a_folder_says_its_variant_and_what_it_was_made_for(look: Any, tmp_path: Path) -> None:
    root = tmp_path / "Wan2.2-T2V-A14B"
    for expert in ("high_noise_model", "low_noise_model"):
        (root / expert).mkdir(parents=True)
        weight_files.shards(root / expert, "diffusion_pytorch_model", stored(dit("14B"), "F32"), 6)
    pth(root / T5, stored(umt5_official(), "BF16"))
    pth(root / VAE, stored(load_shapes(), "F32"))
    (root / "google/umt5-xxl").mkdir(parents=True)
    shutil.copy(SPIECE, root / "google/umt5-xxl")
    found = document(look, root)
    assert (found["layout"], found["variant"], found["missing"]) == ("official", "Wan2.2-T2V-A14B", [])
    defaults = found["defaults"]
    assert (defaults["steps"], defaults["shift"], defaults["boundary"]) == (40, 12.0, 0.875)
    assert (defaults["guidance"], defaults["guidance_low"]) == (4.0, 3.0)
    kinds = [(part["kind"], len(part["files"]), part["parameters"]) for part in found["parts"]]
    assert kinds == [
        ("transformer", 6, 14_288_491_584),
        ("transformer", 6, 14_288_491_584),
        ("text encoder", 1, 5_680_910_336),
        ("vae", 1, 126_892_531),
    ]
    assert [part["parameters_of_network"] for part in found["parts"]] == [count for _, _, count in kinds]
    assert sum(part["bytes"] for part in found["parts"][:2]) > 114e9
    text = " ".join(look(root).out.split())
    assert "official layout, Wan2.2-T2V-A14B" in text
    assert "40 steps, shift 12, guidance 4 from timestep 875 up, 3 below" in text
    assert "file 6 shards in high_noise_model" in text


def load_shapes() -> weight_files.Shapes:
    from wancli.models.config import VAEConfig
    from wancli.models.vae import WanVAE

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanVAE(VAEConfig()).state_dict().items()}


@pytest.mark.parametrize("part", [T5, VAE, "google/umt5-xxl/spiece.model", TRANSFORMER])
def test_missing_files_of_a_folder_are_named_and_the_rest_described(
    look: Any, tmp_path: Path, part: str
) -> None:
    root = checkpoint(tmp_path)
    (root / part).unlink()
    found = document(look, root)
    assert [part in name for name in found["missing"]] == [True]
    assert found["variant"] is None
    assert len(found["parts"]) == (3 if part.endswith("spiece.model") else 2)
    assert f"  missing       {found['missing'][0]}" in look(root).out


def test_a_folder_of_single_files_is_listed_file_by_file(look: Any, tmp_path: Path) -> None:
    write(tmp_path / "loras/a.safetensors", {"blocks.0.ffn.0.lora_A.weight": ("F16", (8, 5120))})
    write(tmp_path / "vae/wan2.2_vae.safetensors", stored(weight_files.vae22(), "F16"))
    write(tmp_path / "sdxl.safetensors", {"conv_in.weight": ("F16", (2,))})
    found = document(look, tmp_path)
    names = [(part["kind"], part["name"]) for part in found["parts"]]
    assert names == [("other", "unknown"), ("vae", "Wan 2.2 VAE"), ("lora", "LoRA")]
    assert found["problem"] is None
    assert "conv_in.weight" in look(tmp_path).out


def test_a_lora_says_style_targets_and_rank(look: Any, tmp_path: Path) -> None:
    entries: weight_files.Entries = {}
    for block in range(40):
        for layer in ("self_attn.q", "ffn.2"):
            at = f"diffusion_model.blocks.{block}.{layer}"
            wide = 13824 if layer == "ffn.2" else 5120
            entries |= {
                f"{at}.lora_down.weight": ("BF16", (64, wide)),
                f"{at}.lora_up.weight": ("BF16", (5120, 64)),
            }
    path = write(tmp_path / "Wan22_Lightning_HIGH.safetensors", entries)
    lines = look(path).out.splitlines()
    assert lines[2:] == [
        "lora: LoRA for Wan 14B, high-noise expert",
        "  file          Wan22_Lightning_HIGH.safetensors",
        "  size          143 MiB, 74,711,040 parameters in 160 tensors",
        "  style         LightX2V, LoRA",
        "  targets       80 layers in 40 blocks: 40 ffn.2, 40 self_attn.q",
        "  rank          64; no alpha, so scale 1",
        "  precision     tensors: 160 bf16",
    ]


def test_what_wancli_cannot_use_is_described_and_refused_by_name(look: Any, tmp_path: Path) -> None:
    entries = stored(dit("14B"), "F16") | {
        "ref_conv.weight": ("F16", (5120, 16, 2, 2)),
        "patch_embedding.weight": ("F16", (5120, 48, 1, 2, 2)),
    }
    result = look(write(tmp_path / "wan2.1_fun_control.safetensors", entries))
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "transformer: Fun-Control" in text
    assert "48 channels in" in text
    assert "not supported this is a Fun-Control checkpoint; wancli renders text-to-video" in text


def test_missing_tensors_of_a_network_are_named(look: Any, tmp_path: Path) -> None:
    entries = {k: v for k, v in stored(dit("1.3B"), "F16").items() if not k.startswith("blocks.29.ffn")}
    text = " ".join(look(write(tmp_path / "a.safetensors", entries)).out.split())
    assert "missing blocks.29.ffn.0.bias, blocks.29.ffn.0.weight, blocks.29.ffn.2.bias" in text
    assert "unexpected a network of these sizes has 1,418,996,800 parameters" in text


# ---- exit codes ----


def test_a_path_without_weights_is_a_usage_error(look: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights, notes on them")
    (tmp_path / "empty").mkdir()
    stranger = write(tmp_path / "sdxl.safetensors", {"conv_in.weight": ("F16", (2,))})
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.txt", "holds no weights"),
        (tmp_path / "empty", "holds no weights"),
        (stranger, "holds no network of Wan that wancli knows"),
    ):
        result = look(path)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"wancli: {path}: {message}")
    assert "conv_in.weight" in look(stranger).err


def test_what_is_damaged_is_an_integrity_error(look: Any, tmp_path: Path) -> None:
    root = checkpoint(tmp_path)
    path = root / TRANSFORMER
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "cut.pth").write_bytes((TINY / VAE).read_bytes()[:50_000])
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for broken, at in (
        (root, path),
        (path, path),
        (tmp_path / "cut.pth",) * 2,
        (tmp_path / "lfs.safetensors",) * 2,
    ):
        result = look(broken)
        assert (result.code, result.out) == (4, "")
        assert result.err.startswith(f"wancli: {at}: ")


# ---- deep ----


def test_a_deep_look_hashes_every_file_and_finds_no_fault(look: Any) -> None:
    found = document(look, TINY, "--deep")
    assert {Path(file["file"]).name: file["not_finite"] for file in found["deep"]} == {
        TRANSFORMER: [],
        T5: [],
        VAE: [],
    }
    for file in found["deep"]:
        assert file["sha256"] == hashlib.sha256(Path(file["file"]).read_bytes()).hexdigest()
    assert "deep" not in document(look, TINY)


@pytest.mark.parametrize(("file", "value"), [(TRANSFORMER, float("nan")), (VAE, float("-inf"))])
def test_a_deep_look_names_tensors_with_nan_and_inf(
    look: Any, tmp_path: Path, file: str, value: float
) -> None:
    root = checkpoint(tmp_path)
    spoilt: list[str] = []

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        spoilt.extend(list(tensors)[5:7])
        for name in spoilt:
            tensors[name].view(-1)[-1:] = value

    change_tensors(root / file, spoil)
    result = look(root / file, "--deep")
    assert result.code == 4
    assert all(name in result.out for name in spoilt)
    found = json.loads(look(root, "--deep", "--json").out)
    assert {Path(f["file"]).name: f["not_finite"] for f in found["deep"]}[file] == spoilt


def test_a_deep_look_reads_fp8_and_half_precision(look: Any, tmp_path: Path) -> None:
    tensors = load_file(TINY / TRANSFORMER)
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    tensors["blocks.1.ffn.0.weight"] = torch.full_like(tensors["blocks.1.ffn.0.weight"], 1e9).half()
    tensors["blocks.2.ffn.0.weight"] = torch.full((96, 48), float("nan")).to(torch.float8_e5m2)
    save_file(tensors, tmp_path / "a.safetensors")
    found = json.loads(look(tmp_path / "a.safetensors", "--deep", "--json").out)
    assert found["deep"][0]["not_finite"] == ["blocks.1.ffn.0.weight", "blocks.2.ffn.0.weight"]


def test_headers_are_read_without_torch_and_without_data(tmp_path: Path) -> None:
    path = write(tmp_path / "wan.safetensors", stored(dit("14B"), "F32"))
    program = (
        "import sys; from wancli.cli import run; code = run(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'diffusers'} & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
