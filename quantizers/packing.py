"""Integers of 2 to 8 bits to bytes and back.

The bytes are one stream of bits, little-endian: integer k has bits `[k * b, (k + 1) * b)` of the stream, its lowest bit
first, and bit 0 of the stream is the lowest bit of byte 0. Signed integers are stored in two's complement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers.base import require_bits


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers tightly.

    Args:
        q: any shape, in row-major order; int8 within `[-2^(b-1), 2^(b-1) - 1]` or uint8 within `[0, 2^b - 1]`.
        bits: 2 to 8.

    Returns:
        uint8 `[ceil(q.numel() * bits / 8)]`; bits left over in the last byte are zero.

    Raises:
        ValueError: for another dtype, or a value that does not fit.
    """
    require_bits(bits)
    if q.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"pack takes int8 or uint8 integers, not {q.dtype}; pass what Quantizer.quantize gave")
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if q.dtype == torch.int8 else (0, 2**bits - 1)
    if q.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=q.device)
    smallest, largest = (int(value) for value in q.aminmax())
    if smallest < lowest or largest > highest:
        raise ValueError(
            f"integers from {smallest} to {largest} do not fit {bits} bits, which hold {lowest} to {highest} as "
            f"{q.dtype}; pack with the bits they were quantized to"
        )
    values = q.detach().contiguous().view(torch.uint8).flatten() & (2**bits - 1)
    # Eight integers fill `bits` whole bytes, so every eighth one lies at the same place in its bytes.
    values = torch.nn.functional.pad(values, (0, -len(values) % 8)).view(-1, 8)
    data = torch.zeros(len(values), bits, dtype=torch.uint8, device=q.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        data[:, byte] |= values[:, position] << shift
        if shift + bits > 8:
            data[:, byte + 1] |= values[:, position] >> (8 - shift)
    # Cloned when cut: a view would keep (and save) the padding's storage too.
    return data.flatten()[: packed_length(q.numel(), bits)].clone()


def unpack(data: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Undo `pack`.

    Args:
        data: uint8 `[ceil(prod(shape) * bits / 8)]`.
        bits: 2 to 8, as packed.
        shape: of the integers.
        signed: whether they were int8.

    Returns:
        int8 (signed) or uint8, of that shape.

    Raises:
        ValueError: if `data` is not uint8, not one-dimensional, or not of the length that shape and bits ask for.
    """
    require_bits(bits)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"packed integers are one-dimensional uint8, not {data.dtype} of shape {list(data.shape)}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{list(shape)} is not the shape of a tensor; sizes cannot be negative")
    # Before anything is allocated: a damaged header must not ask for the machine's memory.
    length, count = packed_length(math.prod(shape), bits), math.prod(shape)
    if len(data) != length:
        raise ValueError(
            f"{len(data)} bytes cannot hold a tensor of shape {list(shape)} at {bits} bits, which takes {length}; "
            "the data is truncated or described wrongly"
        )
    data = torch.nn.functional.pad(data, (0, -len(data) % bits)).view(-1, bits)
    values = torch.empty(len(data), 8, dtype=torch.uint8, device=data.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = data[:, byte] >> shift
        if shift + bits > 8:
            value |= data[:, byte + 1] << (8 - shift)
        values[:, position] = value
    values &= 2**bits - 1
    if signed:
        sign = 2 ** (bits - 1)
        # Two's complement of `bits` widened to 8 bits, by uint8 arithmetic that wraps around.
        values = (values ^ sign).sub_(sign).view(torch.int8)
    return values.flatten()[:count].clone().view(*shape)


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)
