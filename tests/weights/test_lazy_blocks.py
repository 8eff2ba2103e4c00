"""Blocks that arrive when they are first asked for: the same numbers, nothing converted before its turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wancli.models.dit import WanModel
from wancli.weights.checkpoint import identify
from wancli.weights.loader import LoadOptions, load_transformer


def load(tiny: Path, lazily: bool, dtype: torch.dtype = torch.bfloat16) -> WanModel:
    return load_transformer(identify(tiny), LoadOptions(dtype, lazy=lazily))


def velocity(model: WanModel) -> torch.Tensor:
    torch.manual_seed(0)
    context = model.project(torch.randn(5, model.config.text_dim))
    contexts = [((context, 1.0),)] * model.config.num_layers
    return model(torch.randn(1, model.config.in_dim, 1, 4, 4), 500.0, contexts)


def whole(model: WanModel) -> list[bool]:
    return [not any(p.is_meta for p in block.parameters()) for block in model.blocks.children()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_blocks_arrive_gives_the_same_bits(tiny: Path, dtype: torch.dtype):
    at_once, lazily = load(tiny, False, dtype), load(tiny, True, dtype)
    with torch.inference_mode():
        expected = velocity(at_once)
        assert torch.equal(velocity(lazily), expected)
        assert torch.equal(velocity(lazily), expected)
    expected_state = at_once.state_dict()
    for name, tensor in lazily.state_dict().items():
        assert tensor.dtype == expected_state[name].dtype
        assert torch.equal(tensor, expected_state[name])


def test_a_block_arrives_when_the_loop_is_at_it_and_not_before(tiny: Path):
    model = load(tiny, True)
    assert not any(whole(model))
    loop = iter(model.blocks)
    next(loop), next(loop)
    assert [i for i, there in enumerate(whole(model)) if there] == [0, 1]
    assert model.blocks[-1] is list(model.blocks.children())[-1]
    assert whole(model)[-1]
