"""What a solver knows between two steps survives the disk, and damage to it is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wancli.errors import EntryError
from wancli.sampling import state_file
from wancli.sampling.solvers import SOLVERS, State, build_sigma_schedule
from wancli.storage import tensor_file

RECORD = {"latents_key": "k", "step": 3, "read": [[0, "cond", 1]]}


def walked(solver: str, steps: range, state: State) -> State:
    sigmas = build_sigma_schedule(solver, 4, 3.0).sigmas
    for i in steps:
        state = SOLVERS[solver].step(sigmas, i, state, (0.5 + i) * state.x.cos())
    return state


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("done", range(5))
def test_sampling_resumes_from_the_file_bit_for_bit(solver: str, done: int, tmp_path: Path) -> None:
    start = State(torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(1)))
    expected = walked(solver, range(4), start)
    state_file.save_state(tmp_path / "s", walked(solver, range(done), start), RECORD)
    state, record, *_ = state_file.load_state(tmp_path / "s")
    assert record == RECORD
    assert torch.equal(walked(solver, range(done, 4), state).x, expected.x)


@pytest.mark.parametrize("place", [0, 8, 60, -300, -1, "cut"])
def test_a_damaged_state_is_refused(place: int | str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    state_file.save_state(path, walked("unipc", range(2), State(torch.ones(2, 1, 4, 6))), RECORD)
    data = bytearray(path.read_bytes())
    if isinstance(place, int):
        data[place] ^= 1
    path.write_bytes(data[:-1] if place == "cut" else data)
    with pytest.raises(EntryError):
        state_file.load_state(path)


def test_a_state_is_not_loaded_as_a_latent_nor_a_latent_as_a_state(tmp_path: Path) -> None:
    state_file.save_state(tmp_path / "state", State(torch.ones(2, 1, 4, 6)), RECORD)
    tensor_file.save_latent(tmp_path / "latent", torch.ones(2, 1, 4, 6), RECORD)
    with pytest.raises(EntryError, match="not a finished latent"):
        tensor_file.load_latent(tmp_path / "state")
    with pytest.raises(EntryError, match="not the state of a shot"):
        state_file.load_state(tmp_path / "latent")
    assert torch.equal(tensor_file.load_latent(tmp_path / "latent")[0], torch.ones(2, 1, 4, 6))


def test_sums_of_attention_maps_have_a_shape_of_their_own(tmp_path: Path) -> None:
    sums = torch.rand(2, 1, 3, 12)
    state_file.save_state(tmp_path / "s", State(torch.ones(2, 1, 4, 6)), RECORD, sums)
    loaded = state_file.load_state(tmp_path / "s", (2, 1, 4, 6))
    assert loaded.attention_GSWL is not None
    assert torch.equal(loaded.attention_GSWL, sums)
    with pytest.raises(EntryError, match="the shape of the shot"):
        state_file.load_state(tmp_path / "s", (2, 1, 3, 12))
