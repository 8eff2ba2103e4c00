"""`wancli diff`: what each figure promises, on the official contexts and on rows made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wancli.models.config import EOS
from wancli.models.dit import WanModel
from wancli.text.embedding import Embedding
from wancli.text.encoder import EncoderSpec, encode
from wancli.text.prompt_distance import PromptDistance, compare, legacy_percent, lint
from wancli.text.tokenizer import Tokenizer
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_transformer

Encode = Callable[[str], Embedding]

CAR = "A red car drives down a coastal road at sunset, waves crash on the rocks below the cliff."
SHINY_CAR = "A shiny red car drives down a coastal road at sunset, waves crash on the rocks below the cliff."
MARKET = "Crowded market in thick fog; people with umbrellas buy fruit, bread and fish from wooden stalls."


@pytest.fixture(scope="module")
def encode_prompt(tiny: Path) -> Encode:
    tokenizer = Tokenizer(tiny / "google" / "umt5-xxl" / "spiece.model")
    files = (tiny / "models_t5_umt5-xxl-enc-bf16.pth",)
    encoder = EncoderSpec(files, "official", "weights", "tokenizer", "fp32")
    texts = [tokenizer.tokenize(text, 256) for text in ("", "red", CAR, SHINY_CAR, MARKET)]
    known = {done.embedding.text: done.embedding for done in encode(encoder, texts, None)}
    return known.__getitem__


@pytest.fixture(scope="module")
def model(tiny: Path) -> WanModel:
    return load_transformer(identify(tiny))


def from_rows(rows_NE: Tensor, text: str = "made by hand") -> Embedding:
    ids = (*range(3, 2 + len(rows_NE)), EOS)
    return Embedding(text, ids, tuple(map(str, ids)), 256, len(ids), rows_NE, "weights")


def noise(rows: int, seed: int, width: int = 512) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def all_distances(difference: PromptDistance) -> list[float]:
    """All token-set distances: raw, projected, and of each block."""
    assert difference.projected
    return [
        difference.raw.token_set_distance,
        difference.projected.token_set_distance,
        *difference.blocks,
    ]


@pytest.mark.parametrize("text", ["", "red", CAR])
def test_a_prompt_does_not_differ_from_itself(encode_prompt: Encode, model: WanModel, text: str):
    distance = compare(encode_prompt(text), encode_prompt(text), model)
    assert distance.legacy_trimmed_percent == distance.legacy_padded_percent == 0
    assert distance.raw.relative_l2 == 0
    assert distance.raw.pooled_cosine == pytest.approx(1)
    assert all_distances(distance) == pytest.approx([0] * 42, abs=1e-5)
    assert distance.verdict.band == "too similar"
    assert "both prompts are the same tokens" in distance.hints


def test_one_inserted_word_is_a_small_distance_but_a_large_one_position_by_position(
    encode_prompt: Encode, model: WanModel
):
    distance = compare(encode_prompt(CAR), encode_prompt(SHINY_CAR), model)
    assert max(all_distances(distance)) < 0.1
    assert distance.raw.relative_l2 > 1
    assert distance.legacy_trimmed_percent > 90


def test_unrelated_prompts_are_far_apart_in_every_space(encode_prompt: Encode, model: WanModel):
    near = compare(encode_prompt(CAR), encode_prompt(SHINY_CAR), model)
    far = compare(encode_prompt(CAR), encode_prompt(MARKET), model)
    assert all(f > 3 * n for f, n in zip(all_distances(far), all_distances(near), strict=True))


def test_the_figures_do_not_depend_on_which_prompt_comes_first(encode_prompt: Encode, model: WanModel):
    one, other = (
        compare(encode_prompt(CAR), encode_prompt(MARKET), model),
        compare(encode_prompt(MARKET), encode_prompt(CAR), model),
    )
    assert all_distances(one) == pytest.approx(all_distances(other))
    assert one.raw.relative_l2 == pytest.approx(other.raw.relative_l2)
    assert one.legacy_padded_percent == other.legacy_padded_percent


def test_the_order_of_tokens_does_not_matter():
    rows_NE = noise(20, seed=1)
    shuffled_NE = torch.cat([rows_NE[:-1].flip(0), rows_NE[-1:]])
    assert compare(from_rows(rows_NE), from_rows(shuffled_NE)).raw.token_set_distance == pytest.approx(
        0, abs=1e-5
    )


def test_the_figures_do_not_depend_on_the_scale_of_the_rows_but_the_legacy_one_does():
    a_NE, b_NE = noise(30, seed=1), noise(30, seed=2)
    distance = compare(from_rows(a_NE), from_rows(b_NE))
    small = compare(from_rows(a_NE * 0.003), from_rows(b_NE * 0.003))
    assert small.raw.relative_l2 == pytest.approx(distance.raw.relative_l2, rel=1e-4)
    assert small.raw.token_set_distance == pytest.approx(distance.raw.token_set_distance, rel=1e-4)
    assert distance.legacy_trimmed_percent > 99
    assert small.legacy_trimmed_percent < 5


def test_independent_rows_differ_by_the_square_root_of_two():
    distance = compare(from_rows(noise(200, seed=1)), from_rows(noise(200, seed=2)))
    assert distance.raw.relative_l2 == pytest.approx(sqrt(2), rel=0.01)
    assert distance.raw.token_set_distance > 0.8
    assert distance.verdict.band == "different"


def test_a_component_that_all_tokens_share_does_not_hide_the_difference():
    shared_E = 5 * noise(1, seed=3)
    a_NE, b_NE = noise(100, seed=1), noise(100, seed=2)
    plain = compare(from_rows(a_NE), from_rows(b_NE)).raw
    hidden = compare(from_rows(a_NE + shared_E), from_rows(b_NE + shared_E)).raw
    assert hidden.pooled_cosine > 0.9
    assert hidden.token_set_distance > 0.6 * plain.token_set_distance


def test_the_distance_of_two_single_words_is_not_distorted_by_their_mean():
    a_NE = noise(2, seed=1)
    b_NE = a_NE + 0.1 * noise(2, seed=2)
    assert compare(from_rows(a_NE), from_rows(b_NE)).raw.token_set_distance < 0.05


def test_the_legacy_figure_counts_elements_over_zero_filled_rows():
    a_NE = torch.tensor([[0.5, 0.5], [0.2, 0.009]])
    b_NE = torch.tensor([[0.5, 0.52], [0.2, 0.0], [0.3, 0.005]])
    assert legacy_percent(a_NE, b_NE, 3) == pytest.approx(100 * 2 / 6)
    assert legacy_percent(a_NE, b_NE, 512) == pytest.approx(100 * 2 / 1024)


def test_the_padded_legacy_figure_cannot_exceed_the_share_of_real_rows(encode_prompt: Encode):
    distance = compare(encode_prompt(CAR), encode_prompt(MARKET))
    longest = max(distance.a.tokens, distance.b.tokens)
    assert distance.legacy_padded_percent <= 100 * longest / 512
    assert distance.legacy_padded_percent == pytest.approx(distance.legacy_trimmed_percent * longest / 512)


def test_the_projected_figures_use_rows_minus_the_projected_zero_row(encode_prompt: Encode, model: WanModel):
    with torch.no_grad():
        a_ND, b_ND = (
            model.text_embedding(encode_prompt(text).rows_NE[:-1]) - model.text_embedding(torch.zeros(1, 64))
            for text in (CAR, MARKET)
        )
    distance = compare(encode_prompt(CAR), encode_prompt(MARKET), model).projected
    common = min(len(a_ND), len(b_ND))
    scale = sqrt((a_ND[:common].norm() ** 2 + b_ND[:common].norm() ** 2) / 2)
    assert distance
    assert distance.relative_l2 == pytest.approx(
        ((a_ND[:common] - b_ND[:common]).norm() / scale).item(), rel=1e-4
    )
    assert distance.pooled_cosine == pytest.approx(
        torch.cosine_similarity(a_ND.mean(0), b_ND.mean(0), dim=0).item(), abs=1e-4
    )


def test_every_block_has_a_distance_of_its_own(encode_prompt: Encode, model: WanModel):
    distance = compare(encode_prompt(CAR), encode_prompt(MARKET), model)
    assert len(distance.blocks) == 40
    assert len(set(distance.blocks)) == 40


@pytest.mark.parametrize(("share", "band"), [(0.2, "too similar"), (0.4, "borderline"), (0.9, "different")])
def test_the_verdict_falls_into_three_bands_and_names_its_figure(share: float, band: str):
    a_NE = noise(201, seed=1, width=4096)
    b_NE = torch.cat([noise(201, seed=2, width=4096)[: int(201 * share)], a_NE[int(201 * share) :]])
    verdict = compare(from_rows(a_NE), from_rows(b_NE)).verdict
    assert verdict.band == band
    assert verdict.percent == pytest.approx(100 * share, abs=5)
    assert verdict.figure == "token-set distance before the text projection"


def test_the_verdict_uses_the_projected_figure_if_there_is_a_model(encode_prompt: Encode, model: WanModel):
    distance = compare(encode_prompt(CAR), encode_prompt(MARKET), model)
    assert distance.projected
    assert distance.verdict.percent == pytest.approx(100 * distance.projected.token_set_distance)
    assert distance.verdict.figure == "token-set distance after the text projection"


def test_the_result_is_plain_json_and_a_table_of_three_columns(encode_prompt: Encode, model: WanModel):
    distance = compare(encode_prompt(CAR), encode_prompt(MARKET), model)
    said = json.loads(json.dumps(distance.as_dict(), allow_nan=False))
    assert said["verdict"]["band"] == distance.verdict.band
    assert said["blocks"] == list(distance.blocks)
    assert all(len(row) == 3 for row in distance.table_rows())
    labels = [label for label, _, _ in distance.table_rows()]
    assert {"tokens", "characters", "K/V per block"} <= set(labels)


def test_a_truncated_prompt_says_so(tiny: Path):
    tokenizer = Tokenizer(tiny / "google" / "umt5-xxl" / "spiece.model")
    cut = tokenizer.tokenize("a " * 300, 256, truncate=True)
    embedding = Embedding.from_tokens(cut, noise(256, seed=1), "weights")
    distance = compare(embedding, embedding)
    assert distance.a.truncated_from == 301
    assert "256 (cut from 301)" in distance.table_rows()[0][1]


def test_short_phrases_and_prompt_weights_get_a_hint():
    assert "paragraphs" in lint("a cat")[0]
    assert lint(CAR + " Warm evening light.") == []
    assert "(red car:1.3)" in lint(CAR + " Warm evening light on the (red car:1.3).")[0]


def test_hints_name_their_prompt(encode_prompt: Encode):
    assert [hint[:2] for hint in compare(encode_prompt("red"), encode_prompt(MARKET + "")).hints] == [
        "A:",
        "B:",
    ]
