"""Forwards that share what comes before their first difference, and derivatives, against plain forwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wancli.models.config import WanConfig
from wancli.models.dit import WanModel
from wancli.models.dit_layers import Mix
from wancli.probe import sensitivity
from wancli.probe.sensitivity import ProbePoint
from wancli.resources import memory_model
from wancli.weights.checkpoint import identify
from wancli.weights.loader import LoadOptions, load_transformer

DEPTH = 6
CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=DEPTH, text_dim=32, freq_dim=64)


def random_point(config: WanConfig = CONFIG, latent: tuple[int, ...] = (16, 2, 4, 4)) -> ProbePoint:
    """A point at which a prompt is injected, or a picture if the blocks attend to pictures."""
    torch.manual_seed(0)
    model = WanModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        a, b = (model.project(torch.randn(count, config.text_dim)) for count in (5, 9))
        if config.image_dim is not None:
            c, d = (model.project_image(torch.randn(count, config.image_dim)) for count in (3, 7))
            mixes: list[Mix] = [((a, 1.0), (picture, 1.0)) for picture in (c, d)]
        else:
            mixes = [((context, 1.0),) for context in (a, b)]
    plain, injected = ([mix] * config.num_layers for mix in mixes)
    return ProbePoint(model, torch.randn(1, *latent), 700.0, plain, injected)


def row_reading(point: ProbePoint, blocks: Sequence[int], other: Sequence[Mix] | None = None) -> list[Mix]:
    other = point.injected if other is None else other
    return [other[b] if b in blocks else mix for b, mix in enumerate(point.plain)]


def forward(point: ProbePoint, row: Sequence[Mix]) -> Tensor:
    with torch.no_grad():
        return point.model(point.x_1CTYX, point.t, row)


@contextmanager
def counting(model: WanModel) -> Iterator[Counter[int]]:
    """How often each block runs."""
    turns: Counter[int] = Counter()
    handles = [
        block.register_forward_pre_hook(lambda *_, index=index: turns.update([index]))
        for index, block in enumerate(model.blocks)
    ]
    yield turns
    for handle in handles:
        handle.remove()


# ---- velocities ----

SETS = [[3], [0], [5], [1, 4], [3, 4, 5], [0, 2, 4], list(range(DEPTH))]


@pytest.mark.parametrize("forwards_per_pass", [1, 2, 3, len(SETS), 100])
def test_every_velocity_is_bit_for_bit_that_of_a_whole_forward(forwards_per_pass: int) -> None:
    point = random_point()
    rows = [row_reading(point, blocks) for blocks in SETS]
    with torch.no_grad():
        velocities = dict(sensitivity.predict_velocities(point, rows, forwards_per_pass))
    assert sorted(velocities) == [*range(len(SETS) + 1)]
    for index, row in enumerate([*rows, point.plain]):
        assert torch.equal(velocities[index], forward(point, row)), index


def test_velocities_are_in_the_order_of_the_first_differences_and_the_plain_one_is_last() -> None:
    point = random_point()
    rows = [row_reading(point, blocks) for blocks in SETS]
    with torch.no_grad():
        order = [index for index, _ in sensitivity.predict_velocities(point, rows)]
    assert order == [1, 5, 6, 3, 0, 4, 2, 7]


def test_without_rows_only_the_plain_forward_runs() -> None:
    point = random_point()
    with torch.no_grad():
        ((index, v_1CTYX),) = sensitivity.predict_velocities(point, [])
    assert index == 0
    assert torch.equal(v_1CTYX, forward(point, point.plain))


def test_a_row_equal_to_the_plain_one_is_refused() -> None:
    point = random_point()
    with pytest.raises(ValueError, match="reads the same"):
        next(sensitivity.predict_velocities(point, [point.plain]))


@pytest.mark.parametrize("forwards_per_pass", [1, 7])
def test_forty_blocks_one_by_one_take_21_and_a_half_forwards(forwards_per_pass: int) -> None:
    point = random_point(replace(CONFIG, num_layers=40), (16, 1, 2, 2))
    rows = [row_reading(point, [block]) for block in range(40)]
    with torch.no_grad(), counting(point.model) as turns:
        list(sensitivity.predict_velocities(point, rows, forwards_per_pass))
    assert sum(turns.values()) == 860 == 21.5 * 40
    assert turns == {block: block + 2 for block in range(40)}


@pytest.mark.parametrize(("forwards_per_pass", "fetches"), [(1, 10), (3, 5), (4, 4)])
def test_with_streamed_weights_forwards_share_a_pass_from_their_first_difference_on(
    forwards_per_pass: int, fetches: int, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = load_transformer(identify(quick))
    streamed = load_transformer(identify(quick), LoadOptions(residency="streamed"))
    fetched: list[int] = []
    fetch = streamed.blocks._fetch

    def count_fetch(index: int) -> object:
        fetched.append(index)
        return fetch(index)

    monkeypatch.setattr(streamed.blocks, "_fetch", count_fetch)
    torch.manual_seed(0)
    x_1CTYX = torch.randn(1, 16, 1, 4, 4)
    texts = [torch.randn(count, resident.config.text_dim) for count in (4, 7)]
    velocities = []
    for model in (resident, streamed):
        with torch.inference_mode():
            a, b = (model.project(text_NE) for text_NE in texts)
            point = ProbePoint(model, x_1CTYX, 500.0, [((a, 1.0),)] * 4, [((b, 1.0),)] * 4)
            rows = [row_reading(point, [block]) for block in range(4)]
            velocities.append(dict(sensitivity.predict_velocities(point, rows, forwards_per_pass)))
    assert all(torch.equal(velocities[0][index], velocities[1][index]) for index in range(5))
    assert len(fetched) == fetches


def test_a_block_that_reads_an_empty_mix_adds_no_text() -> None:
    point = random_point()
    with torch.no_grad():
        velocities = dict(sensitivity.predict_velocities(point, [row_reading(point, [2], [()] * DEPTH)]))
        output = point.model.get_submodule("blocks.2.cross_attn.o")
        output.weight.zero_()
        output.bias.zero_()
    assert torch.equal(velocities[0], forward(point, point.plain))
    assert not torch.equal(velocities[0], velocities[1])


# ---- derivatives ----


def mixed(point: ProbePoint, block: int, s: float | Tensor) -> list[Mix]:
    """One block's outputs mixed with strength s."""
    mix = [(a, 1 - s) for a, _ in point.plain[block]] + [(b, s) for b, _ in point.injected[block]]
    return [mix if i == block else plain for i, plain in enumerate(point.plain)]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, image_dim=24)], ids=["text", "image"])
def test_the_derivative_of_every_block_is_that_of_finite_differences(config: WanConfig) -> None:
    point = random_point(config)
    toward = torch.randn_like(point.x_1CTYX)
    velocities = dict(sensitivity.compute_derivatives(point, toward))
    assert torch.allclose(velocities.pop(DEPTH), forward(point, point.plain), rtol=1e-4, atol=1e-5)
    step = 0.02
    for block, by_s_L in velocities.items():
        up, down = (forward(point, mixed(point, block, s)) for s in (step, -step))
        slope = ((up - down).double() * toward).sum().item() / (2 * step)
        assert by_s_L.sum().item() == pytest.approx(slope, rel=0.01, abs=0.01 * by_s_L.norm().item())


def test_the_derivative_of_every_token_is_its_own() -> None:
    point = random_point()
    toward = torch.randn_like(point.x_1CTYX)
    by_s_L = dict(sensitivity.compute_derivatives(point, toward))[3]
    assert len(by_s_L) == 8
    step = 0.02
    for token in range(8):
        s_L = step * torch.eye(8)[token]
        up, down = (forward(point, mixed(point, 3, s)) for s in (s_L, -s_L))
        slope = ((up - down).double() * toward).sum().item() / (2 * step)
        assert by_s_L[token].item() == pytest.approx(slope, rel=0.02, abs=0.02 * by_s_L.abs().max().item())


def test_derivatives_take_two_forward_passes_and_one_backward_pass() -> None:
    point = random_point()
    with counting(point.model) as turns:
        list(sensitivity.compute_derivatives(point, torch.randn_like(point.x_1CTYX)))
    assert turns == dict.fromkeys(range(DEPTH), 2)  # and a walk back, of about two: see scripts.bench.probe


def test_random_projections_estimate_the_change_by_each_token_alone() -> None:
    point = random_point(latent=(16, 1, 4, 4))
    plain, step = forward(point, point.plain), 0.02
    tokens = [
        (forward(point, mixed(point, 2, step * torch.eye(4)[token])) - plain) / step for token in range(4)
    ]
    true = torch.stack(tokens).norm() / plain.norm()
    torch.manual_seed(1)
    draws = []
    for _ in range(60):
        velocities = dict(sensitivity.compute_derivatives(point, torch.randn_like(point.x_1CTYX)))
        draws.append(sensitivity.estimate_change(velocities[2], plain) ** 2)
    assert (sum(draws) / len(draws)) ** 0.5 == pytest.approx(true.item(), rel=0.25)


@pytest.mark.parametrize(("dim", "ffn"), [(128, 256), (256, 1024)])
def test_the_tensors_that_autograd_keeps_of_one_block_fit_the_prediction(dim: int, ffn: int) -> None:
    point = random_point(WanConfig(dim, ffn, dim // 64, 1, text_dim=32, freq_dim=64), (16, 4, 16, 16))
    kept: dict[int, int] = {}

    def count_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in point.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
        list(sensitivity.compute_derivatives(point, torch.randn_like(point.x_1CTYX)))
    measured = sum(size for at, size in kept.items() if at not in weights)
    predicted = memory_model.derivative_bytes(point.model.config, 256, element_bytes=4)
    assert measured < predicted < 2 * measured
