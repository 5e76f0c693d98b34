from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import LogQuantizer, TwinUniformQuantizer, build

EXAMPLES = settings(max_examples=60)
Base = Literal["2", "sqrt2", "search"]


def loaded(bits: int, base: Base, scale: float = 1.0, numerator: int = 20, shift: float = 0.0) -> LogQuantizer:
    tensors = {"scale": torch.tensor([scale])}
    if base == "search":
        tensors["numerator"] = torch.tensor([numerator])
    return LogQuantizer(bits, base=base, shift=shift).load_tensors(tensors)


def softmax_like(seed: int) -> Tensor:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.softmax(-1)


def levels(bits: int, scale: float, octaves_per_step: float) -> np.ndarray:
    """What the integers stand for, written out: powers of the base, then zero."""
    return np.append(scale * 2.0 ** (-octaves_per_step * np.arange(2**bits - 1)), 0.0)


def test_base_2_by_hand() -> None:
    # 3 bits: 2, 1, 1/2, ..., 1/32 (codes 0 to 6), and 0 (code 7).
    quantizer = loaded(3, "2", scale=2.0)
    # Neighbouring levels meet at their geometric mean: 1.414 between 1 and 2.
    x = torch.tensor([-1.0, 0.0, 0.01, 0.03, 0.06, 0.5, 0.7, 0.72, 1.0, 1.41, 1.42, 2.0, 50.0, float("inf")])
    q = quantizer.quantize(x)
    assert q.dtype == torch.uint8
    assert q.tolist() == [7, 7, 7, 6, 5, 2, 2, 1, 1, 1, 0, 0, 0, 0]
    expected = [0, 0, 0, 1 / 32, 1 / 16, 0.5, 0.5, 1, 1, 1, 2, 2, 2, 2]
    assert quantizer.dequantize(q).tolist() == expected
    assert quantizer(x).tolist() == expected


def test_base_sqrt2_by_hand() -> None:
    # 2 bits: 1, 0.7071, 0.5 and 0. The boundaries: 2^-0.25 = 0.841, 2^-0.75 = 0.595, and to zero 2^-2.25 = 0.210.
    quantizer = loaded(2, "sqrt2")
    x = torch.tensor([0.84, 0.85, 0.59, 0.60, 0.205, 0.215])
    assert quantizer.quantize(x).tolist() == [1, 0, 2, 1, 3, 2]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("base", "octaves_per_step"), [("2", 1.0), ("sqrt2", 0.5), ("search", 20 / 37)])
def test_every_integer_stands_for_its_level(bits: int, base: Base, octaves_per_step: float) -> None:
    every = torch.arange(2**bits).to(torch.uint8)
    values = loaded(bits, base, scale=0.75).dequantize(every).numpy()
    np.testing.assert_allclose(values, levels(bits, 0.75, octaves_per_step), rtol=1e-6, atol=1e-40)
    assert values[-1] == 0


@pytest.mark.parametrize("numerator", [1, 7, 20, 37, 100, 592])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_agrees_with_the_published_formula(bits: int, numerator: int) -> None:
    quantizer = loaded(bits, "search", scale=0.6, numerator=numerator)
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(6)
    exact = -(37 / numerator) * np.log2(x.numpy() / np.float64(np.float32(0.6)))
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-3  # where fp32 cannot round the other way
    inside = sure & (exact < 2**bits - 2)
    expected = np.clip(np.round(exact), 0, 2**bits - 2)
    q = quantizer.quantize(x).numpy()
    assert inside.any()
    np.testing.assert_array_equal(q[inside], expected[inside])


@pytest.mark.parametrize("numerator", [1, 5, 16, 20, 37, 60, 592])
def test_zero_begins_near_half_of_the_smallest_level(numerator: int) -> None:
    quantizer = loaded(3, "search", numerator=numerator)
    smallest = quantizer.dequantize(torch.tensor([6], dtype=torch.uint8))
    assert quantizer(smallest * 2**-0.45).item() == smallest.item()
    if numerator <= 37:  # wider steps than an octave: the formula's own interval
        assert quantizer(smallest * 2**-1.55).item() == 0
    assert quantizer(smallest * 2 ** -(numerator / 74 + 1.01)).item() == 0


@EXAMPLES
@given(
    st.integers(2, 8),
    st.sampled_from(["2", "sqrt2", "search"]),
    st.integers(1, 592),
    st.sampled_from([1e-6, 0.3, 1.0, 1e4]),
    st.sampled_from([0.0, 0.17]),
    st.integers(0, 10_000),
)
def test_properties(bits: int, base: Base, numerator: int, scale: float, shift: float, seed: int) -> None:
    quantizer = loaded(bits, base, scale, numerator, shift)
    x = torch.cat([softmax_like(seed).flatten() * scale * 1.5, torch.linspace(-1, 2, 101)]).sort().values
    q, y = quantizer.quantize(x), quantizer(x)
    assert int(q.max()) <= quantizer.qmax
    assert torch.equal(y, quantizer.dequantize(q))
    assert (y.diff() >= 0).all()
    assert (q.int().diff() <= 0).all()
    assert quantizer(torch.tensor([-shift])).item() == pytest.approx(-shift)
    if not shift:
        assert torch.equal(quantizer(y), y)
        assert torch.equal(quantizer.quantize(y), q)


def test_what_a_value_becomes_does_not_depend_on_where_it_lies() -> None:
    x = softmax_like(0)
    for base in ("2", "sqrt2", "search"):
        quantizer = loaded(4, base, 0.9, 19)
        whole = quantizer(x)
        assert torch.equal(quantizer(x.T), whole.T)
        assert torch.equal(quantizer(x[:, ::3]), whole[:, ::3])
        q = quantizer.quantize(x).flatten()
        assert torch.equal(torch.cat([quantizer.dequantize(part) for part in q.split(13)]), whole.flatten())


def test_relative_error_is_at_most_half_a_step() -> None:
    quantizer = loaded(4, "search", scale=1.0, numerator=17)
    smallest = 2.0 ** (-17 / 37 * 14)
    x = torch.linspace(smallest, 1.0, 5000)
    assert (quantizer(x) / x).log2().abs().max() <= 17 / 37 / 2 + 1e-5


@pytest.mark.parametrize("base", ["2", "sqrt2", "search"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_fit_is_about_the_best_there_is(bits: int, base: Base) -> None:
    x = softmax_like(1)
    fitted = LogQuantizer(bits, base=base).fit(x)

    def error(quantizer: LogQuantizer) -> float:
        return (quantizer(x) - x).double().square().sum().item()

    scales = float(x.max()) * np.linspace(0.3, 1.1, 17)
    numerators = range(1, 12) if bits == 8 else range(8, 200, 4)
    every = [error(loaded(bits, base, scale, n)) for scale in scales for n in (numerators if base == "search" else [0])]
    assert error(fitted) <= 1.05 * min(every)


def test_values_on_the_levels_of_a_base_are_found_exactly() -> None:
    steps = torch.arange(15, dtype=torch.float64)
    x = (0.8 * 2 ** (-22 / 37 * steps)).float()
    fitted = LogQuantizer(4, base="search").fit(x.repeat(10))
    assert (fitted(x) - x).square().sum() <= 1e-3 * x.square().sum()


def test_a_searched_base_serves_where_fixed_bases_do_not() -> None:
    x = softmax_like(2)
    for bits in (2, 3, 4):
        errors = {
            base: (LogQuantizer(bits, base=base).fit(x)(x) - x).square().sum().item()
            for base in ("2", "sqrt2", "search")
        }
        assert errors["search"] <= 1.02 * min(errors["2"], errors["sqrt2"])
        if bits != 3:  # 2 bits: sqrt2 spans one octave only; 4 bits: base 2 has no level between 1/2 and 1
            assert errors["search"] < 0.7 * max(errors["2"], errors["sqrt2"])


def test_it_beats_twin_uniform_on_probabilities_of_all_magnitudes() -> None:
    x = torch.exp2(-12 * torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    relative = {
        name: ((quantizer(x) - x) / x).square().mean().item()
        for name, quantizer in {
            "log": LogQuantizer(4, base="2").fit(x),
            "twin": TwinUniformQuantizer(4, split="magnitude").fit(x),
        }.items()
    }
    assert relative["log"] < 0.2 * relative["twin"]


def test_the_shift_keeps_the_negative_values_of_gelu() -> None:
    x = torch.nn.functional.gelu(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2)
    shifted = LogQuantizer(6, base="search", shift=0.17).fit(x)
    plain = LogQuantizer(6, base="search").fit(x)
    negative = x < 0
    assert (plain(x)[negative] == 0).all()
    assert (shifted(x) - x)[negative].square().mean() < 0.1 * x[negative].square().mean()
    assert (shifted(x) - x).square().sum() < (plain(x) - x).square().sum()
    by_hand = loaded(3, "2", scale=1.0, shift=0.25)
    torch.testing.assert_close(
        by_hand(torch.tensor([-0.25, 0.0, 0.25, 0.75, 9.0])), torch.tensor([-0.25, 0, 0.25, 0.75, 0.75])
    )


def test_nothing_but_zeros() -> None:
    for base in ("2", "search"):
        quantizer = LogQuantizer(4, base=base).fit(torch.zeros(5))
        assert quantizer.tensors()["scale"].item() > 0
        assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gradient_is_zero_where_clipped() -> None:
    x = torch.tensor([-1.0, 0.0, 0.001, 0.3, 1.0, 1.1, 1.189, 1.19, 3.0], requires_grad=True)
    loaded(4, "sqrt2")(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]  # what rounds to the largest level ends at 2^(1/4) = 1.1892
    x = torch.tensor([-0.2, -0.1, 0.5], requires_grad=True)
    loaded(4, "sqrt2", shift=0.17)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1]


def test_nan_is_kept_and_the_input_too() -> None:
    x = torch.tensor([0.5, float("nan"), 0.0])
    for quantizer in (loaded(2, "2"), loaded(8, "search", numerator=1)):
        assert quantizer(x).isnan().tolist() == [False, True, False]
        assert x[0].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = softmax_like(0).to(dtype)
    quantizer = LogQuantizer(8, base="search").fit(x)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer.dequantize(quantizer.quantize(x)).to(dtype))


def test_scalars_and_empty_tensors_can_be_quantized() -> None:
    quantizer = loaded(4, "2")
    assert quantizer(torch.tensor(0.26)).item() == 0.25
    assert quantizer.dequantize(quantizer.quantize(torch.tensor(0.26))).item() == 0.25
    assert quantizer(torch.zeros(0, 3)).shape == (0, 3)
    assert quantizer.quantize(torch.zeros(0, 3)).shape == (0, 3)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="base must be '2', 'sqrt2' or 'search', not 'e'"):
        LogQuantizer(4, base="e")  # type: ignore[arg-type]
    for shift in (-0.1, float("inf"), float("nan"), "0.17", True):
        with pytest.raises(ValueError, match="shift must be a number that is finite and not negative"):
            LogQuantizer(4, base="2", shift=shift)  # type: ignore[arg-type]
    fixed = {"type": "log", "bits": 4, "base": "2", "shift": 0.0}
    searched = fixed | {"base": "search"}
    scale = torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"a LogQuantizer with base '2' has the tensors scale, not numerator, scale"):
        build(fixed, {"scale": scale, "numerator": torch.tensor([3])})
    with pytest.raises(ValueError, match="base 'search' has the tensors scale, numerator, not scale"):
        build(searched, {"scale": scale})
    for numerator in (0, 593):
        with pytest.raises(ValueError, match=rf"numerator must lie in \[1, 592\], not {numerator}"):
            build(searched, {"scale": scale, "numerator": torch.tensor([numerator])})
    with pytest.raises(ValueError, match="numerator must be one integer"):
        build(searched, {"scale": scale, "numerator": torch.tensor([3.0])})
    for bad in (torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            build(fixed, {"scale": bad})
    for bad in (torch.tensor([1]), torch.tensor(0.5), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match=r"scale must be floating, of shape \[1\]"):
            build(fixed, {"scale": bad})
