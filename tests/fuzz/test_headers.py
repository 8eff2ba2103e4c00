"""Headers of weight files that lie: each is read as it says or is one CheckpointError, without allocating."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from fuzzing import EXAMPLES, Budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wancli.weights.formats import gguf_header, safetensors_header
from wancli.weights.formats.read import read_packed

LARGE = st.sampled_from([2**16, 2**31 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
SIZE = st.integers(0, 8)
NUMBER = SIZE | LARGE | st.integers(-5, 300) | st.floats() | st.booleans() | st.none() | st.just("8")
NAME = st.sampled_from(["a.weight", "a.bias", "blocks.0.x", "__metadata__", "", "\0", "é" * 50]) | st.text(
    max_size=5
)
DTYPE = st.sampled_from([*safetensors_header.BITS, "F33", "", "f32"]) | st.none() | st.integers()
FORM = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[*HealthCheck])


def tried(path: Path, budget: Budget) -> None:
    """Reads the header and, where it holds, every tensor in the file."""
    with budget.attempt(path.read_bytes()):
        if path.suffix == ".gguf":
            gguf_header.read_header(path)
        else:
            safetensors_header.read_header(path)
        for weight in read_packed((path,)).values():
            assert weight.data.nbytes <= path.stat().st_size


def try_all(files: st.SearchStrategy[bytes], path: Path, budget: Budget) -> None:
    """Round after round until the time is over."""

    @FORM
    @given(files)
    def each(data: bytes) -> None:
        path.write_bytes(data)
        tried(path, budget)

    while not budget.over:
        each()
    budget.check()


ENTRY = st.fixed_dictionaries(
    {
        "dtype": DTYPE,
        "shape": st.lists(SIZE | NUMBER, max_size=4),
        "data_offsets": st.lists(NUMBER, max_size=3),
    }
)
GOOD = st.lists(
    st.tuples(NAME, st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]), st.lists(SIZE, max_size=3)), max_size=4
)


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """A file whose ranges fit, with some of it changed."""
    document: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in draw(GOOD):
        size = safetensors_header.BITS[dtype] // 8
        for length in shape:
            size *= length
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    document |= draw(st.dictionaries(NAME, ENTRY | NUMBER, max_size=2))
    if draw(st.booleans()):
        document["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=4), st.text(max_size=4) | NUMBER, max_size=2) | NUMBER
        )
    text = json.dumps(document)
    match draw(st.integers(0, 9)):
        case 0:
            text = text.replace("}", ', "a.weight": {}}', 1)
        case 1:
            text = "[" * draw(st.sampled_from([1, 50_000])) + text
        case 2:
            text = text[: draw(st.integers(0, len(text)))]
        case 3:
            text = text.replace("[", '{"a":' * 2000, 1)
    header = text.encode()
    said = draw(st.just(len(header)) | st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", said) + header + bytes(draw(st.just(end) | st.just(end) | st.integers(0, 2000)))


def test_no_safetensors_header_escapes_as_anything_but_a_refusal(tmp_path: Path) -> None:
    try_all(safetensors(), tmp_path / "x.safetensors", Budget(6.5))


COUNT = st.integers(0, 3) | st.integers(0, 3) | st.sampled_from([2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])


def text_of(value: bytes, said: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if said is None else said) + value


@st.composite
def key_value(draw: st.DrawFn) -> bytes:
    keys = [
        b"general.alignment",
        b"general.architecture",
        b"comfy.gguf.orig_shape.a.weight",
        b"x",
        b"\xff",
        b"",
    ]
    key = text_of(draw(st.sampled_from(keys)), draw(st.none() | st.none() | st.none() | COUNT))
    kind = draw(st.integers(0, 13))
    if kind == 8:
        return key + struct.pack("<I", kind) + text_of(draw(st.binary(max_size=5)), draw(st.none() | COUNT))
    if kind == 9:
        inner, count = draw(st.integers(0, 13)), draw(COUNT)
        return key + struct.pack("<IIQ", kind, inner, count) + draw(st.binary(max_size=40))
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    return (
        key
        + struct.pack("<I", kind)
        + draw(st.binary(min_size=sizes.get(kind, 0), max_size=sizes.get(kind, 4)))
    )


@st.composite
def info(draw: st.DrawFn) -> bytes:
    name = text_of(draw(st.sampled_from([b"a.weight", b"a.bias", b"b", b"", b"\xff"])))
    dims = draw(st.lists(st.integers(0, 256) | st.sampled_from([32, 256]) | COUNT, max_size=6))
    said = draw(st.just(len(dims)) | st.just(len(dims)) | COUNT) % 2**32
    kind, offset = draw(st.integers(0, 41)), draw(st.sampled_from([0, 32, 64, 128, 1, 2**63, 2**64 - 32]))
    return name + struct.pack(f"<I{len(dims)}QIQ", said, *dims, kind, offset)


@st.composite
def ggufs(draw: st.DrawFn) -> bytes:
    """Key-values and tensors one after the other, with counts that may lie."""
    values, infos = draw(st.lists(key_value(), max_size=3)), draw(st.lists(info(), max_size=3))
    version = draw(st.sampled_from([3, 3, 3, 2, 1, 0, 2**31]))
    counts = [draw(st.just(len(x)) | st.just(len(x)) | COUNT) for x in (infos, values)]
    start = draw(st.sampled_from([b"GGUF", b"GGUF", b"GGUF", b"FUGG", b""]))
    body = start + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(infos)
    return body + bytes(draw(st.integers(0, 5000)))


def test_no_gguf_header_escapes_as_anything_but_a_refusal(tmp_path: Path) -> None:
    try_all(ggufs(), tmp_path / "x.gguf", Budget(6))
