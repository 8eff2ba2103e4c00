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


def random_place(config: WanConfig = CONFIG, latent: tuple[int, ...] = (16, 2, 4, 4)) -> ProbePoint:
    torch.manual_seed(0)
    model = WanModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        a, b = (model.project(torch.randn(count, config.text_dim)) for count in (5, 9))
    plain, injected = ([((context, 1.0),)] * config.num_layers for context in (a, b))
    return ProbePoint(model, torch.randn(1, *latent), 700.0, plain, injected)


def reading(place: ProbePoint, blocks: Sequence[int], other: Sequence[Mix] | None = None) -> list[Mix]:
    other = place.injected if other is None else other
    return [other[b] if b in blocks else mix for b, mix in enumerate(place.plain)]


def forward(place: ProbePoint, row: Sequence[Mix]) -> Tensor:
    with torch.no_grad():
        return place.model(place.x_1CTYX, place.t, row)


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


@pytest.mark.parametrize("riders", [1, 2, 3, len(SETS), 100])
def test_every_velocity_is_bit_for_bit_that_of_a_whole_forward(riders: int) -> None:
    place = random_place()
    rows = [reading(place, blocks) for blocks in SETS]
    with torch.no_grad():
        found = dict(sensitivity.predict_velocities(place, rows, riders))
    assert sorted(found) == [*range(len(SETS) + 1)]
    for index, row in enumerate([*rows, place.plain]):
        assert torch.equal(found[index], forward(place, row)), index


def test_they_come_in_the_order_of_their_first_differences_and_the_plain_one_last() -> None:
    place = random_place()
    rows = [reading(place, blocks) for blocks in SETS]
    with torch.no_grad():
        order = [index for index, _ in sensitivity.predict_velocities(place, rows)]
    assert order == [1, 5, 6, 3, 0, 4, 2, 7]


def test_nothing_but_the_plain_forward_is_asked_for_without_rows() -> None:
    place = random_place()
    with torch.no_grad():
        ((index, v_1CTYX),) = sensitivity.predict_velocities(place, [])
    assert index == 0
    assert torch.equal(v_1CTYX, forward(place, place.plain))


def test_a_row_that_differs_nowhere_is_refused() -> None:
    place = random_place()
    with pytest.raises(ValueError, match="reads the same"):
        next(sensitivity.predict_velocities(place, [place.plain]))


@pytest.mark.parametrize("riders", [1, 7])
def test_forty_blocks_one_by_one_take_21_and_a_half_forwards(riders: int) -> None:
    place = random_place(replace(CONFIG, num_layers=40), (16, 1, 2, 2))
    rows = [reading(place, [block]) for block in range(40)]
    with torch.no_grad(), counting(place.model) as turns:
        list(sensitivity.predict_velocities(place, rows, riders))
    assert sum(turns.values()) == 860 == 21.5 * 40
    assert turns == {block: block + 2 for block in range(40)}


@pytest.mark.parametrize(("riders", "fetches"), [(1, 10), (3, 5), (4, 4)])
def test_where_weights_are_streamed_riders_share_a_pass_from_their_first_difference_on(
    riders: int, fetches: int, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = load_transformer(identify(shallow))
    streamed = load_transformer(identify(shallow), LoadOptions(residency="streamed"))
    fetched: list[int] = []
    fetch = streamed.blocks._fetch

    def noted(index: int) -> object:
        fetched.append(index)
        return fetch(index)

    monkeypatch.setattr(streamed.blocks, "_fetch", noted)
    torch.manual_seed(0)
    x_1CTYX = torch.randn(1, 16, 1, 4, 4)
    texts = [torch.randn(count, resident.config.text_dim) for count in (4, 7)]
    found = []
    for model in (resident, streamed):
        with torch.inference_mode():
            a, b = (model.project(text_NE) for text_NE in texts)
            place = ProbePoint(model, x_1CTYX, 500.0, [((a, 1.0),)] * 4, [((b, 1.0),)] * 4)
            rows = [reading(place, [block]) for block in range(4)]
            found.append(dict(sensitivity.predict_velocities(place, rows, riders)))
    assert all(torch.equal(found[0][index], found[1][index]) for index in range(5))
    assert len(fetched) == fetches


def test_a_block_that_reads_an_empty_mix_adds_nothing_of_any_text() -> None:
    place = random_place()
    with torch.no_grad():
        found = dict(sensitivity.predict_velocities(place, [reading(place, [2], [()] * DEPTH)]))
        output = place.model.get_submodule("blocks.2.cross_attn.o")
        output.weight.zero_()
        output.bias.zero_()
    assert torch.equal(found[0], forward(place, place.plain))
    assert not torch.equal(found[0], found[1])


# ---- derivatives ----


def mixed(place: ProbePoint, block: int, s: float | Tensor) -> list[Mix]:
    """One block's outputs mixed with strength s."""
    (a, _), (b, _) = place.plain[block][0], place.injected[block][0]
    return [((a, 1 - s), (b, s)) if i == block else mix for i, mix in enumerate(place.plain)]


def test_the_derivative_of_every_block_is_that_of_finite_differences() -> None:
    place = random_place()
    toward = torch.randn_like(place.x_1CTYX)
    found = dict(sensitivity.compute_derivatives(place, toward))
    assert torch.allclose(found.pop(DEPTH), forward(place, place.plain), rtol=1e-4, atol=1e-5)
    step = 0.02
    for block, by_s_L in found.items():
        up, down = (forward(place, mixed(place, block, s)) for s in (step, -step))
        slope = ((up - down).double() * toward).sum().item() / (2 * step)
        assert by_s_L.sum().item() == pytest.approx(slope, rel=0.01, abs=0.01 * by_s_L.norm().item())


def test_the_derivative_of_every_token_is_its_own() -> None:
    place = random_place()
    toward = torch.randn_like(place.x_1CTYX)
    by_s_L = dict(sensitivity.compute_derivatives(place, toward))[3]
    assert len(by_s_L) == 8
    step = 0.02
    for token in range(8):
        s_L = step * torch.eye(8)[token]
        up, down = (forward(place, mixed(place, 3, s)) for s in (s_L, -s_L))
        slope = ((up - down).double() * toward).sum().item() / (2 * step)
        assert by_s_L[token].item() == pytest.approx(slope, rel=0.02, abs=0.02 * by_s_L.abs().max().item())


def test_they_go_once_there_once_more_there_and_back() -> None:
    place = random_place()
    with counting(place.model) as turns:
        list(sensitivity.compute_derivatives(place, torch.randn_like(place.x_1CTYX)))
    assert turns == dict.fromkeys(range(DEPTH), 2)  # and a walk back, of about two: see scripts.bench.probe


def test_random_projections_estimate_what_each_token_alone_would_add() -> None:
    place = random_place(latent=(16, 1, 4, 4))
    plain, step = forward(place, place.plain), 0.02
    tokens = [
        (forward(place, mixed(place, 2, step * torch.eye(4)[token])) - plain) / step for token in range(4)
    ]
    true = torch.stack(tokens).norm() / plain.norm()
    torch.manual_seed(1)
    draws = []
    for _ in range(60):
        found = dict(sensitivity.compute_derivatives(place, torch.randn_like(place.x_1CTYX)))
        draws.append(sensitivity.estimate_change(found[2], plain) ** 2)
    assert (sum(draws) / len(draws)) ** 0.5 == pytest.approx(true.item(), rel=0.25)


@pytest.mark.parametrize(("dim", "ffn"), [(128, 256), (256, 1024)])
def test_what_autograd_keeps_of_one_block_is_within_what_memory_predicts(dim: int, ffn: int) -> None:
    place = random_place(WanConfig(dim, ffn, dim // 64, 1, text_dim=32, freq_dim=64), (16, 4, 16, 16))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in place.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        list(sensitivity.compute_derivatives(place, torch.randn_like(place.x_1CTYX)))
    measured = sum(size for at, size in kept.items() if at not in weights)
    predicted = memory_model.derivative_bytes(place.model.config, 256, element_bytes=4)
    assert measured < predicted < 2 * measured
