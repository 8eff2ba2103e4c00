"""Records are opened by one module, which takes plain files of a plausible size and quick, finite JSON."""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from wancli.errors import EntryError, Unreadable
from wancli.storage import records
from wancli.storage.records import Kind

ROOT = Path(__file__).parents[2] / "wancli"
SMALL = Kind("the note", 100)
# What others wrote: files of weights, lists of prompts, and what this package has in its assets.
OTHERS = ("weights/", "job/prompts_from.py", "plan/step_cache.py", "report/html/page_data.py")
PARSERS = {"json.load", "json.loads", "safe_open", "load_file"}


def parsing_calls(path: Path) -> Iterator[str]:
    """The calls in a module that parse JSON, and its imports of safetensors."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in PARSERS:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safetensors":
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.module}"


def test_no_other_module_parses_a_record() -> None:
    found = [call for path in ROOT.rglob("*.py") for call in parsing_calls(path)]
    elsewhere = [call for call in found if not call.startswith(OTHERS)]
    assert {call.partition(":")[0] for call in elsewhere} == {"storage/records.py"}, elsewhere


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_RDONLY)
        one.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of any length
        os.close(here)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/tty"),
        os.mkfifo,
        Path.mkdir,
        make_socket,
        lambda path: path.symlink_to(path.name),
        lambda path: path.write_bytes(b" " * 101),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**40),
    ],
)
def test_only_plain_files_of_a_plausible_size_are_read(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "note"
    make(path)
    with pytest.raises((EntryError, Unreadable)) as raised:
        records.read_json(path, SMALL)
    assert raised.value.where == str(path)


@pytest.mark.parametrize("name", ["none", "no\0ne", "no/ne", "\ud800"])
def test_what_does_not_exist_or_cannot_is_no_record(name: str, tmp_path: Path) -> None:
    assert records.read_json(tmp_path / name, SMALL) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "NaN",
        '{"a": Infinity}',
        '{"a": [1e999]}',
        '{"a": -1e999}',
        "[" * 41 + "]" * 41,
        "[" * 50,
        '{"a":' * 15 + "1",
        "1" + "0" * 40,
        "9" * 99,
        "{}{}",
    ],
)
def test_json_that_is_cut_deep_doubled_or_not_finite_is_damage(text: str, tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text(text)
    with pytest.raises(EntryError, match="the note is damaged, or of another version"):
        records.read_json(path, SMALL)


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, "[" * 900 + "]" * 900, "9" * 5000])
def test_json_that_no_parser_likes_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"deep|large|digits"):
        records.parse_json(text)


def test_a_number_that_a_job_may_have_is_read() -> None:
    assert records.parse_json(f'{{"a": [{2**63 - 1}, -1e308, {{"b": {10**31}}}]}}')["a"][2] == {"b": 10**31}


def test_tensors_and_a_document_come_back_and_the_place_of_each_is_known() -> None:
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(1)}
    payload = records.write_tensors(tensors, '{"a": 1}')
    slices, document = records.parse_header(payload)
    assert document == {"a": 1}
    found = records.parse_tensors(payload)[0]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        at = slices[name]
        assert (at.dtype, at.shape) == ("F32", tuple(tensor.shape))
        assert payload[at.start : at.stop] == tensor.numpy().tobytes()


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
def test_a_cut_file_of_tensors_is_a_value_error(cut: int) -> None:
    payload = records.write_tensors({"x": torch.ones(4)}, "{}")
    with pytest.raises(ValueError, match=r"cut|Expecting|Unterminated"):
        records.parse_header(payload[:cut])
