"""What blocks read, against fp64 arithmetic over all 512 rows, none folded into one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor

from wancli.injection.area import Area
from wancli.injection.contexts import ContextCache, TokenAreas
from wancli.injection.exprs import AreaWeight, Blend, Cell, Concat, Emphasis, Lerp, Nag, Select, Steer, Text
from wancli.injection.table import Rule, Table, apply_rule
from wancli.injection.timeline import Segment, Timeline
from wancli.models.config import WanConfig
from wancli.models.dit import WanModel

CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=1, text_dim=32, freq_dim=64)
A, B, C = Text("a"), Text("b"), Text("c")
TOKENS = 12  # of a latent of 3 x 4 x 4


class Oracle:
    """Cross-attention of the first block in fp64, over rows with weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = WanModel(CONFIG).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.texts = {id: torch.randn(count, 32) for id, count in (("a", 5), ("b", 9), ("c", 3))}
        self.x_1LD = torch.randn(1, TOKENS, 48)
        self.weights = {name: w.double() for name, w in self.model.state_dict().items()}
        self.layer = self.model.blocks[0].cross_attn
        if dtype != torch.float32:
            for name in ("q", "k", "v", "o"):
                getattr(self.layer, name).to(dtype)
        self.cache = ContextCache(self.model, self.texts)
        self.areas = TokenAreas.of_latent(torch.zeros(16, 3, 4, 4))

    def ours(self, cell: Cell) -> Tensor:
        with torch.inference_mode():
            return self.layer(self.x_1LD, self.cache.mix(cell, self.areas))[0].double()

    def rows(self, id: str) -> Tensor:
        """All 512 projected rows."""
        h = self._linear(
            F.pad(self.texts[id].double(), (0, 0, 0, 512 - len(self.texts[id]))), "text_embedding.0"
        )
        return self._linear(F.gelu(h, approximate="tanh"), "text_embedding.2")

    def attend(self, rows_ND: Tensor, mass_N: Tensor | None = None) -> Tensor:
        """Attention before its last projection; key i counts mass_N[i] times."""
        mass_N = torch.ones(len(rows_ND)).double() if mass_N is None else mass_N
        x_LD, name = self.x_1LD[0].double(), "blocks.0.cross_attn."
        q, k = (
            self._rms(self._linear(x, f"{name}{n}"), f"{name}norm_{n}")
            for x, n in ((x_LD, "q"), (rows_ND, "k"))
        )
        v = self._linear(rows_ND, f"{name}v")
        heads = []
        for q_LK, k_NK, v_NK in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1)):
            mass_LN = mass_N * torch.exp(q_LK @ k_NK.T / math.sqrt(24))
            heads.append(mass_LN @ v_NK / mass_LN.sum(-1, keepdim=True))
        return torch.cat(heads, -1)

    def out(self, y_LD: Tensor) -> Tensor:
        return self._linear(y_LD, "blocks.0.cross_attn.o")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.mark.parametrize(("a", "b", "rows"), [("a", "b", (1, 2)), ("a", "b", (2, 7)), ("b", "a", (0, 3))])
def test_selected_rows_are_those_of_the_other_prompt(oracle: Oracle, a: str, b: str, rows: tuple[int, ...]):
    """Also rows past the end of the own prompt, which are padding there."""
    expected = oracle.rows(a)
    expected[list(rows)] = oracle.rows(b)[list(rows)]
    cell = ((Select(Text(a), Text(b), rows), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(expected))) < 1e-5


def test_half_of_the_selected_rows(oracle: Oracle):
    expected = oracle.rows("a")
    expected[[1, 6]] = 0.5 * (expected + oracle.rows("b"))[[1, 6]]
    cell = ((Lerp(A, Select(A, B, (1, 6)), 0.5), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(expected))) < 1e-5


def test_only_the_chosen_rows_are_joined(oracle: Oracle):
    rows_ND = torch.cat((oracle.rows("a"), oracle.rows("b")[[2, 5]]))
    mass_N = torch.cat((torch.ones(512), torch.full((2,), 0.7))).double()
    cell = ((Concat(A, B, 0.7, (2, 5)), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(rows_ND, mass_N))) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)]
)
@pytest.mark.parametrize("weight", [0.05, 0.3, 1.5, 7.0])
def test_an_emphasised_word_counts_so_many_times(weight: float, dtype: torch.dtype, error: float):
    oracle = Oracle(dtype)
    mass_N = torch.ones(512).double()
    mass_N[[1, 3]] = weight
    expected = oracle.out(oracle.attend(oracle.rows("a"), mass_N))
    cell = ((Emphasis(A, ((1, math.log(weight)), (3, math.log(weight)))), 1.0),)
    assert relative_error(oracle.ours(cell), expected) < error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.05, 0.3, 1.0, 1.5, 7.0])
def test_the_mass_of_a_word_is_exact_in_half_precision(weight: float, dtype: torch.dtype):
    """Its bias alone would be rounded, in bf16 by up to 0.4 % of ln(w)."""
    cache = Oracle().cache
    context = cache.context(Emphasis(A, ((2, math.log(weight)),)))
    rows, bias_N = context.biases(dtype)
    assert rows is not None
    mass_N = torch.zeros(len(context.rows_ND)).index_add(0, rows, bias_N.float().exp())
    torch.testing.assert_close(mass_N, torch.tensor([1.0, 1, weight, 1, 1, 507]), rtol=2e-4, atol=0)


def test_contexts_that_differ_in_emphasis_share_their_keys_and_values(oracle: Oracle):
    cells = [((Emphasis(A, ((1, bias),)), 1.0),) for bias in (0.5, -0.5)]
    outs = [oracle.ours(cell) for cell in (((A, 1.0),), *cells)]
    contexts = [oracle.cache.context(expr) for ((expr, _),) in (((A, 1.0),), *cells)]
    assert len({id(context.kv[oracle.layer][0]) for context in contexts}) == 1
    assert all(relative_error(out, outs[0]) > 1e-4 for out in outs[1:])


def test_a_word_may_have_another_weight_in_each_frame(oracle: Oracle):
    """One bias per row and latent frame, as prompts over time need it."""
    areas = [Area(frames=frames) for frames in ((0, 0), (1, 4), (5, 8))]
    cell = tuple(
        (Emphasis(A, ((1, -0.5 * f), (3, 0.8 * f))), AreaWeight(1.0, (area,))) for f, area in enumerate(areas)
    )
    mass = torch.ones(3, 512).double()
    for f in range(3):
        mass[f, 1], mass[f, 3] = math.exp(-0.5 * f), math.exp(0.8 * f)
    by_frame = [oracle.attend(oracle.rows("a"), mass_N) for mass_N in mass]
    expected = torch.cat([y_LD[4 * f : 4 * f + 4] for f, y_LD in enumerate(by_frame)])
    assert relative_error(oracle.ours(cell), oracle.out(expected)) < 1e-5


# The weights of the two columns and the three latent frames of a latent of 3 x 4 x 4.
AREAS = [
    (Area(region=(0.5, 0, 1, 1)), (0, 1), (1, 1, 1)),
    (Area(region=(0.25, 0, 1, 1)), (0.5, 1), (1, 1, 1)),
    (Area(region=(0.5, 0, 1, 1), feather=0.5), (0.125, 0.875), (1, 1, 1)),
    (Area(frames=(3, 8)), (1, 1), (0, 0.5, 1)),
    (Area(frames=(3, 8), region=(0, 0, 0.25, 1)), (0.5, 0), (0, 0.5, 1)),
]


@pytest.mark.parametrize("blend", ["context-lerp", "output-mix", "replace", "concat"])
@pytest.mark.parametrize(("area", "by_column", "by_frame"), AREAS, ids=str)
def test_each_token_reads_both_by_its_weight_in_the_area(
    oracle: Oracle, blend: Blend, area: Area, by_column: tuple[float, ...], by_frame: tuple[float, ...]
):
    strength = 1.0 if blend == "replace" else 0.6
    rule = Rule("b", ((0, strength),), ((0, 1.0),), ("cond",), blend, 1.0, area=area)
    rows_a, rows_b = oracle.rows("a"), oracle.rows("b")
    outside = oracle.attend(rows_a)
    match blend:
        case "context-lerp":
            inside = oracle.attend(0.4 * rows_a + 0.6 * rows_b)
        case "output-mix":
            inside = 0.4 * outside + 0.6 * oracle.attend(rows_b)
        case "replace":
            inside = oracle.attend(rows_b)
        case "concat":
            mass_N = torch.cat((torch.ones(512), torch.full((512,), 0.6))).double()
            inside = oracle.attend(torch.cat((rows_a, rows_b)), mass_N)
    w_LD = torch.tensor([t * x for t in by_frame for _ in range(2) for x in by_column]).double()[:, None]
    plain = ((A, 1.0),)
    found = oracle.ours(apply_rule(rule, plain, A, strength))
    assert relative_error(found, oracle.out((1 - w_LD) * outside + w_LD * inside)) < 1e-5
    untouched = w_LD[:, 0] == 0
    assert torch.equal(found[untouched], oracle.ours(plain)[untouched])


def test_rules_that_follow_each_other_within_a_latent_frame_leave_nothing_of_the_prompt_before(
    oracle: Oracle,
):
    """Frames 0-2 read b and frames 3-8 read c: the second latent frame, 1 to 4, reads half of each."""
    cell: Cell = ((A, 1.0),)
    for text, frames in (("b", (0, 2)), ("c", (3, 8))):
        rule = Rule(text, ((0, 1.0),), ((0, 1.0),), ("cond",), "replace", 1.0, area=Area(frames=frames))
        cell = apply_rule(rule, cell, A, 1.0)
    b, c = (oracle.attend(oracle.rows(id)) for id in ("b", "c"))
    w_LD = torch.tensor([1.0] * 4 + [0.5] * 4 + [0.0] * 4).double()[:, None]
    assert relative_error(oracle.ours(cell), oracle.out(w_LD * b + (1 - w_LD) * c)) < 1e-5


def guided(positive: Tensor, negative: Tensor, scale: float, tau: float) -> Tensor:
    """g of normalised attention guidance, token by token."""
    g = scale * positive - (scale - 1) * negative
    rows = []
    for g_D, z_D in zip(g, positive):
        ratio = g_D.abs().sum() / z_D.abs().sum()
        rows.append(g_D * tau / ratio if ratio > tau else g_D)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("scale", "alpha", "tau", "weight"),
    [(11.0, 0.25, 2.5, 1.0), (5.0, 0.5, 1.5, 0.6), (3.0, 1.0, 100.0, 1.0)],
)
def test_guidance_of_attention(oracle: Oracle, scale: float, alpha: float, tau: float, weight: float):
    z, away = oracle.attend(oracle.rows("a")), oracle.attend(oracle.rows("b"))
    a = alpha * weight
    expected = oracle.out(a * guided(z, away, scale, tau) + (1 - a) * z)
    cell = ((A, 1.0), (Nag(B, scale, alpha, tau), weight))
    assert relative_error(oracle.ours(cell), expected) < 1e-5


def test_guidance_changes_what_all_prompts_of_a_cell_give_together_in_its_area(oracle: Oracle):
    z = 0.4 * oracle.attend(oracle.rows("a")) + 0.6 * oracle.attend(oracle.rows("c"))
    g = guided(z, oracle.attend(oracle.rows("b")), 5.0, 1.5)
    inside_L = torch.tensor([0.0, 1, 0, 1] * 3).double()[:, None]
    inside_L[:4] = 0  # the first latent frame
    expected = oracle.out(z + 0.5 * inside_L * (g - z))
    right = Area(frames=(1, 8), region=(0.5, 0.0, 1.0, 1.0))
    cell = ((A, 0.4), (C, 0.6), (Nag(B, 5.0, 0.5, 1.5), AreaWeight(1.0, (right,))))
    assert relative_error(oracle.ours(cell), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_in_half_precision(dtype: torch.dtype):
    oracle = Oracle(dtype)
    z, away = oracle.attend(oracle.rows("a")), oracle.attend(oracle.rows("b"))
    expected = oracle.out(0.25 * guided(z, away, 11.0, 2.5) + 0.75 * z)
    error = relative_error(oracle.ours(((A, 1.0), (Nag(B, 11.0, 0.25, 2.5), 1.0))), expected)
    assert error < (5e-3 if dtype == torch.float16 else 4e-2)


def test_steering_moves_the_rows_of_tokens_and_not_the_padding(oracle: Oracle):
    means = {id: oracle.rows(id)[: len(rows)].mean(0) for id, rows in oracle.texts.items()}
    vector_D = (means["b"] + means["c"]) / 2 - means["a"]
    rows_ND = oracle.rows("a")
    rows_ND[:5] += 1.5 * vector_D
    cell = ((Steer(A, ("b", "c"), ("a",), 1.5), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(rows_ND))) < 1e-5


def test_steering_of_joined_prompts_leaves_both_paddings(oracle: Oracle):
    vector_D = oracle.rows("c")[:3].mean(0)
    rows = [oracle.rows(id) for id in ("a", "b")]
    rows[0][:5] += vector_D
    rows[1][:9] += vector_D
    cell = ((Steer(Concat(A, B, 1.0), ("c",), (), 1.0), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(torch.cat(rows)))) < 1e-5


def test_steering_after_selecting_a_row_past_the_end(oracle: Oracle):
    """That row is a word; those before it are still padding."""
    vector_D = oracle.rows("c")[:3].mean(0)
    rows_ND = oracle.rows("a")
    rows_ND[7] = oracle.rows("b")[7]
    rows_ND[[0, 1, 2, 3, 4, 7]] += vector_D
    cell = ((Steer(Select(A, B, (7,)), ("c",), (), 1.0), 1.0),)
    assert relative_error(oracle.ours(cell), oracle.out(oracle.attend(rows_ND))) < 1e-5


@pytest.mark.parametrize("fade", [0, 4])
def test_segments_of_a_prompt_are_mixed_by_their_share_of_each_latent_frame(oracle: Oracle, fade: int):
    """Frames 4 and later read b: a quarter of latent frame 1. The fade is a line over [2, 6): its mean
    is 1.125/4 over [1, 5), and 3.875/4 over [5, 9).
    """
    segments = (Segment((0, 3), "a", "A"), Segment((4, 8), "b", "B"))
    cell = Timeline(segments, "crossfade" if fade else "cut", fade).cell
    share_b = (
        torch.tensor([0.0, 0.28125, 0.96875] if fade else [0.0, 0.25, 1.0])
        .double()
        .repeat_interleave(4)[:, None]
    )
    a, b = (oracle.attend(oracle.rows(id)) for id in "ab")
    assert relative_error(oracle.ours(cell), oracle.out((1 - share_b) * a + share_b * b)) < 1e-5


def test_a_relay_adds_its_biases_to_the_words_of_each_segment(oracle: Oracle):
    """Rows 1 and 2 belong to latent frames 0 and 1, rows 3 to 5 to latent frame 2."""
    segments = (Segment((0, 4), "b", "A", (1, 3)), Segment((5, 8), "b", "B", (3, 6)))
    by_frame = []
    for f in range(3):
        mass_N = torch.ones(512).double()
        for rows, middle in ((slice(1, 3), 0.5), (slice(3, 6), 2)):
            mass_N[rows] = math.exp(-((f - middle) ** 2) * math.log(1000) ** 2 / 2)
        by_frame.append(oracle.attend(oracle.rows("b"), mass_N)[4 * f : 4 * f + 4])
    found = oracle.ours(Timeline(segments, "relay").cell)
    assert relative_error(found, oracle.out(torch.cat(by_frame))) < 1e-5
    assert relative_error(found, oracle.out(oracle.attend(oracle.rows("b")))) > 1e-3


@pytest.mark.parametrize("blend", ["context-lerp", "output-mix", "concat", "replace"])
def test_a_rule_changes_what_each_segment_reads(oracle: Oracle, blend: Blend):
    """In latent frame 0, and the prompts are a | b."""
    segments = (Segment((0, 4), "a", "A"), Segment((5, 8), "b", "B"))
    strength = 1.0 if blend == "replace" else 0.4
    area = Area(frames=(0, 0))
    rule = Rule("c", ((0, strength),), ((0, 1.0),), ("cond",), blend, 1.0, area=area)
    table = Table([rule], {"cond": "a"}, 1, 1, over_time=Timeline(segments, "cut").cell)
    a, b, c = (oracle.rows(id) for id in "abc")
    inside = {
        "context-lerp": lambda: oracle.attend(0.6 * a + 0.4 * c),
        "output-mix": lambda: 0.6 * oracle.attend(a) + 0.4 * oracle.attend(c),
        "concat": lambda: oracle.attend(
            torch.cat((a, c)), torch.cat((torch.ones(512), torch.full((512,), 0.4))).double()
        ),
        "replace": lambda: oracle.attend(c),
    }[blend]()
    expected = torch.cat((inside[:4], oracle.attend(a)[4:8], oracle.attend(b)[8:]))
    assert relative_error(oracle.ours(table.row(0, "cond")[0]), oracle.out(expected)) < 1e-5
