"""Attention maps against the softmax over all 512 rows, written out in fp64."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wancli.injection.attention_maps import AttentionMaps, word_probabilities
from wancli.injection.attention_spec import AttentionSpec, Group
from wancli.injection.contexts import ContextCache, Effect
from wancli.injection.exprs import Branch
from wancli.injection.table import CellRule, Rule, Table
from wancli.injection.tuning import EmphasisRule, SteerRule
from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import WanModel
from wancli.sampling.denoise import DenoiseRun, StepResult, denoise, denoise_batch, draw_noise
from wancli.sampling.solvers import State, build_sigma_schedule
from wancli.sampling.stages import Stage

CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=32, freq_dim=64)
STEPS = 3
SPEC = AttentionSpec(
    words=("circle", "stripes"),
    rows=((1,), (3, 4)),
    blocks=(Group((0, 1, 2), "all"), Group((2,), "late")),
    steps=(Group((0, 1), "0-1"), Group((2,), "2")),
)
RULE = Rule("other", ((1, 1.0), (2, 0.5)), ((0, 1.0), (2, 1.0)), ("cond",), "output-mix", 1.0)


def make_model(chunk: int | None = None) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG, ComputeOptions(chunk=chunk)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for block in model.blocks:  # or the queries are small, and every word as probable as any other
        block.cross_attn.norm_q.weight.data.fill_(2)
        block.cross_attn.norm_k.weight.data.fill_(2)
    return model


def make_run(
    model: WanModel,
    maps: AttentionMaps | None,
    *,
    steps: range = range(STEPS),
    seed: int = 0,
    rules: Sequence[CellRule] = (RULE,),
) -> DenoiseRun:
    torch.manual_seed(7)
    rows = {"main": torch.randn(6, 32), "other": torch.randn(9, 32), "negative": torch.randn(4, 32)}
    base: dict[Branch, str] = {"cond": "main", "uncond": "negative"}
    return DenoiseRun(
        State(draw_noise((16, 3, 8, 12), seed)),
        build_sigma_schedule("unipc", STEPS, 5.0),
        "unipc",
        Table(rules, base, CONFIG.num_layers, STEPS),
        ContextCache(model, rows),
        Stage("only", steps, 4.0),
        attention=maps,
    )


def zeros() -> AttentionMaps:
    return AttentionMaps.zeros(SPEC, 3 * 4 * 6)


def sums(maps: AttentionMaps | None) -> Tensor:
    assert maps is not None
    return maps.sums_GSWL


@torch.inference_mode()
def sample(model: WanModel, run: DenoiseRun) -> StepResult:
    *_, last = denoise(model, run)
    return last


def expected_maps(model: WanModel, run: DenoiseRun) -> Tensor:
    """The means [W, G, S, L] in fp64, from what enters the cross-attention of the cond forwards."""
    entered: defaultdict[int, list[Tensor]] = defaultdict(list)
    handles = [
        block.cross_attn.register_forward_pre_hook(
            lambda _, args, b=b: entered[b].append(args[0][0].double())
        )
        for b, block in enumerate(model.blocks)
    ]
    sample(model, run)
    for handle in handles:
        handle.remove()
    context = model.project(run.contexts._rows_NE["main"])
    pad = context.rows_ND[-1:].expand(512 - len(context.rows_ND), -1)
    rows_ND = torch.cat((context.rows_ND, pad)).double()
    means = torch.zeros(2, 2, 2, 72, dtype=torch.float64)
    for g, blocks in enumerate(SPEC.blocks):
        for s, steps in enumerate(SPEC.steps):
            found = [
                word_softmax(model, b, entered[b][2 * step], rows_ND)
                for b in blocks.members
                for step in steps.members
            ]
            means[:, g, s] = torch.stack(found).mean(0)
    return means


def word_softmax(model: WanModel, block: int, x_LD: Tensor, rows_ND: Tensor) -> Tensor:
    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * weight.double()

    layer = model.blocks[block].cross_attn
    q = rms(F.linear(x_LD, layer.q.weight.double(), layer.q.bias.double()), layer.norm_q.weight)
    k = rms(F.linear(rows_ND, layer.k.weight.double(), layer.k.bias.double()), layer.norm_k.weight)
    heads = []
    for q_LK, k_NK in zip(q.chunk(2, -1), k.chunk(2, -1)):
        exp_LN = torch.exp(q_LK @ k_NK.T / math.sqrt(24))
        p_LN = exp_LN / exp_LN.sum(-1, keepdim=True)
        heads.append(torch.stack([p_LN[:, list(rows)].sum(-1) for rows in SPEC.rows]))
    return torch.stack(heads).mean(0)


@torch.inference_mode()
def test_maps_are_the_softmax_over_all_512_rows_summed_over_pieces_and_averaged() -> None:
    model = make_model()
    found = sample(model, make_run(model, zeros())).attention
    assert found is not None
    expected = expected_maps(model, make_run(model, None))
    torch.testing.assert_close(found.average().double(), expected, rtol=2e-5, atol=1e-9)
    assert (expected.std(dim=-1) / expected.mean(dim=-1)).min() > 0.01  # or a map of equal tokens would do


@torch.inference_mode()
def test_emphasis_is_in_the_softmax_of_the_blocks_that_have_it() -> None:
    """A word that counts twice has twice the odds against all other rows."""
    model = make_model()
    spec = replace(
        SPEC, words=("stripes",), rows=((3,),), blocks=(Group((2,), "2"),), steps=(Group((0,), "0"),)
    )
    rule = EmphasisRule("stripes", (3,), 2.0, ((2, 1.0),), ((0, 1.0),))
    found = []
    for rules in ([], [rule]):
        run = make_run(model, AttentionMaps.zeros(spec, 72), rules=rules)
        layer = model.blocks[2].cross_attn
        heads: list[Tensor] = []
        hook = layer.norm_q.register_forward_hook(lambda _, __, q, heads=heads: heads.append(q[0].double()))
        found.append(sums(sample(model, run).attention)[0, 0, 0].double())
        hook.remove()
    q_LHK = heads[0].unflatten(-1, (2, 24))
    context = model.project(run.contexts._rows_NE["main"])
    k_HNK = layer.keys_values(context)[0][0].double()
    odds_HL = []
    for h in range(2):
        mass_LN = torch.exp(q_LHK[:, h] @ k_HNK[h].T / math.sqrt(24) + context.bias_N.double())
        odds_HL.append(mass_LN[:, 3] / (mass_LN.sum(-1) - mass_LN[:, 3]))
    for emphasised, odds in zip(found, (1, 2)):
        expected_L = torch.stack([odds * x / (1 + odds * x) for x in odds_HL]).mean(0)
        torch.testing.assert_close(emphasised, expected_L, rtol=2e-5, atol=1e-9)


@torch.inference_mode()
def test_steering_is_in_the_keys_of_the_blocks_that_have_it() -> None:
    model = make_model()
    spec = replace(
        SPEC, words=("stripes",), rows=((3,),), blocks=(Group((2,), "2"),), steps=(Group((0,), "0"),)
    )
    rule = SteerRule(("other",), ("negative",), ((2, 0.7),), ((0, 1.0),))
    run = make_run(model, AttentionMaps.zeros(spec, 72), rules=[rule])
    rows, layer = run.contexts._rows_NE, model.blocks[2].cross_attn
    heads: list[Tensor] = []
    hook = layer.norm_q.register_forward_hook(lambda _, __, q: heads.append(q[0].double()))
    found_L = sums(sample(model, run).attention)[0, 0, 0].double()
    hook.remove()
    all_ND = {id: model.text_embedding(F.pad(own, (0, 0, 0, 512 - len(own)))) for id, own in rows.items()}
    means = {id: all_ND[id][: len(own)].mean(0) for id, own in rows.items()}
    all_ND["main"][:6] += 0.7 * (means["other"] - means["negative"])
    k_NHK = layer.norm_k(layer.k(all_ND["main"])).double().unflatten(-1, (2, 24))
    q_LHK = heads[0].unflatten(-1, (2, 24))
    scores_HLN = torch.einsum("lhk,nhk->hln", q_LHK, k_NHK) / math.sqrt(24)
    torch.testing.assert_close(found_L, scores_HLN.softmax(-1)[:, :, 3].mean(0), rtol=2e-5, atol=1e-9)


@torch.inference_mode()
def test_recording_changes_no_bit_of_the_latent() -> None:
    model = make_model()
    plain, recorded = (sample(model, make_run(model, maps)) for maps in (None, zeros()))
    assert torch.equal(plain.state.x, recorded.state.x)
    assert plain.cells_read == recorded.cells_read
    assert plain.attention is None


@torch.inference_mode()
def test_tokens_in_chunks_give_the_maps_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(make_model(), make_run(make_model(), zeros())).attention
    in_pieces = sample(model := make_model(chunk=20), make_run(model, zeros())).attention
    monkeypatch.setattr("wancli.injection.attention_maps.attention_chunk", lambda _: 7)
    small = sample(model := make_model(), make_run(model, zeros())).attention
    for other in (in_pieces, small):
        torch.testing.assert_close(sums(other), sums(whole), rtol=1e-5, atol=1e-8)


@torch.inference_mode()
def test_a_run_that_goes_on_from_a_step_has_the_same_bits() -> None:
    model = make_model()
    whole = sample(model, make_run(model, zeros())).attention
    first = sample(model, make_run(model, zeros(), steps=range(2)))
    rest = replace(make_run(model, first.attention, steps=range(2, 3)), state=first.state)
    assert torch.equal(sums(sample(model, rest).attention), sums(whole))


@torch.inference_mode()
def test_runs_that_share_passes_have_the_maps_that_each_has_alone() -> None:
    model = make_model()
    alone = [sample(model, make_run(model, zeros(), seed=seed)).attention for seed in (0, 1)]
    runs = [make_run(model, maps, seed=seed) for seed, maps in ((0, zeros()), (5, None), (1, zeros()))]
    *_, together = denoise_batch(model, runs, forwards_per_pass=6)
    first, without, second = (result.attention for result in together if isinstance(result, StepResult))
    assert without is None
    for maps, expected in ((first, alone[0]), (second, alone[1])):
        assert torch.equal(sums(maps), sums(expected))


@torch.inference_mode()
def test_measured_effects_and_maps_do_not_meet() -> None:
    model = make_model()
    alone = sample(model, make_run(model, zeros())).attention
    effects: list[Effect] = []
    both = sample(model, replace(make_run(model, zeros()), effects=effects)).attention
    assert torch.equal(sums(both), sums(alone))
    assert len(effects) == 2


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_out_no_padding(dtype: torch.dtype) -> None:
    """The pad row has two keys there, and the second is not counted twice."""
    model = make_model().to(dtype)
    context = make_model().project(torch.randn(6, 32))
    layer = model.blocks[0].cross_attn
    k_1HNK, _ = layer.keys_values(context)
    assert k_1HNK.shape[2] > len(context.bias_N)
    q_HLK = torch.zeros(2, 4, 24, dtype=dtype)
    found = word_probabilities(q_HLK, k_1HNK[0], context.bias_N, [(1,), (3, 4)])
    torch.testing.assert_close(found, torch.tensor([[1 / 512] * 4, [2 / 512] * 4]))


@torch.inference_mode()
def test_a_failed_step_adds_nothing() -> None:
    model = make_model()
    maps = zeros()
    run = make_run(model, maps)
    results = denoise_batch(model, [run], 1)
    next(results)
    assert maps.sums_GSWL.abs().max() == 0
