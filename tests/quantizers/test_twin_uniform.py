from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import TwinUniformQuantizer, UniformQuantizer, build

EXAMPLES = settings(max_examples=60)
Split = Literal["magnitude", "sign"]


def with_exponent(bits: int, split: Split, exponent: int) -> TwinUniformQuantizer:
    return TwinUniformQuantizer(bits, split=split).load_tensors({"exponent": torch.tensor([exponent])})


def levels(bits: int, split: Split, exponent: int) -> np.ndarray:
    """Every value the integers stand for, written out."""
    steps = 2 ** (bits - 1)
    if split == "magnitude":
        fine = np.arange(steps) / (steps - 1) * 2.0**-exponent
        return np.concatenate([fine, np.arange(steps) / (steps - 1)])
    negative = np.arange(-steps, 0) * 0.16997 / steps
    return np.concatenate([negative, np.arange(steps) * 0.16997 / steps * 2.0**exponent])


def softmax_like(seed: int) -> Tensor:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.softmax(-1)


def gelu_like(seed: int, scale: float = 2.0) -> Tensor:
    return torch.nn.functional.gelu(torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * scale)


def test_magnitude_by_hand() -> None:
    # 3 bits, m = 1/4: small levels 0, 1/12, 1/6, 1/4, large levels 0, 1/3, 2/3, 1 (codes 4 to 7).
    quantizer = with_exponent(3, "magnitude", 2)
    # The last level below 0.25 and the first above it, 1/3, meet halfway, at 0.2917.
    x = torch.tensor([-0.5, 0.0, 0.04, 0.05, 0.2, 0.25, 0.29, 0.3, 0.49, 0.51, 0.9, 1.0, 3.0])
    q = quantizer.quantize(x)
    assert q.dtype == torch.uint8
    assert q.tolist() == [0, 0, 0, 1, 2, 3, 3, 5, 5, 6, 7, 7, 7]
    expected = [0, 0, 0, 1 / 12, 1 / 6, 1 / 4, 1 / 4, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1]
    torch.testing.assert_close(quantizer.dequantize(q), torch.tensor(expected), rtol=1e-6, atol=0)


def test_sign_by_hand() -> None:
    # 3 bits: negative scale 0.16997 / 4 = 0.0424925, positive 8 times that, 0.33994.
    quantizer = with_exponent(3, "sign", 3)
    x = torch.tensor([-1.0, -0.16997, -0.1, -0.03, -0.02, 0.0, 0.1, 0.2, 0.8, 1.1, 9.0])
    q = quantizer.quantize(x)
    assert q.dtype == torch.int8
    assert q.tolist() == [-4, -4, -2, -1, 0, 0, 0, 1, 2, 3, 3]
    expected = [-0.16997, -0.16997, -0.084985, -0.0424925, 0, 0, 0, 0.33994, 0.67988, 1.01982, 1.01982]
    torch.testing.assert_close(quantizer.dequantize(q), torch.tensor(expected), rtol=1e-6, atol=0)


def test_two_bits_have_four_levels() -> None:
    assert with_exponent(2, "magnitude", 3)(torch.tensor([0.0, 0.05, 0.07, 0.5, 0.6, 1.0])).tolist() == [
        *[0, 0, 0.125, 0.125, 1, 1]
    ]
    y = with_exponent(2, "sign", 4)(torch.tensor([-0.2, -0.1, 0.5, 2.0]))
    torch.testing.assert_close(y, torch.tensor([-0.16997, -0.084985, 0.0, 1.35976]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("split", ["magnitude", "sign"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_integer_stands_for_its_level(bits: int, split: Split) -> None:
    for exponent in (0, 1, 5, 19):
        quantizer = with_exponent(bits, split, exponent)
        every = torch.arange(quantizer.qmin, quantizer.qmax + 1).to(quantizer.dtype)
        np.testing.assert_allclose(quantizer.dequantize(every).numpy(), levels(bits, split, exponent), rtol=1e-6)


@EXAMPLES
@given(st.integers(2, 8), st.integers(0, 19), st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_values_at_and_above_m_go_to_the_nearest_level(bits: int, exponent: int, values: list[float]) -> None:
    x = np.array([v for v in values if v >= 2.0**-exponent] + [1.0])
    nearest = np.abs(x[:, None] - levels(bits, "magnitude", exponent)).min(axis=1)
    error = np.abs(with_exponent(bits, "magnitude", exponent)(torch.tensor(x, dtype=torch.float32)).numpy() - x)
    np.testing.assert_allclose(error, nearest, atol=1e-6)


@EXAMPLES
@given(st.integers(2, 8), st.sampled_from(["magnitude", "sign"]), st.integers(0, 19), st.integers(0, 10_000))
def test_properties(bits: int, split: Split, exponent: int, seed: int) -> None:
    quantizer = with_exponent(bits, split, exponent)
    x = softmax_like(seed) if split == "magnitude" else gelu_like(seed, 10.0)
    x = torch.cat([x.flatten(), torch.linspace(-2, 2, 101)]).sort().values
    q, y = quantizer.quantize(x), quantizer(x)
    assert quantizer.qmin <= int(q.min())
    assert int(q.max()) <= quantizer.qmax
    assert torch.equal(y, quantizer.dequantize(q))
    assert torch.equal(quantizer(y), y)
    assert (y.diff() >= 0).all()
    assert quantizer(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", ["magnitude", "sign"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_exponent_with_the_least_squared_error_is_found(bits: int, split: Split, seed: int) -> None:
    x = softmax_like(seed) if split == "magnitude" else gelu_like(seed)
    found = TwinUniformQuantizer(bits, split=split).fit(x)
    errors = {e: (with_exponent(bits, split, e)(x) - x).double().square().sum().item() for e in found.exponents}
    exponent = found.tensors()["exponent"]
    assert exponent.shape == (1,)
    assert exponent.dtype == torch.int32
    assert errors[int(exponent)] <= min(errors.values()) * (1 + 1e-5)


@pytest.mark.parametrize("largest", [0.05, 1.0, 40.0, 5000.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_positive_ranges_from_small_to_thousands(bits: int, largest: float) -> None:
    x = torch.linspace(0, largest, 1000)
    quantizer = TwinUniformQuantizer(bits, split="sign").fit(x)
    exponent = quantizer.tensors()["exponent"].item()
    assert quantizer.exponents[0] < exponent < quantizer.exponents[-1]
    plain = UniformQuantizer(bits, symmetric=True).fit(x)
    # A power of two can be off by 2 in scale, so by 4 in squared error.
    assert (quantizer(x) - x).square().sum() <= 4 * (plain(x) - x).square().sum()


def test_magnitude_beats_uniform_after_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    # Heads that look everywhere beside heads that look at one place.
    logits = torch.randn(2, 8, 50, 200, generator=generator) * torch.tensor([0.5, 20.0]).reshape(2, 1, 1, 1)
    x = logits.softmax(-1)
    twin = TwinUniformQuantizer(4, split="magnitude").fit(x)
    plain = UniformQuantizer(4, symmetric=False).fit(x)
    assert (twin(x) - x).square().sum() < 0.5 * (plain(x) - x).square().sum()


def test_sign_keeps_the_small_negative_values_of_gelu() -> None:
    x = gelu_like(0, 4.0)
    twin = TwinUniformQuantizer(4, split="sign").fit(x)
    plain = UniformQuantizer(4, symmetric=False).fit(x)
    negative = x < 0
    assert (plain(x)[negative] == 0).all()  # lost, though they are half of all values
    assert ((twin(x) - x)[negative].abs() <= 0.16997 / 16 + 1e-6).all()


def test_ties_go_to_the_exponent_nearest_zero() -> None:
    assert TwinUniformQuantizer(4, split="magnitude").fit(torch.zeros(5)).tensors()["exponent"].item() == 0
    assert TwinUniformQuantizer(4, split="sign").fit(torch.tensor([-0.1, -0.05])).tensors()["exponent"].item() == 0


def test_the_gradient_is_zero_where_clipped() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.0], requires_grad=True)
    with_exponent(4, "magnitude", 3)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    x = torch.tensor([-1.0, -0.16, 0.3, 1.0, 2.0], requires_grad=True)
    with_exponent(4, "sign", 3)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_floating_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = softmax_like(0).to(dtype)
    quantizer = TwinUniformQuantizer(8, split="magnitude").fit(x)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer.dequantize(quantizer.quantize(x)).to(dtype))


@pytest.mark.parametrize("split", ["magnitude", "sign"])
def test_all_exponents_are_candidates_and_those_beside_the_present_one_neighbours(split: Split) -> None:
    quantizer = with_exponent(4, split, 3)
    every = [int(candidate["exponent"]) for candidate in quantizer.candidates(softmax_like(0))]
    assert sorted(every) == list(quantizer.exponents)
    assert [int(neighbour["exponent"]) for neighbour in quantizer.neighbours(0.1)] == [2, 4]
    edge = with_exponent(4, split, quantizer.exponents[-1])
    assert [int(neighbour["exponent"]) for neighbour in edge.neighbours(0.1)] == [quantizer.exponents[-2]]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"split must be 'magnitude' .* not 'softmax'"):
        TwinUniformQuantizer(4, split="softmax")  # type: ignore[arg-type]
    description = {"type": "twin_uniform", "bits": 4, "split": "magnitude"}
    with pytest.raises(ValueError, match=r"exponent must lie in \[0, 19\] for split 'magnitude', not 20"):
        build(description, {"exponent": torch.tensor([20])})
    with pytest.raises(ValueError, match="exponent must be one integer"):
        build(description, {"exponent": torch.tensor([2.0])})
    with pytest.raises(ValueError, match="exponent must be one integer"):
        build(description, {"exponent": torch.tensor([2, 3])})
    with pytest.raises(ValueError, match="has the tensors exponent, not scale"):
        build(description, {"scale": torch.tensor([2])})
