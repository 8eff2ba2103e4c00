"""Measure how different two prompts are to the model: `wancli diff`.

Letters: A and B tokens of the two prompts, N tokens of one or rows of a context, E text width,
D model width, H heads, K head width.

All figures except the legacy one use the real tokens without `</s>`, and are measured from the pad
row, because the model sees zero rows after the end of a prompt: 0 before the text projection f,
f(0) after it. They do not depend on padding or scale.

- relative L2: ‖a-b‖ / sqrt((‖a‖²+‖b‖²)/2), position by position over the shorter prompt. sqrt(2) for
  unrelated rows, and nearly that after one inserted word, which shifts all others.
- pooled cosine: between the mean rows.
- token-set distance: 1 - the mean cosine of each token's best match in the other prompt, both ways.
  Word order does not matter. What all tokens share is subtracted first, see `_cosines`.
- legacy changed-percent: elements with |a-b| > 0.01 over all rows, `</s>` included, the shorter
  prompt filled with zeros: to the longer (trimmed), or both to 512 (padded; at most N/512). It
  depends on padding and on the scale of the rows. Use it only to compare with old notes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    from wancli.models.dit import WanModel
    from wancli.models.dit_layers import CrossAttention
    from wancli.text.embedding import Embedding

LEGACY_THRESHOLD, LEGACY_ROWS = 0.01, 512
SIMILAR, DIFFERENT = 30.0, 50.0  # percent: the bands of the 50 % rule
PARAGRAPH = 100  # characters; the model was trained on longer captions
PRIOR_ROWS = 32
_WEIGHTED = re.compile(r"\([^()]+:\s*\d*\.?\d+\)")


@dataclass(frozen=True)
class PromptStats:
    """One of the two prompts, cleaned. `tokens` counts `</s>`."""

    text: str
    characters: int
    tokens: int
    truncated_from: int | None


@dataclass(frozen=True)
class RowMetrics:
    """Distances of two sets of rows. `token_set_distance` is 0 for equal tokens, 1 for unrelated ones."""

    relative_l2: float
    pooled_cosine: float
    token_set_distance: float


@dataclass(frozen=True)
class Verdict:
    """The judgement by the 50 % rule: two prompts should differ by more than 50 % in `figure`."""

    band: str  # "too similar" below 30 %, "borderline" below 50 %, "different"
    percent: float
    figure: str


@dataclass(frozen=True)
class PromptDistance:
    """All figures of two prompts. `projected` and `blocks` (the K/V distance in each block) need a DiT."""

    a: PromptStats
    b: PromptStats
    legacy_trimmed_percent: float
    legacy_padded_percent: float
    raw: RowMetrics
    projected: RowMetrics | None
    blocks: tuple[float, ...]
    hints: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        percent = 100 * (self.projected or self.raw).token_set_distance
        band = "too similar" if percent < SIMILAR else "borderline" if percent < DIFFERENT else "different"
        where = "after" if self.projected else "before"
        return Verdict(band, percent, f"token-set distance {where} the text projection")

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain numbers, texts and lists, for `--json`."""
        return asdict(self) | {"verdict": asdict(self.verdict)}

    def table_rows(self) -> list[tuple[str, str, str]]:
        """Return the label, value and explanation of each figure, for a table."""
        table = [
            (
                "tokens",
                f"{_format_count(self.a)} | {_format_count(self.b)}",
                "of the model's 512, </s> included",
            ),
            ("characters", f"{self.a.characters} | {self.b.characters}", "after cleaning"),
            *_metric_rows(self.raw, "raw"),
            *(_metric_rows(self.projected, "projected") if self.projected else []),
        ]
        if self.blocks:
            mean, low, high = sum(self.blocks) / len(self.blocks), min(self.blocks), max(self.blocks)
            value = f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            table.append(("K/V per block", value, f"token set that the {len(self.blocks)} blocks read"))
        return table

    @property
    def legacy_text(self) -> str:
        """The figures of the tool before wancli: elements with |a - b| > 0.01, which depend on the scale."""
        trimmed, padded = self.legacy_trimmed_percent, self.legacy_padded_percent
        return f"legacy figures: {trimmed:.1f} % changed, {padded:.1f} % of {LEGACY_ROWS} rows"


def compare(a: Embedding, b: Embedding, model: WanModel | None = None) -> PromptDistance:
    """Compare two encoded prompts, and with `model` also the keys and values that its blocks read."""
    (distance,) = compare_all([(a, b)], model)
    return distance


def compare_all(
    pairs: Sequence[tuple[Embedding, Embedding]], model: WanModel | None = None
) -> list[PromptDistance]:
    """Compare every pair in one pass over the blocks, for which weights may have to be fetched."""
    distances = _compare_in_blocks(pairs, model) if model is not None and pairs else [(None, ())] * len(pairs)
    return [_measure(a, b, *row) for (a, b), row in zip(pairs, distances)]


def _measure(
    a: Embedding, b: Embedding, projected: RowMetrics | None, blocks: tuple[float, ...]
) -> PromptDistance:
    a_AE, b_BE = _content_rows(a), _content_rows(b)
    trimmed = legacy_percent(a.rows_NE, b.rows_NE, max(len(a.ids), len(b.ids)))
    padded = legacy_percent(a.rows_NE, b.rows_NE, LEGACY_ROWS)
    raw = _measure_rows(a_AE, b_BE)
    return PromptDistance(
        _prompt_stats(a), _prompt_stats(b), trimmed, padded, raw, projected, blocks, _pair_hints(a, b)
    )


def _compare_in_blocks(
    pairs: Sequence[tuple[Embedding, Embedding]], model: WanModel
) -> list[tuple[RowMetrics, tuple[float, ...]]]:
    """Compare the projected texts, and the keys and values in every block."""
    import torch

    device = next(model.parameters()).device
    distances: list[list[float]] = [[] for _ in pairs]
    with torch.no_grad():
        contexts = [tuple(model.project(_content_rows(x).to(device)) for x in pair) for pair in pairs]
        projected = [
            _measure_rows(*(_subtract_pad(context.rows_ND) for context in pair)) for pair in contexts
        ]
        for block in model.blocks:
            attention = cast("CrossAttention", block.cross_attn)
            for (context_a, context_b), into in zip(contexts, distances):
                both_a, both_b = attention.keys_values(context_a), attention.keys_values(context_b)
                keys_AB, values_AB = (
                    _cosines(_merge_heads(x), _merge_heads(y)) for x, y in zip(both_a, both_b)
                )
                into.append(_token_set_distance((keys_AB + values_AB) / 2))
                context_a.kv.clear()  # else the K/V of all blocks and pairs would stay in memory
                context_b.kv.clear()
    return [(figures, tuple(found)) for figures, found in zip(projected, distances)]


def lint(text: str) -> list[str]:
    """List what could be better in a cleaned prompt. The model was trained on paragraphs without weights."""
    hints = []
    if len(text) < PARAGRAPH:
        hints.append(
            f"{len(text)} characters; the model was trained on paragraphs: "
            "say the subject, its surroundings, the light and the mood"
        )
    if weighted := _WEIGHTED.search(text):
        hints.append(f"{weighted[0]} is read as plain text: Wan knows no prompt weights")
    return hints


def legacy_percent(a_AE: Tensor, b_BE: Tensor, rows: int) -> float:
    """Return the ancestor tool's figure: percent of elements with |a-b| > 0.01 in `rows` zero-filled rows."""
    a_NE, b_NE = (x.new_zeros(rows, x.shape[1]).float() for x in (a_AE, b_BE))
    a_NE[: len(a_AE)], b_NE[: len(b_BE)] = a_AE, b_BE
    return 100 * ((a_NE - b_NE).abs() > LEGACY_THRESHOLD).float().mean().item()


def _content_rows(embedding: Embedding) -> Tensor:
    """Return the rows without `</s>`. An empty prompt has no other row, so it keeps it."""
    return embedding.rows_NE[: max(1, len(embedding.ids) - 1)].float()


def _subtract_pad(rows_ND: Tensor) -> Tensor:
    """Return the rows minus the last one, the context's pad row."""
    return rows_ND[:-1].float() - rows_ND[-1].float()


def _merge_heads(x_1HNK: Tensor) -> Tensor:
    """Return the keys or values of all heads side by side, minus the pad row."""
    return _subtract_pad(x_1HNK[0].transpose(0, 1).flatten(1))


def _measure_rows(a_AD: Tensor, b_BD: Tensor) -> RowMetrics:
    from torch.nn.functional import cosine_similarity

    common = min(len(a_AD), len(b_BD))
    a_ND, b_ND = a_AD[:common], b_BD[:common]
    scale = ((a_ND.square().sum() + b_ND.square().sum()) / 2).sqrt()
    return RowMetrics(
        relative_l2=((a_ND - b_ND).norm() / scale).item(),
        pooled_cosine=cosine_similarity(a_AD.mean(0), b_BD.mean(0), dim=0).item(),
        token_set_distance=_token_set_distance(_cosines(a_AD, b_BD)),
    )


def _cosines(a_AD: Tensor, b_BD: Tensor) -> Tensor:
    """Return [A, B] cosines, after subtracting what all tokens of both prompts share.

    Outputs of transformers often lie along a common direction, which makes unrelated tokens look
    alike (arXiv 2109.04404). The mean row is an estimate of it; adding 32 rows of zeros to that mean
    keeps a few tokens from being cancelled by their own mean.
    """
    from torch.nn.functional import normalize

    shared_D = (a_AD.sum(0) + b_BD.sum(0)) / (len(a_AD) + len(b_BD) + PRIOR_ROWS)
    return normalize(a_AD - shared_D, dim=1) @ normalize(b_BD - shared_D, dim=1).T


def _token_set_distance(cosines_AB: Tensor) -> float:
    best = (cosines_AB.amax(1).clamp(0, 1).mean() + cosines_AB.amax(0).clamp(0, 1).mean()) / 2
    return 1 - best.item()


def _prompt_stats(embedding: Embedding) -> PromptStats:
    text, full_length = embedding.text, embedding.full_length
    return PromptStats(text, len(text), len(embedding.ids), full_length if embedding.truncated else None)


def _pair_hints(a: Embedding, b: Embedding) -> tuple[str, ...]:
    hints = [f"{name}: {hint}" for name, side in (("A", a), ("B", b)) for hint in lint(side.text)]
    if a.ids == b.ids:
        hints.append("both prompts are the same tokens")
    return tuple(hints)


def _format_count(side: PromptStats) -> str:
    return f"{side.tokens} (cut from {side.truncated_from})" if side.truncated_from else str(side.tokens)


def _metric_rows(figures: RowMetrics, space: str) -> Sequence[tuple[str, str, str]]:
    token_set = f"{100 * figures.token_set_distance:.1f} %"
    return [
        (f"token set, {space}", token_set, "tokens without a match, in any order"),
        (f"pooled cosine, {space}", f"{figures.pooled_cosine:.3f}", "between the mean tokens"),
        (f"relative L2, {space}", f"{figures.relative_l2:.3f}", "token by token; 1.41 is unrelated"),
    ]
