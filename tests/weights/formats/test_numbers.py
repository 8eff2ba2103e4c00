"""Numbers read from bytes without torch; torch is the oracle."""

from __future__ import annotations

import pytest
import torch

from wancli.weights.formats.numbers import decode_numbers, is_all_zero
from wancli.weights.formats.read import DTYPES

NUMBERS = torch.tensor([0.0, -0.0, 1.0, -2.5, 0.0019531, 448.0, 1e-3, 12.0])


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - {"BOOL", "F8_E8M0"}))
def test_numbers_are_those_of_torch(dtype: str) -> None:
    numbers = NUMBERS if dtype[0] in "FB" else NUMBERS.abs() % 100
    stored = numbers.to(DTYPES[dtype])
    data = bytes(stored.view(torch.uint8).tolist())
    assert decode_numbers(dtype, data) == stored.double().tolist()


def test_every_code_of_e4m3_is_that_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = decode_numbers("F8_E4M3", bytes(range(256)))
    assert torch.equal(
        torch.tensor(found, dtype=torch.float64).nan_to_num(-1000),
        codes.view(torch.float8_e4m3fn).double().nan_to_num(-1000),
    )


def test_a_quantized_type_has_no_numbers() -> None:
    assert decode_numbers("Q8_0", bytes(34)) is None


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_zeros_are_told_from_the_smallest_number_anywhere(dtype: str) -> None:
    zeros = torch.zeros(1000).to(DTYPES[dtype])
    assert is_all_zero(dtype, bytes(zeros.view(torch.uint8).tolist()))
    assert is_all_zero(dtype, bytes((-zeros.float()).to(DTYPES[dtype]).view(torch.uint8).tolist()))
    size = zeros.element_size()
    for byte in range(size):
        data = bytearray(1000 * size)
        data[500 * size + byte] = 1
        assert not is_all_zero(dtype, bytes(data))
