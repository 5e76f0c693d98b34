"""What holds for every quantizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from quantizers import MSE, LogQuantizer, PerAxis, Quantizer, TwinUniformQuantizer, UniformQuantizer, base

EVERY: list[Callable[[int], Quantizer]] = [
    lambda bits: UniformQuantizer(bits, symmetric=True),
    lambda bits: UniformQuantizer(bits, symmetric=False, granularity=PerAxis(0)),
    lambda bits: TwinUniformQuantizer(bits, split="magnitude"),
    lambda bits: TwinUniformQuantizer(bits, split="sign"),
    lambda bits: LogQuantizer(bits, base="sqrt2"),
    lambda bits: LogQuantizer(bits, base="search"),
]
TRYING = EVERY[2:]  # those with one group, fitted by trying candidates
SCALED = EVERY[:2] + EVERY[4:]  # those with a scale of their own
VALUES = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_out_of_range(make: Callable[[int], Quantizer], bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be an integer from 2 to 8, not {bits!r}"):
        make(bits)


@pytest.mark.parametrize("make", EVERY)
def test_unfitted_quantizers_say_so(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4)
    assert not quantizer.fitted
    for use in (
        lambda: quantizer(VALUES),
        lambda: quantizer.quantize(VALUES),
        lambda: quantizer.dequantize(torch.zeros(3, dtype=quantizer.dtype)),
        lambda: quantizer.tensors(),
    ):
        with pytest.raises(RuntimeError, match=r"is not fitted; call fit\(x\)"):
            use()
    assert quantizer.fit(VALUES) is quantizer
    assert quantizer.fitted


@pytest.mark.parametrize("make", EVERY)
def test_values_that_cannot_be_fitted(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4)
    with pytest.raises(ValueError, match=r"empty tensor \(shape \[0, 3\]\)"):
        quantizer.fit(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"takes floating values, not torch\.int64"):
        quantizer.fit(torch.ones(3, dtype=torch.int64))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity, found in 1 of 2 values"):
            quantizer.fit(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer.fit(torch.tensor([1e300], dtype=torch.float64))
    assert not quantizer.fitted


@pytest.mark.parametrize("make", EVERY)
def test_only_floating_values_in_and_only_its_integers_back(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4).fit(VALUES)
    for use in (quantizer, quantizer.quantize):
        with pytest.raises(ValueError, match="takes floating values"):
            use(torch.ones(3, 2, dtype=torch.int32))
    for dtype in (torch.int32, torch.float32, torch.uint8 if quantizer.signed else torch.int8):
        with pytest.raises(ValueError, match=f"integers are {quantizer.dtype}, not {dtype}"):
            quantizer.dequantize(torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize("make", EVERY)
def test_refitting_forgets_what_was(make: Callable[[int], Quantizer]) -> None:
    again = make(4).fit(VALUES * 0.01).fit(VALUES)
    for name, tensor in make(4).fit(VALUES).tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


@pytest.mark.parametrize("make", EVERY)
def test_fitting_records_no_gradient(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4).fit(VALUES.clone().requires_grad_())
    assert not any(tensor.requires_grad for tensor in quantizer.tensors().values())
    assert not quantizer.quantize(VALUES.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("make", EVERY)
def test_a_copied_module_is_fitted_and_half_precision_keeps_its_parameters(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4).fit(VALUES)
    expected = quantizer(VALUES)
    twin = copy.deepcopy(quantizer)
    for converted in (twin, twin.half(), twin.bfloat16(), twin.double(), twin.to("cpu", torch.float16)):
        assert torch.equal(converted(VALUES), expected)
        assert all(tensor.dtype in (torch.float32, torch.int32, torch.uint8) for tensor in converted.tensors().values())


@pytest.mark.parametrize("make", EVERY)
def test_a_state_dict_moves_between_fitted_quantizers(make: Callable[[int], Quantizer]) -> None:
    quantizer, other = make(4).fit(VALUES), make(4).fit(VALUES * 0.1)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(VALUES), quantizer(VALUES))


@pytest.mark.parametrize("make", EVERY)
def test_candidates_and_neighbours_can_be_loaded(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(4)
    for candidate in quantizer.candidates(VALUES):
        assert quantizer.load_tensors(candidate).tensors().keys() == candidate.keys()
    present = quantizer.fit(VALUES).tensors()
    for neighbour in quantizer.neighbours(0.1):
        assert any(not torch.equal(neighbour[name], tensor) for name, tensor in present.items())
        assert quantizer.load_tensors(neighbour).fitted


@pytest.mark.parametrize("make", SCALED)
def test_neighbours_with_a_smaller_spread_are_nearer(make: Callable[[int], Quantizer]) -> None:
    quantizer = make(8).fit(VALUES)
    scale = quantizer.tensors()["scale"]
    farthest = [
        max((neighbour["scale"] / scale - 1).abs().max() for neighbour in quantizer.neighbours(spread))
        for spread in (0.2, 0.1)
    ]
    assert farthest[1] < farthest[0] <= 0.2 + 1e-6


@pytest.mark.parametrize("make", TRYING)
def test_the_fit_does_not_depend_on_how_it_is_chunked(
    make: Callable[[int], Quantizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = torch.rand(VALUES.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for budget in (7, 50, 10**9):
        monkeypatch.setattr(base, "chunk_elements", lambda device, budget=budget: budget)
        quantizer = make(4).fit(VALUES, importance)
        errors.append(((quantizer(VALUES) - VALUES).square() * importance).sum().item())
    assert max(errors) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("make", TRYING)
def test_importance_counts_in_the_fit(make: Callable[[int], Quantizer]) -> None:
    x = torch.cat([VALUES.flatten(), VALUES.flatten() * 0.1])
    small = torch.arange(len(x)) >= VALUES.numel()
    plain = (make(3).fit(x)(x) - x)[small].square().sum()
    weighted = (make(3).fit(x, small.float())(x) - x)[small].square().sum()
    assert weighted < 0.9 * plain


def test_facts_of_the_integers() -> None:
    signed, unsigned = UniformQuantizer(5, symmetric=True), UniformQuantizer(5, symmetric=False)
    assert (signed.qmin, signed.qmax, signed.num_levels, signed.dtype) == (-16, 15, 32, torch.int8)
    assert (unsigned.qmin, unsigned.qmax, unsigned.num_levels, unsigned.dtype) == (0, 31, 32, torch.uint8)
    assert "fitted=False" in repr(signed)


def test_importance_that_cannot_be_used_is_refused() -> None:
    quantizer = UniformQuantizer(4, symmetric=True, search=MSE())
    values = torch.randn(3, 4)
    with pytest.raises(ValueError, match="not negative"):
        quantizer.fit(values, torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="finite"):
        quantizer.fit(values, torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \[5\] does not broadcast to values of shape \[3, 4\]"):
        quantizer.fit(values, torch.ones(5))
