"""Numbers of any plain type, from their bytes in a file: alphas, tokenizers. No torch and no numpy."""

from __future__ import annotations

import math
import struct

from wancli.weights.formats.safetensors_header import BITS

FORMS = {
    "BOOL": "?",
    "U8": "B",
    "I8": "b",
    "U16": "H",
    "I16": "h",
    "U32": "I",
    "I32": "i",
    "U64": "Q",
    "I64": "q",
    "F16": "e",
    "F32": "f",
    "F64": "d",
}
CHUNK = 2**20  # bytes looked at in one go; a trained matrix is told by its first numbers


def decode_numbers(dtype: str, data: bytes) -> list[float] | None:
    """Return the numbers of a tensor; None for a quantized type. `dtype` is written as in safetensors."""
    if dtype == "F8_E4M3":
        return [_decode_e4m3fn(code) for code in data]
    if dtype == "F8_E5M2":  # the upper byte of a half
        data, dtype = b"".join(bytes((0, code)) for code in data), "F16"
    if dtype == "BF16":  # the upper half of an fp32
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data, dtype = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves)), "F32"
    if dtype not in FORMS:
        return None
    return [float(number) for number in struct.unpack(f"<{len(data) * 8 // BITS[dtype]}{FORMS[dtype]}", data)]


def _decode_e4m3fn(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -value if code & 0x80 else value


def is_all_zero(dtype: str, data: bytes) -> bool:
    """Return whether every number of a tensor in plain floats or fp8 is 0 or -0."""
    size = BITS[dtype] // 8
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        if any(chunk[byte::size].strip(b"\0") for byte in range(size - 1)):
            return False
        if chunk[size - 1 :: size].translate(None, b"\0\x80"):  # the sign is the highest bit of the last byte
            return False
    return True
