"""Tokenizers inside weight files, in every container, type and place; the oracle is the file spiece.model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from jobs import SPIECE
from weight_files import save_tensors, write_gguf

from wancli.errors import CheckpointError
from wancli.text.tokenizer import Tokenizer
from wancli.weights.formats.embedded_tokenizer import read_tokenizer

MODEL = torch.tensor(list(SPIECE.read_bytes()), dtype=torch.uint8)
TORCH_TYPES = [
    *(torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_a_tokenizer_of_any_numeric_type_is_its_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_tensors(tmp_path / "t5.safetensors", {"spiece_model": MODEL.to(dtype)})
    assert read_tokenizer(path) == SPIECE.read_bytes()


def test_signed_bytes_are_bytes(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "t5.safetensors", {"spiece_model": MODEL.view(torch.int8)})
    assert read_tokenizer(path) == SPIECE.read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int32])
def test_a_gguf_may_hold_the_tokenizer_as_a_tensor(tmp_path: Path, dtype: type[np.generic]) -> None:
    numbers = MODEL.numpy().view(np.int8) if dtype is np.int8 else MODEL.numpy().astype(dtype)
    path = write_gguf(tmp_path / "t5.gguf", lambda writer: writer.add_tensor("spiece_model", numbers), "cow")
    assert read_tokenizer(path) == SPIECE.read_bytes()


def test_a_pickle_may_hold_the_tokenizer(tmp_path: Path) -> None:
    torch.save({"text_encoders.umt5xxl.spiece_model": MODEL}, tmp_path / "whole.pth")
    assert read_tokenizer(tmp_path / "whole.pth") == SPIECE.read_bytes()


@pytest.mark.parametrize(
    "prefix", ["", "text_encoders.umt5xxl.", "text_encoders.umt5xxl.transformer.", "tokenizer."]
)
def test_a_tokenizer_is_found_in_any_place(tmp_path: Path, prefix: str) -> None:
    path = save_tensors(tmp_path / "whole.safetensors", {f"{prefix}spiece_model": MODEL, "x": torch.ones(2)})
    assert read_tokenizer(path) == SPIECE.read_bytes()


@pytest.mark.parametrize("name", ["spiece.model", "blob", "spiece.safetensors"])
def test_a_bare_tokenizer_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SPIECE.read_bytes())
    assert Tokenizer(tmp_path / name).to_ids("a red circle") == Tokenizer(SPIECE).to_ids("a red circle")


def test_a_weight_file_without_a_suffix_is_read_as_what_it_holds(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "blob", {"spiece_model": MODEL})
    assert read_tokenizer(path) == SPIECE.read_bytes()


def _write_fp8(path: Path) -> None:
    save_tensors(path, {"spiece_model": MODEL.to(torch.float8_e4m3fn)})


def _write_halves(path: Path) -> None:
    save_tensors(path, {"spiece_model": MODEL / 2})


def _write_two(path: Path) -> None:
    save_tensors(path, {"a.spiece_model": MODEL, "b.spiece_model": MODEL[1:].clone()})


def _write_none(path: Path) -> None:
    save_tensors(path, {"shared.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_write_fp8, "spiece_model is stored as F8_E4M3, which keeps no bytes"),
        (_write_halves, "spiece_model holds numbers that do not fit a byte"),
        (_write_two, "holds 2 tokenizers: "),
        (_write_none, "holds no tokenizer"),
    ],
)
def test_a_file_without_one_whole_tokenizer_is_refused(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    write(tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path / "t5.safetensors")


def test_a_quantized_tokenizer_in_a_gguf_is_refused(tmp_path: Path) -> None:
    whole = MODEL[: len(MODEL) // 32 * 32].float().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("spiece_model", gguf.quants.quantize(whole, kind), raw_dtype=kind)

    with pytest.raises(CheckpointError, match="spiece_model is stored as Q8_0, which keeps no bytes"):
        Tokenizer(write_gguf(tmp_path / "t5.gguf", fill, "cow"))


def test_a_tokenizer_json_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(
        CheckpointError, match=r"this is a tokenizer\.json, which wancli does not read"
    ) as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "spiece.model" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("<!doctype html>", "a web page"),
        ("Entry not found", "it begins with 'Entry not found'"),
        ("", "the file is empty"),
    ],
)
def test_what_a_server_sends_in_place_of_a_tokenizer_is_named(
    tmp_path: Path, content: str, what: str
) -> None:
    (tmp_path / "spiece.model").write_text(content)
    with pytest.raises(CheckpointError, match=what):
        Tokenizer(tmp_path / "spiece.model")


def test_the_tokenizer_of_another_encoder_is_refused() -> None:
    tokenizer = Tokenizer(SPIECE)
    tokenizer.check_vocabulary(384, "tiny")
    for rows in (167, 256384):
        with pytest.raises(CheckpointError, match=f"374 pieces; the text encoder has {rows:,} words"):
            tokenizer.check_vocabulary(rows, "tiny")
