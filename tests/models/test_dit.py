"""The transformer against the official numbers, diffusers, and attention written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import Context, WanModel, concat, lerp
from wancli.models.token_weights import TokenWeights
from wancli.weights.checkpoint import identify
from wancli.weights.formats.key_mapping import transformer_from_diffusers
from wancli.weights.loader import LoadOptions, load_transformer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wan21-tiny"
CASES = json.loads((FIXTURE / "reference.json").read_text())["cases"]
CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, freq_dim=64)


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(FIXTURE / "reference.safetensors")


@pytest.fixture(scope="module")
def model() -> WanModel:
    return load_transformer(identify(FIXTURE))


def random_model(config: WanConfig = CONFIG) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_pair(heads: int, head_dim: int, layers: int) -> tuple[WanTransformer3DModel, WanModel]:
    torch.manual_seed(1)
    theirs = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        text_dim=32,
        freq_dim=64,
        ffn_dim=80,
        num_layers=layers,
    ).eval()
    ours = WanModel(WanConfig(heads * head_dim, 80, heads, layers, text_dim=32, freq_dim=64))
    ours.load_state_dict({transformer_from_diffusers(k): v for k, v in theirs.state_dict().items()})
    return theirs, ours.eval()


def everywhere(model: WanModel, context: Context) -> list[tuple[tuple[Context, float], ...]]:
    return [((context, 1.0),)] * len(model.blocks)


def plain_attention(model: WanModel, x_LD: Tensor, rows_ND: Tensor, weights_N: Tensor) -> Tensor:
    """Block 0's cross-attention before its last projection, in fp64; key i counts weights_N[i] times."""
    attention = model.blocks[0].cross_attn.double()

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q = rms(F.linear(x_LD.double(), attention.q.weight, attention.q.bias), attention.norm_q.weight)
    k = rms(F.linear(rows_ND.double(), attention.k.weight, attention.k.bias), attention.norm_k.weight)
    v = F.linear(rows_ND.double(), attention.v.weight, attention.v.bias)
    heads = []
    for q_LK, k_NK, v_NK in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1)):
        mass_LN = weights_N * torch.exp(q_LK @ k_NK.T / math.sqrt(24))
        heads.append(mass_LN @ v_NK / mass_LN.sum(-1, keepdim=True))
    y_LD = torch.cat(heads, -1)
    attention.float()
    return y_LD


def plain_out(model: WanModel, y_LD: Tensor) -> Tensor:
    o = model.blocks[0].cross_attn.o
    return y_LD @ o.weight.double().T + o.bias.double()


def all_rows(context: Context) -> Tensor:
    """The 512 rows that a context stands for."""
    rows_ND = context.rows_ND
    return torch.cat((rows_ND, rows_ND[-1:].expand(512 - len(rows_ND), -1)))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_velocities_are_those_of_the_official_code(name: str, model: WanModel, official: dict[str, Tensor]):
    cond = model.project(official["context.main"])
    contexts = everywhere(model, cond)
    inject = CASES[name].get("inject", {"steps": [1, 1]})
    if inject["steps"][0] == 0:
        blend = lerp(cond, model.project(official["context.injection"]), inject["strength"])
        first, last = inject["blocks"]
        contexts[first : last + 1] = [((blend, 1.0),)] * (last - first + 1)
    x, t = official[f"{name}.noise"][None], official[f"{name}.timesteps"][0]
    assert relative_error(model(x, t, contexts)[0], official[f"{name}.v_cond_step0"]) < 1e-5
    if (expected := official.get(f"{name}.v_uncond_step0")) is not None:
        uncond = everywhere(model, model.project(official["context.negative"]))
        assert relative_error(model(x, t, uncond)[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("heads", "head_dim", "layers"),
    [(2, 24, 1), (3, 10, 2), (1, 22, 2), (2, 16, 30), (2, 12, 40), (1, 128, 1)],
)
def test_velocities_are_those_of_diffusers_for_any_size(heads: int, head_dim: int, layers: int):
    theirs, ours = random_pair(heads, head_dim, layers)
    x, text = torch.randn(1, 16, 3, 6, 10), torch.randn(7, 32)
    with torch.inference_mode():
        expected = theirs(x, torch.tensor([633.0]), F.pad(text, (0, 0, 0, 505))[None]).sample
        assert relative_error(ours(x, 633.0, everywhere(ours, ours.project(text))), expected) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 300, 511, 512])
@torch.inference_mode()
def test_one_pad_row_stands_for_all_the_padding(count: int):
    model, text = random_model(), torch.randn(count, 32)
    context = model.project(text)
    assert len(context.rows_ND) == min(count + 1, 512)
    padded_ND = model.text_embedding(F.pad(text, (0, 0, 0, 512 - count)))
    x_LD = torch.randn(9, 48)
    expected = plain_out(model, plain_attention(model, x_LD, padded_ND, torch.ones(512)))
    assert relative_error(model.blocks[0].cross_attn(x_LD[None], ((context, 1.0),))[0], expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 61, 200, 509, 510, 511, 512])
@torch.inference_mode()
def test_the_padding_keeps_its_mass_in_half_precision(count: int, dtype: torch.dtype):
    model = random_model()
    context = concat(model.project(torch.randn(count, 32)), model.project(torch.randn(3, 32)), 0.3)
    rows_ND, bias_N = context.in_dtype(dtype)
    assert {rows_ND.dtype, bias_N.dtype} == {dtype}
    assert len(rows_ND) == len(bias_N)
    mass = bias_N.float().exp()
    assert math.isclose(mass.sum().item(), 512 * 1.3, rel_tol=1e-3)


def test_more_rows_than_the_model_has_places_are_refused():
    with pytest.raises(ValueError, match="513 text rows"):
        random_model().project(torch.randn(513, 32))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("counts", [(5, 40), (40, 5), (512, 3), (3, 511), (1, 1)])
@torch.inference_mode()
def test_lerp_is_that_of_the_512_rows(counts: tuple[int, int], weight: float):
    model = random_model()
    a, b = (model.project(torch.randn(count, 32)) for count in counts)
    made = lerp(a, b, weight)
    assert torch.allclose(all_rows(made), (1 - weight) * all_rows(a) + weight * all_rows(b), atol=1e-5)
    assert math.isclose(made.bias_N.exp().sum().item(), 512, rel_tol=1e-5)


@torch.inference_mode()
def test_lerps_nest():
    model = random_model()
    a, b, c = (model.project(torch.randn(count, 32)) for count in (5, 9, 2))
    expected = 0.375 * (all_rows(a) + all_rows(b)) + 0.25 * all_rows(c)
    assert torch.allclose(all_rows(lerp(lerp(a, b, 0.5), c, 0.25)), expected, atol=1e-5)


@torch.inference_mode()
def test_concat_shares_one_softmax_and_weighs_the_second_prompt():
    model, x_LD = random_model(), torch.randn(9, 48)
    a, b, c = (model.project(torch.randn(count, 32)) for count in (5, 9, 512))
    joined = concat(concat(a, b, 0.3), c, 2.0)
    rows_ND = torch.cat([all_rows(x) for x in (a, b, c)])
    weights_N = torch.cat([torch.full((512,), w) for w in (1.0, 0.3, 2.0)])
    expected = plain_out(model, plain_attention(model, x_LD, rows_ND, weights_N))
    assert relative_error(model.blocks[0].cross_attn(x_LD[None], ((joined, 1.0),))[0], expected) < 1e-5


@torch.inference_mode()
def test_a_lerp_may_join_another_prompt():
    model, x_LD = random_model(), torch.randn(9, 48)
    a, b = model.project(torch.randn(5, 32)), model.project(torch.randn(9, 32))
    joined = concat(a, lerp(a, b, 0.4), 1.0)
    rows_ND = torch.cat([all_rows(a), 0.6 * all_rows(a) + 0.4 * all_rows(b)])
    expected = plain_out(model, plain_attention(model, x_LD, rows_ND, torch.ones(1024)))
    assert relative_error(model.blocks[0].cross_attn(x_LD[None], ((joined, 1.0),))[0], expected) < 1e-5


def test_joined_contexts_cannot_be_interpolated():
    model = random_model()
    a, b = model.project(torch.randn(5, 32)), model.project(torch.randn(9, 32))
    for pair in ((concat(a, b, 1.0), a), (a, concat(a, b, 1.0))):
        with pytest.raises(ValueError, match="no counterparts"):
            lerp(*pair, 0.5)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_joined_rows_need_a_positive_weight(weight: float):
    context = random_model().project(torch.randn(5, 32))
    with pytest.raises(ValueError, match="must be positive"):
        concat(context, context, weight)


@pytest.mark.parametrize("weights", [(0.4, 0.6), (1.0, 0.5), (-0.5, 1.5), (0.0, 2.0)])
@torch.inference_mode()
def test_a_mix_is_the_weighted_sum_of_whole_cross_attentions(weights: tuple[float, float]):
    model, x_BLD = random_model(), torch.randn(2, 9, 48)
    cross_attn = model.blocks[0].cross_attn
    a, b = model.project(torch.randn(5, 32)), model.project(torch.randn(9, 32))
    expected = weights[0] * cross_attn(x_BLD, ((a, 1.0),)) + weights[1] * cross_attn(x_BLD, ((b, 1.0),))
    assert relative_error(cross_attn(x_BLD, ((a, weights[0]), (b, weights[1]))), expected) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.3, 0.6)])
def test_each_token_attends_by_its_own_weights(weights: tuple[float, float]):
    """Tokens of weight 0 are left out of the work, and change nothing."""
    model = random_model()
    contexts = [model.project(torch.randn(rows, 32)) for rows in (5, 9)]
    x_BLD, inside_L = torch.randn(2, 6, 48), torch.tensor([0.0, 1.0, *weights, 1.0, 0.0])
    layer = model.blocks[0].cross_attn
    each = [layer(x_BLD, [(context, 1.0)]) for context in contexts]
    expected = (1 - inside_L)[:, None] * each[0] + inside_L[:, None] * each[1]
    asked: list[int] = []
    layer.split_heads = lambda q, real=layer.split_heads: (asked.append(q.shape[1]), real(q))[1]
    mix = [(contexts[0], TokenWeights(1 - inside_L)), (contexts[1], TokenWeights(inside_L))]
    with torch.inference_mode():
        torch.testing.assert_close(layer(x_BLD, mix), expected, rtol=1e-5, atol=1e-5)
    nonzero = [int((share_L != 0).sum()) for share_L in (1 - inside_L, inside_L)]
    assert asked.count(nonzero[0]) >= 1
    assert asked.count(nonzero[1]) >= 1


@pytest.mark.parametrize("weights", [(1.0, 0, 0, 1, 0.5, 0, 0.25, 1), (0, 0, 0, 1.0, 1, 1, 0, 0.5)], ids=str)
@pytest.mark.parametrize("chunk", [3, 100])
def test_chunks_of_tokens_keep_their_weights(chunk: int, weights: tuple[float, ...]):
    """Also if all tokens of a chunk are outside, or inside."""
    torch.manual_seed(3)
    x_BCTYX, weights_L = torch.randn(1, 16, 2, 4, 4), torch.tensor(weights)
    velocities = []
    for tokens in (None, chunk):
        model = WanModel(CONFIG, ComputeOptions(chunk=tokens)).eval()
        model.load_state_dict(random_model().state_dict())
        torch.manual_seed(4)
        a, b = (model.project(torch.randn(rows, 32)) for rows in (5, 9))
        mix = ((a, TokenWeights(1 - weights_L)), (b, TokenWeights(weights_L)))
        with torch.inference_mode():
            velocities.append(model(x_BCTYX, 500.0, [mix] * len(model.blocks)))
    torch.testing.assert_close(*velocities)


def test_each_block_attends_to_its_own_context():
    model, x = random_model(), torch.randn(1, 16, 1, 4, 4)
    a, b = model.project(torch.randn(5, 32)), model.project(torch.randn(9, 32))
    plain = [y.clone() for y in model.iterate_residuals(x, 500.0, everywhere(model, a))]
    changed = [y.clone() for y in model.iterate_residuals(x, 500.0, [((a, 1.0),), ((b, 1.0),)])]
    assert torch.equal(plain[0], changed[0])
    assert not torch.allclose(plain[1], changed[1])


@torch.inference_mode()
def test_a_context_is_projected_once_per_block_and_can_be_dropped():
    model, x = random_model(), torch.randn(1, 16, 1, 4, 4)
    context = model.project(torch.randn(5, 32))
    first = model(x, 500.0, everywhere(model, context))
    assert len(context.kv) == 2
    kept = context.kv[model.blocks[0].cross_attn]
    assert torch.equal(model(x, 500.0, everywhere(model, context)), first)
    assert context.kv[model.blocks[0].cross_attn] is kept
    context.kv.clear()
    assert torch.equal(model(x, 500.0, everywhere(model, context)), first)


@torch.inference_mode()
def test_a_batch_is_its_entries_each_at_its_own_time():
    model, x, t = random_model(), torch.randn(2, 16, 2, 4, 6), torch.tensor([900.0, 31.5])
    contexts = everywhere(model, model.project(torch.randn(5, 32)))
    one_by_one = [model(x[i : i + 1], t[i], contexts) for i in range(2)]
    assert relative_error(model(x, t, contexts), torch.cat(one_by_one)) < 1e-5


def test_neither_the_latent_nor_the_text_is_written_over():
    model, x, text = random_model(), torch.randn(1, 16, 1, 4, 4), torch.randn(5, 32)
    x_before, text_before = x.clone(), text.clone()
    with torch.inference_mode():
        model(x, 500.0, everywhere(model, model.project(text)))
    assert torch.equal(x, x_before)
    assert torch.equal(text, text_before)


def test_training_gives_the_same_velocity_and_the_gradients_of_diffusers():
    theirs, ours = random_pair(2, 24, 2)
    x, text, t = torch.randn(2, 16, 1, 4, 4), torch.randn(5, 32), torch.tensor([700.0, 20.0])
    with torch.inference_mode():
        expected = ours(x, t, everywhere(ours, ours.project(text)))
    velocity = ours(x, t, everywhere(ours, ours.project(text)))
    assert relative_error(velocity.detach(), expected) < 1e-5
    velocity.square().mean().backward()
    theirs(x, t, F.pad(text, (0, 0, 0, 507)).expand(2, -1, -1)).sample.square().mean().backward()
    for name, parameter in theirs.named_parameters():
        name = transformer_from_diffusers(name)
        assert relative_error(ours.get_parameter(name).grad, parameter.grad) < 1e-3, name


def saved_for_backward(model: WanModel, checkpointed: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of a mixed and a joined context, of the weights and of the latent, and the bytes of
    activations kept until the backward pass."""
    torch.manual_seed(3)
    x = torch.randn(2, 16, 2, 8, 8, requires_grad=True)
    a, b = (model.project(torch.randn(count, 32)) for count in (5, 9))
    for context in (a, b):
        context.rows_ND.retain_grad()
    mixes = [((a, 0.7), (lerp(a, b, 0.4), 0.3)), ((concat(a, b, 0.5), 1.0),), *[((b, 1.0),)] * 4]
    storages: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x, torch.tensor([700.0, 20.0]), mixes, checkpointed=checkpointed).square().mean()
    kept = sum(storages.values())
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"x": x.grad, "a": a.rows_ND.grad, "b": b.rows_ND.grad}, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_gradients_are_the_same_and_keep_a_fraction_of_the_activations(dtype: torch.dtype):
    model = random_model(WanConfig(48, 96, 2, 6, text_dim=32, freq_dim=64))
    for linear in (m for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)):
        linear.to(dtype)
    plain, all_bytes = saved_for_backward(model, checkpointed=False)
    again, few_bytes = saved_for_backward(model, checkpointed=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(grad.any() for grad in again.values())
    assert few_bytes < all_bytes / 5


def test_the_checkpointed_residual_stream_has_gradients_too():
    model, x = random_model(), torch.randn(1, 16, 1, 4, 4)
    context = model.project(torch.randn(5, 32)).rows_ND
    found = []
    for checkpointed in (False, True):
        leaf = context.detach().clone().requires_grad_()
        mixes = everywhere(model, Context(leaf, torch.zeros(len(leaf))))
        last = [*model.iterate_residuals(x, 500.0, mixes, checkpointed=checkpointed)][-1]
        last.square().mean().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
@torch.inference_mode()
def test_a_few_tokens_at_a_time_give_the_velocity_of_all_at_once(chunk: int, dtype: torch.dtype):
    whole = random_model()
    torch.manual_seed(0)
    pieces = WanModel(CONFIG, ComputeOptions(chunk=chunk)).eval()
    pieces.load_state_dict(whole.state_dict())
    for block in (*whole.blocks, *pieces.blocks):
        for layer in (m for m in block.modules() if isinstance(m, nn.Linear)):
            layer.to(dtype)
    x, t, text = torch.randn(2, 16, 2, 8, 6), torch.tensor([900.0, 31.5]), torch.randn(5, 32)
    expected = whole(x, t, everywhere(whole, whole.project(text)))
    found = pieces(x, t, everywhere(pieces, pieces.project(text)))
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_gradients_flow_through_all_tokens_at_once():
    whole = random_model()
    pieces = WanModel(CONFIG, ComputeOptions(chunk=2))
    pieces.load_state_dict(whole.state_dict())
    torch.manual_seed(4)
    x, text = torch.randn(1, 16, 1, 4, 4), torch.randn(5, 32)
    for model in (whole, pieces):
        model(x, 500.0, everywhere(model, model.project(text))).square().mean().backward()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.grad, pieces.get_parameter(name).grad), name


@torch.inference_mode()
def test_half_precision_keeps_the_stream_in_fp32(official: dict[str, Tensor]):
    half = load_transformer(identify(FIXTURE), LoadOptions(torch.bfloat16))
    block = half.blocks[0]
    assert {block.ffn[0].weight.dtype, block.cross_attn.k.bias.dtype} == {torch.bfloat16}
    kept = (half.head.head.weight, half.time_projection[1].weight, block.modulation, block.norm3.bias)
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    x, t = official["unipc_cfg6.noise"][None], official["unipc_cfg6.timesteps"][0]
    contexts = everywhere(half, half.project(official["context.main"]))
    velocity = half(x, t, contexts)
    assert velocity.dtype == torch.float32
    assert relative_error(velocity[0], official["unipc_cfg6.v_cond_step0"]) < 2e-2
    assert {y.dtype for y in half.iterate_residuals(x, t, contexts)} == {torch.float32}


@torch.inference_mode()
def test_the_first_block_with_a_nan_shows_in_the_residual_stream():
    model = random_model(WanConfig(48, 96, 2, 4, text_dim=32, freq_dim=64))
    model.blocks[2].ffn[2].bias[0] = math.nan
    contexts = everywhere(model, model.project(torch.randn(5, 32)))
    stream = model.iterate_residuals(torch.randn(1, 16, 1, 4, 4), 500.0, contexts)
    assert [bool(x.isfinite().all()) for x in stream] == [True, True, False, False]


def test_one_context_per_block_is_asked_for():
    model, x = random_model(), torch.randn(1, 16, 1, 4, 4)
    with pytest.raises(ValueError, match="zip"):
        model(x, 500.0, everywhere(model, model.project(torch.randn(5, 32)))[:1])
