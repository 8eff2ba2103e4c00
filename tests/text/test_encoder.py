"""Stage 1: cleaning and tokens as official, keys, entries, and the encoder that is not loaded twice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wancli.errors import CheckpointError, EntryError, JobError, NotFinite, OutputExists, PromptTooLong
from wancli.models.config import EOS
from wancli.storage.cache import Store
from wancli.text import embedding
from wancli.text.embedding import (
    Embedding,
    embedding_key,
    library_versions,
    load_embedding,
    pack,
    read_tokens,
    save_embeddings,
    unpack,
)
from wancli.text.encoder import EncodeFailure, EncoderSpec, encode
from wancli.text.tokenizer import Tokenizer, Tokens, clean
from wancli.weights.disk_reader import OnDisk

ROOT = Path(__file__).parents[1] / "fixtures" / "wan21-tiny"
OFFICIAL = ROOT / "models_t5_umt5-xxl-enc-bf16.pth"
SPIECE = ROOT / "google" / "umt5-xxl" / "spiece.model"
REFERENCE = json.loads((ROOT / "reference.json").read_text())
PROMPTS: dict[str, str] = REFERENCE["prompts"]
ENCODER = EncoderSpec((OFFICIAL,), "official", "weights", "tokenizer", "fp32")
TOKENIZER = Tokenizer(SPIECE)


def tokens(text: str, max_tokens: int = 256) -> Tokens:
    return TOKENIZER.tokenize(text, max_tokens)


def prompt_of_length(count: int) -> str:
    """`▁a` is one piece, so that many tokens with `</s>`."""
    return " ".join(["a"] * (count - 1))


def make_embedding(text: str = "a fog", width: int = 8) -> Embedding:
    found = tokens(text)
    rows_NE = torch.randn(len(found.ids), width, generator=torch.Generator().manual_seed(1))
    return Embedding.from_tokens(found, rows_NE, "weights")


def are_equal(a: Embedding, b: Embedding) -> bool:
    return pack([a]) == pack([b])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


# ---- cleaning and tokens ----


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("calm &amp; dreamlike", "calm & dreamlike"),
        ("calm &amp;amp; dreamlike", "calm & dreamlike"),
        ("  two  spaces\n\tand a tab ", "two spaces and a tab"),
        ("a\u00a0b\u3000c", "a b c"),
        ("最差质量\uff0c低质量", "最差质量,低质量"),
        ("\u201ccurly\u201d and \u2018single\u2019", "\"curly\" and 'single'"),
        ("itâ€™s mojibake", "it's mojibake"),
        ("\ufb01re \uff21\uff22", "fire AB"),
        ("&nbsp;", ""),
        ("", ""),
    ],
)
def test_a_prompt_is_cleaned_as_the_official_code_does(raw: str, cleaned: str):
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    ("text", "point"), [("a\0b", "U\\+0000"), ("a\ud800", "U\\+D800"), ("\udfffa", "U\\+DFFF")]
)
def test_nul_and_lone_surrogates_are_refused_by_code_point(text: str, point: str):
    with pytest.raises(JobError, match=f"job.yaml:3: .*{point}"):
        clean(text, where="job.yaml:3")


@pytest.mark.parametrize("name", PROMPTS)
def test_token_ids_are_the_official_ones(name: str):
    found = tokens(PROMPTS[name])
    assert list(found.ids) == REFERENCE["tokens"][name]
    spelled = "".join(found.pieces).replace("▁", " ").replace("<0x26>", "&")
    assert spelled.strip() == found.text + "</s>"


def test_an_empty_prompt_is_one_token():
    assert tokens("").ids == (EOS,)


@pytest.mark.parametrize("count", [255, 256])
def test_a_prompt_up_to_the_limit_is_not_cut(count: int):
    found = tokens(prompt_of_length(count))
    assert len(found.ids) == count
    assert not found.truncated


def test_one_token_too_many_is_refused_with_count_limit_and_both_ways_out():
    with pytest.raises(PromptTooLong, match=r"257 tokens, text\.max_tokens is 256") as caught:
        tokens(prompt_of_length(257))
    assert "text.max_tokens: 512" in caught.value.hint
    assert "text.truncate: true" in caught.value.hint


def test_the_longer_limit_is_not_offered_to_a_prompt_that_exceeds_it():
    with pytest.raises(PromptTooLong) as caught:
        tokens(prompt_of_length(513), 512)
    assert "512" not in caught.value.hint


def test_truncation_keeps_the_last_token_as_end_of_text():
    cut = TOKENIZER.tokenize(prompt_of_length(300), 256, truncate=True)
    assert len(cut.ids) == 256
    assert cut.ids[-1] == EOS
    assert cut.ids[:-1] == tokens(prompt_of_length(256)).ids[:-1]
    assert cut.truncated
    assert cut.full_length == 300


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path: Path):
    broken = tmp_path / "spiece.model"
    broken.write_bytes(SPIECE.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        Tokenizer(broken)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters() | st.characters(categories=["Cs", "Cf", "Mn"])))
def test_any_text_is_either_refused_or_survives_a_round_trip(text: str):
    try:
        found = TOKENIZER.tokenize(text, 512, truncate=True)
    except JobError:
        assert any(c == "\0" or 0xD800 <= ord(c) <= 0xDFFF for c in text)
        return
    assert ENCODER.key(found)
    embedding = Embedding.from_tokens(found, torch.zeros(len(found.ids), 2), "weights")
    assert are_equal(unpack(pack([embedding]))[0], embedding)


def test_a_plan_tokenizes_and_computes_keys_without_torch(tmp_path: Path):
    entry = tmp_path / "entry"
    entry.write_bytes(pack([make_embedding()]))
    program = f"""
import sys
from pathlib import Path
from wancli.text.embedding import read_tokens
from wancli.text.encoder import EncoderSpec
from wancli.text.tokenizer import Tokenizer
tokens = Tokenizer(Path({str(SPIECE)!r})).tokenize("a fog", 256)
EncoderSpec((), "official", "weights", "tokenizer", "bf16").key(tokens)
assert read_tokens(Path({str(entry)!r}).read_bytes()) == [tokens]
print(*{{"torch", "transformers", "numpy"}} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# ---- keys ----


def test_the_key_changes_with_everything_that_changes_an_embedding(monkeypatch: pytest.MonkeyPatch):
    same_parts: dict[str, Any] = {
        "encoder": "weights",
        "tokenizer_sha": "tokenizer",
        "dtype": "bf16",
        "max_tokens": 256,
        "cleaned": "a cat",
    }
    changes: list[dict[str, Any]] = [
        {"encoder": "other"},
        {"tokenizer_sha": "other"},
        {"dtype": "fp32"},
        {"max_tokens": 512},
        {"cleaned": "a Cat"},
        {"cleaned": "a cat\u0301"},
    ]
    keys = [embedding_key(**same_parts), *(embedding_key(**same_parts | change) for change in changes)]
    monkeypatch.setattr(embedding, "library_versions", lambda: library_versions() | {"ftfy": "7.0"})
    keys.append(embedding_key(**same_parts))
    assert len(set(keys)) == len(changes) + 2
    assert all(len(key) == 64 for key in keys)


def test_texts_that_are_equal_after_cleaning_share_a_key():
    assert ENCODER.key(tokens("a  cat &amp; fog")) == ENCODER.key(tokens("a cat & fog "))


# ---- the stage ----


def test_contexts_are_the_official_ones_and_padded_with_zeros(store: Store):
    expected = load_file(ROOT / "reference.safetensors")
    texts = {tokens(text).text: name for name, text in PROMPTS.items()}
    for done in encode(ENCODER, [tokens(text) for text in PROMPTS.values()], store):
        expected_NE = expected[f"context.{texts.pop(done.embedding.text)}"]
        count = len(expected_NE)
        assert (done.embedding.rows_NE - expected_NE).norm() / expected_NE.norm() < 1e-5
        padded_ME = done.embedding.to_padded()
        assert padded_ME.shape == (256, 64)
        assert torch.equal(padded_ME[:count], done.embedding.rows_NE)
        assert not padded_ME[count:].any()
    assert not texts


def test_a_streamed_encoder_gives_the_same_entries_in_one_pass_over_its_weights(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    real, fetched = OnDisk.unpack, []

    def unpack(self: OnDisk, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        fetched.append(self.name)
        return real(self, dtype, out=out)

    monkeypatch.setattr(OnDisk, "unpack", unpack)
    wanted = [tokens(text) for text in PROMPTS.values()]
    resident = list(encode(ENCODER, wanted, None))
    assert fetched == []
    streamed = list(encode(replace(ENCODER, residency="streamed"), wanted, store))
    assert len(fetched) == len(set(fetched)) == 3 * 7
    assert [done.key for done in streamed] == [done.key for done in resident]
    assert all(are_equal(a.embedding, b.embedding) for a, b in zip(streamed, resident, strict=True))
    assert len(store.entries()) == 3


def test_a_second_encode_never_loads_the_encoder(store: Store):
    wanted = [tokens("a cat"), tokens("a fog")]
    first = {done.key: done for done in encode(ENCODER, wanted, store)}
    gone = replace(ENCODER, files=(Path("/nowhere/umt5.pth"),))
    second = {done.key: done for done in encode(gone, wanted, store)}
    assert [done.hit for done in first.values()] == [False, False]
    assert [done.hit for done in second.values()] == [True, True]
    assert all(are_equal(first[key].embedding, second[key].embedding) for key in first)


def test_equal_prompts_are_encoded_once():
    done = list(encode(ENCODER, [tokens("a cat"), tokens(" a  cat")], None))
    assert len(done) == 1


def test_only_what_is_missing_is_encoded_and_hits_come_first(store: Store):
    list(encode(ENCODER, [tokens("a cat")], store))
    done = list(encode(ENCODER, [tokens("a fog"), tokens("a cat")], store))
    assert [(d.embedding.text, d.hit) for d in done] == [("a cat", True), ("a fog", False)]


def test_a_damaged_entry_is_computed_again(store: Store):
    (first,) = encode(ENCODER, [tokens("a cat")], store)
    path = store.path(first.key)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (second,) = encode(ENCODER, [tokens("a cat")], store)
    (third,) = encode(ENCODER, [tokens("a cat")], store)
    assert [second.hit, third.hit] == [False, True]
    assert are_equal(first.embedding, third.embedding)


@pytest.mark.parametrize("payload", [b"", b"from another tool"])
def test_an_entry_with_other_content_is_a_miss(payload: bytes, store: Store):
    store.put(ENCODER.key(tokens("a cat")), payload)
    (done,) = encode(ENCODER, [tokens("a cat")], store)
    assert not done.hit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_prompt_and_nothing_is_cached(
    value: float, store: Store, tmp_path: Path
):
    weights = torch.load(OFFICIAL, weights_only=True)
    weights["blocks.1.attn.v.weight"][3, 3] = value
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    (failed,) = encode(replace(ENCODER, files=(path,)), [tokens("a cat")], store)
    assert isinstance(failed, EncodeFailure)
    assert isinstance(failed.error, NotFinite)
    assert "'a cat'" in str(failed.error)
    assert store.entries() == []


def test_processes_that_encode_the_same_prompts_leave_one_good_entry_each(store: Store):
    program = f"""
import os
from pathlib import Path
from transformers import UMT5EncoderModel
from wancli.text.encoder import EncoderSpec, encode
from wancli.text.tokenizer import Tokenizer
from wancli.storage.cache import Store
tokenizer = Tokenizer(Path({str(SPIECE)!r}))
prompts = [tokenizer.tokenize(text, 256) for text in {list(PROMPTS.values())!r}]
encoder = EncoderSpec((Path({str(OFFICIAL)!r}),), "official", "weights", "tokenizer", "fp32")
for _ in range(3):
    if not os.fork():
        break
assert len(list(encode(encoder, prompts, Store(Path({str(store.root)!r}))))) == 3
while True:
    try:
        assert os.wait()[1] == 0
    except ChildProcessError:
        break
"""
    run(program=program).check_returncode()
    assert len(store.entries()) == 3
    assert store.verify() == []
    assert all(done.hit for done in encode(ENCODER, map(tokens, PROMPTS.values()), store))


# ---- files ----


def test_saved_embeddings_are_loaded_by_index(tmp_path: Path):
    path = tmp_path / "prompts.safetensors"
    both = [make_embedding("a cat"), make_embedding("a fog")]
    save_embeddings(path, both)
    assert all(are_equal(load_embedding(path, i), embedding) for i, embedding in enumerate(both))
    assert load_file(path)["embedding.1"].shape == (len(both[1].ids), 8)
    assert [found.text for found in read_tokens(path.read_bytes())] == ["a cat", "a fog"]


def test_bf16_rows_are_loaded_unchanged():
    half = replace(make_embedding(), rows_NE=make_embedding().rows_NE.bfloat16())
    assert are_equal(unpack(pack([half]))[0], half)


def test_equal_embeddings_give_equal_bytes():
    assert pack([make_embedding(), make_embedding("a cat")]) == pack(
        [make_embedding(), make_embedding("a cat")]
    )


def test_a_saved_file_is_not_overwritten_by_another(tmp_path: Path):
    path = tmp_path / "prompts.safetensors"
    save_embeddings(path, [make_embedding()])
    save_embeddings(path, [make_embedding()])
    with pytest.raises(OutputExists):
        save_embeddings(path, [make_embedding("a cat")])


def test_every_flipped_byte_and_every_cut_of_an_embedding_file_is_detected():
    whole = make_embedding("a", width=2)
    payload = pack([whole])
    for place in range(len(payload)):
        flipped = bytearray(payload)
        flipped[place] ^= 0x11
        for damaged in (bytes(flipped), payload[:place]):
            try:
                (found,) = unpack(damaged)
            except EntryError:
                continue
            assert are_equal(found, whole)


def test_a_file_of_a_later_format_is_refused_not_misread():
    payload = pack([make_embedding()]).replace(b'\\"format\\":1', b'\\"format\\":9')
    with pytest.raises(EntryError, match="of another version: format"):
        unpack(payload)


def test_a_missing_embedding_is_a_job_error(tmp_path: Path):
    with pytest.raises(JobError, match="cannot be read"):
        load_embedding(tmp_path / "none.safetensors")
    save_embeddings(tmp_path / "one.safetensors", [make_embedding()])
    with pytest.raises(JobError, match="no embedding 1: the file contains 1"):
        load_embedding(tmp_path / "one.safetensors", 1)
