"""GGUF headers and tokenizers against the `gguf` package, and files that lie."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import UMT5Config, UMT5EncoderModel
from weight_files import add_t5_tokenizer, write_gguf

from wancli.errors import CheckpointError
from wancli.weights.formats.embedded_tokenizer import read_tokenizer
from wancli.weights.formats.gguf_header import BLOCK_SIZES, read_header, umt5_to_transformers

TINY = Path(__file__).parents[2] / "fixtures" / "wan21-tiny"
SPIECE = TINY / "google" / "umt5-xxl" / "spiece.model"
TEXTS = [
    "A gray tabby cat walks through a sunlit garden, its movement slow and graceful.",
    "色调艳丽，过曝，静态，细节模糊不清",
    "  two  spaces\tand a tab ",
    "Ünïcödé ﬁ ½ ①",
    "🙂 emoji, bytes",
    "<extra_id_0>",
    "",
]
Fill = Callable[[GGUFWriter], None]


def a_bit_of_all(writer: GGUFWriter) -> None:
    """Every type wancli reads, key-values of many types."""
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int64("i64", -(2**40))
    writer.add_uint64("u64", 2**63)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "猫 cat")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.25, -1.5])
    writer.add_array("words", ["▁a", "", "b"])
    writer.add_array("bytes", b"\x00\xff")
    rng = np.random.default_rng(0)
    for name, (elements, size) in BLOCK_SIZES.items():
        if elements > 1:
            data = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
            writer.add_tensor(f"blocks.0.{name}.weight", data, raw_dtype=Type[name])
    writer.add_tensor("head.modulation", rng.normal(size=(1, 2, 8)).astype(np.float32))
    writer.add_tensor("patch_embedding.weight", rng.normal(size=(8, 4, 1, 2, 2)).astype(np.float16))
    writer.add_tensor("bf16", rng.integers(0, 256, (5, 6), dtype=np.uint8), raw_dtype=Type.BF16)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "sample.gguf", a_bit_of_all)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A header of a few hundred bytes with everything a parser can trip over."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_array("words", ["a", "bc"])
        writer.add_array("bytes", b"\x00\xff")
        writer.add_custom_alignment(32)
        writer.add_array("comfy.gguf.orig_shape.w", [2, 2, 16])
        writer.add_tensor("w", np.zeros((2, 34), np.uint8), raw_dtype=Type.Q8_0)
        writer.add_tensor("bias", np.zeros(3, np.float32))

    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", fill)


def test_names_types_shapes_and_places_are_those_of_the_package(sample: Path):
    ours = read_header(sample).tensors
    theirs = GGUFReader(sample).tensors
    assert [*ours] == [tensor.name for tensor in theirs]
    content = sample.read_bytes()
    for tensor in theirs:
        info = ours[tensor.name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.start, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert content[info.start : info.start + info.nbytes] == tensor.data.tobytes()


def test_values_are_those_that_were_written(sample: Path):
    values = read_header(sample).values
    assert values["general.architecture"] == "wan"
    scalars = {key: values[key] for key in ("u8", "i8", "u16", "i64", "u64", "f32", "f64", "yes", "text")}
    assert [*scalars.values()] == [200, -3, 60000, -(2**40), 2**63, 0.5, 1e300, True, "猫 cat"]
    assert [*values["ints"]] == [1, -2, 3]
    assert [*values["floats"]] == [0.25, -1.5]
    assert values["words"] == ["▁a", "", "b"]
    assert values["bytes"].tobytes() == b"\x00\xff"


def test_the_alignment_of_the_file_is_kept(tmp_path: Path):
    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(64)
        writer.add_tensor("a", np.ones(3, np.float32))
        writer.add_tensor("b", np.ones(3, np.float32))

    path = write_gguf(tmp_path / "wide.gguf", fill)
    assert [info.start for info in read_header(path).tensors.values()] == [
        tensor.data_offset for tensor in GGUFReader(path).tensors
    ]


def test_a_shape_that_ggml_could_not_hold_is_given_back(tmp_path: Path):
    def fill(writer: GGUFWriter) -> None:
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [8, 4, 1, 2, 2])
        writer.add_tensor("patch_embedding.weight", np.zeros((8, 16), np.float32))

    assert read_header(write_gguf(tmp_path / "x.gguf", fill)).tensors["patch_embedding.weight"].shape == (
        8,
        4,
        1,
        2,
        2,
    )


@pytest.mark.parametrize("shape", [[8, 4], [8, 4, 1, 2, 3], [-8, -16], [8.0, 16.0], ["8", "16"]])
def test_an_orig_shape_that_does_not_fit_is_refused(tmp_path: Path, shape: list[object]):
    def fill(writer: GGUFWriter) -> None:
        writer.add_array("comfy.gguf.orig_shape.w", shape)
        writer.add_tensor("w", np.zeros((8, 16), np.float32))

    with pytest.raises(CheckpointError, match=r"orig_shape.w does not fit"):
        read_header(write_gguf(tmp_path / "x.gguf", fill))


@pytest.mark.parametrize(
    "other", [Type.IQ3_S, Type.IQ2_XXS, Type.TQ1_0, Type.Q8_K, Type.I32, Type.F64, Type.IQ1_M]
)
def test_types_that_wancli_does_not_read_are_refused_by_name(tmp_path: Path, other: Type):
    size = gguf.GGML_QUANT_SIZES[other][1]

    def fill(writer: GGUFWriter) -> None:
        writer.add_tensor("blocks.3.ffn.0.weight", np.zeros((2, size), np.uint8), raw_dtype=other)

    path = write_gguf(tmp_path / "other.gguf", fill)
    with pytest.raises(
        CheckpointError, match=rf"other.gguf: blocks.3.ffn.0.weight is stored as {other.name};"
    ):
        read_header(path)


def test_every_type_of_ggml_has_its_name(tmp_path: Path):
    from wancli.weights.formats.gguf_header import TYPE_NAMES

    assert {TYPE_NAMES[kind.value] for kind in Type} == {kind.name for kind in Type}


def raw(
    path: Path, *infos: tuple[str, list[int], int, int], data: bytes = bytes(4096), kv: bytes = b""
) -> Path:
    """A GGUF file with any tensor infos (name, dims, type, offset), for what no writer would write."""
    body = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), int(bool(kv))) + kv
    for name, dims, kind, offset in infos:
        body += struct.pack("<Q", len(name)) + name.encode()
        body += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    path.write_bytes(body + bytes(-len(body) % 32) + data)
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("infos", "what"),
    [
        ([("a", [2000], 0, 0)], "is not in its place"),
        ([("a", [8], 0, 4096)], "is not in its place"),
        ([("a", [8], 0, 2**64 - 32)], "is not in its place"),
        ([("a", [2**63, 2**63], 0, 0)], "is not in its place"),
        ([("a", [8], 0, 4)], "is not in its place"),
        ([("a", [16], 0, 0), ("b", [8], 0, 32)], "b .* is not in its place"),
        ([("a", [8], 0, 0), ("a", [8], 0, 32)], "a appears twice"),
        ([("a", [33], 8, 0)], "rows of 33, Q8_0 has blocks of 32"),
        ([("a", [], 0, 0)], "a has 0 dimensions"),
        ([("a", [1] * 6, 0, 0)], "a has 6 dimensions"),
        ([("a", [8], 99, 0)], "a is stored as type 99"),
    ],
)
def test_a_tensor_at_an_impossible_offset_is_refused(
    tmp_path: Path, infos: list[tuple[str, list[int], int, int]], what: str
):
    with pytest.raises(CheckpointError, match=rf"lying.gguf: .*{what}"):
        read_header(raw(tmp_path / "lying.gguf", *infos))


@pytest.mark.parametrize(
    "kv",
    [
        text("k") + struct.pack("<I", 13),
        text("k") + struct.pack("<IIQ", 9, 9, 1),
        text("k") + struct.pack("<IIQ", 9, 8, 2**60),
        text("k") + struct.pack("<IIQ", 9, 10, 2**61),
        text("k") + struct.pack("<IQ", 8, 2**63),
        struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1),
        text("general.alignment") + struct.pack("<II", 4, 0),
        text("general.alignment") + struct.pack("<II", 4, 4),
        text("general.alignment") + struct.pack("<I", 8) + text("32"),
    ],
)
def test_a_key_value_that_cannot_be_is_refused(tmp_path: Path, kv: bytes):
    with pytest.raises(CheckpointError, match=r"lying.gguf: truncated or damaged"):
        read_header(raw(tmp_path / "lying.gguf", ("a", [8], 0, 0), kv=kv))


@pytest.mark.parametrize("start", [b"", b"GGUF", b"GGUF\x01\x00\x00\x00", b"PK\x03\x04" + bytes(64)])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, start: bytes):
    path = tmp_path / "not.gguf"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=r"not.gguf"):
        read_header(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_and_byte_orders_are_refused(tmp_path: Path, version: int):
    path = tmp_path / "old.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, 0))
    with pytest.raises(CheckpointError, match=r"old.gguf: not a GGUF file of version 2 or 3"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"gone.gguf: no such file"):
        read_header(tmp_path / "gone.gguf")


def test_every_truncation_is_refused(small: Path, tmp_path: Path):
    content = small.read_bytes()
    last = max(info.start + info.nbytes for info in read_header(small).tensors.values())
    for size in range(last):
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut.gguf"):
            read_header(path)


def test_corrupt_counts_neither_fill_the_memory_nor_escape(small: Path, tmp_path: Path):
    """Every 8 bytes of the header in turn become a huge number."""
    content = small.read_bytes()
    end = min(info.start for info in read_header(small).tensors.values())
    path = tmp_path / "bad.gguf"
    refused = 0
    tracemalloc.start()
    for at in range(4, end - 8):
        number = 2**40 if at % 2 else 2**64 - 1
        path.write_bytes(content[:at] + struct.pack("<Q", number) + content[at + 8 :])
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > end / 2
    assert peak < 100 * len(content)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_is_read_or_refused(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    content = bytearray(small.read_bytes())
    end = min(info.start for info in read_header(small).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        pass
    else:
        assert all(info.start + info.nbytes <= len(content) for info in found.tensors.values())


def test_a_header_is_read_without_torch(sample: Path):
    code = (
        "import sys; from pathlib import Path; "
        "from wancli.weights.formats import embedded_tokenizer, gguf_header; "
        f"gguf_header.read_header(Path({str(sample)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_umt5_names_are_those_of_llama_cpp():
    config = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2)
    with torch.device("meta"):
        theirs = set(UMT5EncoderModel(config).state_dict()) - {"encoder.embed_tokens.weight"}
    converter = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 3)
    for name in theirs:
        converted = converter.get_name(name, try_suffixes=(".weight",))
        assert converted != name
        assert umt5_to_transformers(converted) == name
    for unknown in ("enc.blk.0.ffn_gate.bias", "dec.blk.0.attn_q.weight", "token_embd", "enc.blk.0.x.weight"):
        assert umt5_to_transformers(unknown) == unknown


def test_the_tokenizer_of_a_gguf_gives_the_same_ids(tmp_path: Path):
    path = write_gguf(tmp_path / "umt5.gguf", add_t5_tokenizer, "t5encoder")
    proto = read_tokenizer(path)
    assert proto is not None
    ours, theirs = SentencePieceProcessor(model_proto=proto), SentencePieceProcessor(model_file=str(SPIECE))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.unk_id(), ours.vocab_size()) == (theirs.unk_id(), theirs.vocab_size() + 2)


def test_a_gguf_without_a_tokenizer_has_none(sample: Path):
    assert read_tokenizer(sample) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda writer: writer.add_tokenizer_model("llama"),
        lambda writer: writer.add_token_types([1, 2, 3]),
        lambda writer: writer.add_token_types([9] * 376),
        lambda writer: writer.add_token_scores([0] * 376),
        lambda writer: writer.add_array("tokenizer.ggml.tokens", [1, 2]),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, change: Fill):
    def fill(writer: GGUFWriter) -> None:
        add_t5_tokenizer(writer)
        change(writer)

    with pytest.raises(CheckpointError, match=r"umt5.gguf: its tokenizer.ggml.\* is not"):
        read_tokenizer(write_gguf(tmp_path / "umt5.gguf", fill, "t5encoder"))
