"""The transformers that take pictures against the official numbers, diffusers, and one timestep per token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from image_cases import FIXTURES, Case, all_cases, load, numbers
from oracles import relative_error
from torch import Tensor

from wancli.models.config import ComputeOptions, WanConfig
from wancli.models.dit import Mix, Request, WanModel, concat, lerp
from wancli.models.given_frames import GivenFrames
from wancli.weights.lora.key_mapping import IMAGE_BLOCK_FROM_DIFFUSERS, IMAGE_FROM_DIFFUSERS

SMALL = WanConfig(48, 96, 2, 2, in_dim=8, out_dim=8, text_dim=32, freq_dim=64)


def model_of(case: Case) -> WanModel:
    folder = FIXTURES / case.set
    return load(folder if (folder / "config.json").exists() else folder / "high_noise_model")


def given_of(case: Case) -> GivenFrames:
    """What the official code gives the transformer, from its own numbers."""
    if case.has("z_image"):
        return GivenFrames(first_CTYX=case["z_image"])
    if case.set == "wan22-ti2v-tiny":
        return GivenFrames()
    return GivenFrames(torch.cat((case["mask"], case["y"])))


def random_model(config: WanConfig, kernels: ComputeOptions = ComputeOptions()) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config, kernels).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def compared_cases() -> list[Case]:
    return [case for case in all_cases() if case.has("y") or case.set == "wan22-ti2v-tiny"]


@pytest.mark.parametrize("case", compared_cases(), ids=str)
@torch.inference_mode()
def test_velocities_are_those_of_the_official_code(case: Case) -> None:
    model, given = model_of(case), given_of(case)
    x, t = given.put_into(case["noise"])[None], case["timesteps"][0]
    images: Mix = ()
    if case.clip:
        image = model.project_image(case.clip_rows)
        assert relative_error(image.rows_ND, numbers(case.set)[f"{case.clip}.context"][0]) < 1e-5
        images = ((image, 1.0),)
    for branch, prompt in (("cond", "main"), ("uncond", "negative")):
        if case.has(f"v_{branch}_step0"):
            text = model.project(numbers(case.set)[f"context.{prompt}"])
            contexts = [((text, 1.0), *images)] * 40
            if rule := case.settings.get("inject") if branch == "cond" else None:
                first, last = rule["blocks"]
                if rule["steps"][0] == 0:
                    blend = lerp(
                        text, model.project(numbers(case.set)["context.injection"]), rule["strength"]
                    )
                    contexts[first : last + 1] = [((blend, 1.0), *images)] * (last - first + 1)
            v = model(x, t, contexts, given)[0]
            assert relative_error(v, case[f"v_{branch}_step0"]) < 2e-5


@pytest.mark.parametrize("rows", [None, 514])
@torch.inference_mode()
def test_the_image_branch_is_that_of_diffusers(rows: int | None) -> None:
    torch.manual_seed(1)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=80,
        num_layers=2,
        image_dim=40,
        added_kv_proj_dim=48,
        pos_embed_seq_len=rows,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = WanConfig(48, 80, 2, 2, 36, 16, text_dim=32, freq_dim=64, image_dim=40, image_rows=rows)
    ours = WanModel(config).eval()
    ours.load_state_dict({official_name(name): value for name, value in theirs.state_dict().items()})
    x, y = torch.randn(1, 16, 3, 6, 10), torch.randn(20, 3, 6, 10)
    text, clip = torch.randn(7, 32), torch.randn(rows or 257, 40)
    expected = theirs(
        torch.cat((x, y[None]), 1),
        torch.tensor([633.0]),
        F.pad(text, (0, 0, 0, 505))[None],
        # It takes two pictures as a batch.
        encoder_hidden_states_image=clip.view(-1, 257, 40),
    ).sample
    mix = ((ours.project(text), 1.0), (ours.project_image(clip), 1.0))
    assert relative_error(ours(x, 633.0, [mix] * 2, GivenFrames(y)), expected) < 1e-5


def official_name(name: str) -> str:
    from wancli.weights.formats.key_mapping import transformer_from_diffusers

    for old, new in (*IMAGE_BLOCK_FROM_DIFFUSERS.items(), *IMAGE_FROM_DIFFUSERS.items()):
        name = name.replace(old, new)
    return transformer_from_diffusers(name)


def row_per_token(model: WanModel, x: Tensor, t_L: Tensor, text: Tensor) -> Tensor:
    """The network written out with a timestep for each token, as official Wan 2.2 computes it; fp64."""
    model = model.double()
    state = model.embed(x, 0.0)
    x_LD = state.x_BLD[0].double()
    half = model.config.freq_dim // 2
    angles = t_L.double()[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
    time_LD = model.time_embedding(torch.cat((angles.cos(), angles.sin()), -1))
    time_L6D = model.time_projection(time_LD).view(-1, 6, model.config.dim)

    def norm(x_LD: Tensor) -> Tensor:
        return F.layer_norm(x_LD, x_LD.shape[-1:], eps=1e-6)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def attend(q_LD: Tensor, k_ND: Tensor, v_ND: Tensor, mass_N: Tensor) -> Tensor:
        heads = []
        for q, k, v in zip(*(x.chunk(model.config.num_heads, -1) for x in (q_LD, k_ND, v_ND))):
            score = mass_N * torch.exp(q @ k.T / q.shape[-1] ** 0.5)
            heads.append(score @ v / score.sum(-1, keepdim=True))
        return torch.cat(heads, -1)

    def rope(x_LD: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_LD.view(len(x_LD), model.config.num_heads, -1, 2))
        return torch.view_as_real(pairs * state.rope_L1P).flatten(1)

    rows_ND = model.text_embedding(F.pad(text, (0, 0, 0, 1)).double())
    mass_N = torch.ones(len(rows_ND)).double()
    mass_N[-1] = 512 - len(text)
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + time_L6D).unbind(1)
        u, a = norm(x_LD) * (1 + scale1) + shift1, block.self_attn
        y = attend(
            rope(rms(a.q(u), a.norm_q.weight)), rope(rms(a.k(u), a.norm_k.weight)), a.v(u), torch.ones(1)
        )
        x_LD = x_LD + gate1 * a.o(y)
        c = block.cross_attn
        q = rms(
            c.q(F.layer_norm(x_LD, x_LD.shape[-1:], block.norm3.weight, block.norm3.bias, 1e-6)),
            c.norm_q.weight,
        )
        x_LD = x_LD + c.o(attend(q, rms(c.k(rows_ND), c.norm_k.weight), c.v(rows_ND), mass_N))
        u = norm(x_LD) * (1 + scale2) + shift2
        hidden = F.gelu(F.linear(u, block.ffn[0].weight, block.ffn[0].bias), approximate="tanh")
        x_LD = x_LD + gate2 * F.linear(hidden, block.ffn[2].weight, block.ffn[2].bias)
    shift, scale = (model.head.modulation + time_LD[:, None]).unbind(1)
    features_LF = model.head.head(norm(x_LD) * (1 + scale) + shift)
    T, Y, X = x.shape[2:]
    y_TYXqrC = features_LF.view(T, Y // 2, X // 2, 2, 2, -1)
    return y_TYXqrC.permute(5, 0, 1, 3, 2, 4).reshape(-1, T, Y, X)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("chunk", [None, 4, 7])
@torch.no_grad()
def test_two_rows_of_modulation_equal_a_row_for_each_token(frames: int, chunk: int | None) -> None:
    model = random_model(SMALL, ComputeOptions(chunk=chunk))
    x, text, first = torch.randn(1, 8, frames, 4, 6), torch.randn(5, 32), torch.randn(8, 1, 4, 6)
    given = GivenFrames(first_CTYX=first)
    x = given.put_into(x[0])[None]
    contexts = [((model.project(text), 1.0),)] * 2
    ours = model(x, 700.0, contexts, given)[0]
    t_L = torch.tensor([0.0] * 6 + [700.0] * 6 * (frames - 1))
    assert relative_error(ours, row_per_token(model, x, t_L, text)) < 2e-5


def test_given_tokens_have_the_derivatives_that_differences_show() -> None:
    model = random_model(SMALL)
    given = GivenFrames(first_CTYX=torch.randn(8, 1, 4, 4))
    x = torch.randn(1, 8, 2, 4, 4, requires_grad=True)
    with torch.no_grad():
        contexts = [((model.project(torch.randn(3, 32)), 1.0),)] * 2
    toward, direction = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 8, 2, 4, 4)
    for checkpointed in (False, True):
        velocity = model(x, 500.0, contexts, given, checkpointed=checkpointed)
        (gradient,) = torch.autograd.grad((velocity * toward).sum(), x)
        with torch.no_grad():
            ends = [(model(x + s * direction, 500.0, contexts, given) * toward).sum() for s in (1e-2, -1e-2)]
        difference = ((ends[0] - ends[1]) / 2e-2).item()
        within = 1e-3 * (gradient.norm() * direction.norm()).item()  # terms of both signs cancel in the sum
        assert difference == pytest.approx((gradient * direction).sum().item(), abs=within)


@torch.inference_mode()
def test_a_group_of_requests_gives_the_bits_of_each_alone() -> None:
    config = WanConfig(48, 96, 2, 2, in_dim=12, out_dim=8, text_dim=32, freq_dim=64, image_dim=40)
    model = random_model(config)
    mix = (model.project(torch.randn(3, 32)), 1.0), (model.project_image(torch.randn(257, 40)), 1.0)
    requests = [
        Request(torch.randn(1, 8, 2, 4, 4), t, [mix] * 2, GivenFrames(torch.randn(4, 2, 4, 4)))
        for t in (900.0, 30.0)
    ]
    together = model.predict_velocities(requests)
    for request, velocity in zip(requests, together):
        assert torch.equal(model(request.x_BCTYX, request.t, request.contexts, request.given), velocity)


def test_wrong_channels_rows_and_models_are_refused() -> None:
    model = random_model(SMALL)
    with pytest.raises(ValueError, match="12 channels, the model takes 8"):
        model(torch.randn(1, 8, 1, 4, 4), 1.0, [(), ()], GivenFrames(torch.randn(4, 1, 4, 4)))
    with pytest.raises(ValueError, match="attend to no pictures"):
        model.project_image(torch.randn(257, 40))
    with_rows = random_model(WanConfig(48, 96, 2, 1, text_dim=32, image_dim=40, image_rows=514))
    with pytest.raises(ValueError, match="257 rows of CLIP, the model takes 514"):
        with_rows.project_image(torch.randn(257, 40))


@torch.inference_mode()
def test_pictures_blend_with_pictures_only() -> None:
    model = random_model(WanConfig(48, 96, 2, 1, text_dim=32, freq_dim=64, image_dim=40))
    a, b = (model.project_image(torch.randn(257, 40)) for _ in range(2))
    assert relative_error(lerp(a, b, 0.25).rows_ND, 0.75 * a.rows_ND + 0.25 * b.rows_ND) < 1e-6
    assert (lerp(a, b, 0.25).of, concat(a, b, 0.5).of) == ("image", "image")
    text = model.project(torch.randn(3, 32))
    for combine in (lerp, concat):
        with pytest.raises(ValueError, match="no rows in common"):
            combine(a, text, 0.5)


@torch.inference_mode()
def test_the_bias_of_the_last_projection_belongs_to_the_prompts() -> None:
    """Half of each of two pictures is one picture if both are the same, and adds no bias of its own."""
    model = random_model(WanConfig(48, 96, 2, 1, text_dim=32, freq_dim=64, image_dim=40))
    text, image = model.project(torch.randn(3, 32)), model.project_image(torch.randn(257, 40))
    layer, x = model.blocks[0].cross_attn, torch.randn(1, 9, 48)
    whole = layer(x, ((text, 1.0), (image, 1.0)))
    assert relative_error(layer(x, ((text, 1.0), (image, 0.5), (image, 0.5))), whole) < 1e-6
    assert relative_error(layer(x, ((text, 1.0),)) + layer(x, ((image, 1.0),)), whole) < 1e-5
