from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers import pack, packed_length, unpack


def numpy_pack(values: np.ndarray, bits: int) -> np.ndarray:
    """The same stream by way of numpy's bit arrays."""
    unsigned = values.astype(np.int64) & (2**bits - 1)
    stream = (unsigned[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).ravel(), bitorder="little")


@settings(max_examples=150)
@given(st.data(), st.integers(2, 8), st.booleans(), st.integers(0, 40))
def test_packing_agrees_with_numpy_and_comes_back(data: st.DataObject, bits: int, signed: bool, count: int) -> None:
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(lowest, highest), min_size=count, max_size=count))
    q = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(count * bits / 8),) == (packed_length(count, bits),)
    assert packed.tolist() == numpy_pack(np.array(values, dtype=np.int64), bits).tolist()
    back = unpack(packed, bits, q.shape, signed)
    assert back.dtype == q.dtype
    assert torch.equal(back, q)


def test_bytes_worked_out_by_hand() -> None:
    # 4 bits: low nibble first; -1 is 1111.
    assert pack(torch.tensor([1, -1, 7], dtype=torch.int8), 4).tolist() == [0xF1, 0x07]
    # 3 bits: 1, 2, 3 -> ...011 010 001 = 0b11010001.
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist() == [0b11010001, 0]
    assert unpack(torch.tensor([0xF1, 0x07], dtype=torch.uint8), 4, [3], signed=True).tolist() == [1, -1, 7]


def test_every_value_of_every_width_in_a_shape() -> None:
    for bits in range(2, 9):
        q = torch.arange(2**bits).to(torch.uint8).reshape(2, 2, -1)
        assert torch.equal(unpack(pack(q, bits), bits, (2, 2, 2**bits // 4), signed=False), q)
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).reshape(4, -1).T
        assert torch.equal(unpack(pack(q, bits), bits, q.shape, signed=True), q)  # not contiguous: row-major order


def test_packed_bytes_own_no_more_than_they_need() -> None:
    packed = pack(torch.zeros(3, dtype=torch.uint8), 5)
    assert packed.untyped_storage().nbytes() == 2
    assert unpack(packed, 5, [3], signed=False).untyped_storage().nbytes() == 3


def test_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="from -9 to 7 do not fit 4 bits, which hold -8 to 7"):
        pack(torch.tensor([-9, 7], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="from 3 to 8 do not fit 3 bits, which hold 0 to 7"):
        pack(torch.tensor([3, 8], dtype=torch.uint8), 3)


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        pack(torch.tensor([1]), 4)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, not 1"):
        pack(torch.tensor([1], dtype=torch.int8), 1)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, not 9"):
        unpack(torch.zeros(9, dtype=torch.uint8), 9, [8], signed=True)
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        unpack(torch.zeros(1, dtype=torch.int8), 4, [2], signed=True)
    with pytest.raises(ValueError, match="one-dimensional"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), 4, [2], signed=True)
    with pytest.raises(ValueError, match="negative"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4, [-1, -2], signed=True)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_data_of_the_wrong_length(length: int) -> None:
    with pytest.raises(ValueError, match=rf"{length} bytes cannot hold .* \[3\] at 4 bits, which takes 2"):
        unpack(torch.zeros(length, dtype=torch.uint8), 4, [3], signed=True)


def test_a_huge_shape_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, [2**40, 2**40], signed=False)
