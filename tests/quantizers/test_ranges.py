from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import MSE, MinMax, Percentile, RangeSearch, range_search, range_search_from_dict, ranges
from quantizers.ranges import scale_and_zero_point


def squared_errors(groups: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> np.ndarray:
    """By an independent formula, in float64, from the grid that the range gives."""
    scale, zero_point = (p.double().numpy()[:, None] for p in scale_and_zero_point(low, high, bits, symmetric))
    bottom, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    x = groups.double().numpy()
    q = np.clip(np.round(x / scale) + zero_point, bottom, top)
    return np.asarray(((scale * (q - zero_point) - x) ** 2).sum(axis=1))


def test_grid_of_a_range() -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([2.0, 3.0, -1.0]), 2, False)
    # [-1, 2] in 3 steps of 1; [0.5, 3] is widened to [0, 3], [-3, -1] to [-3, 0].
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert zero_point.tolist() == [1, 0, 3]
    assert zero_point.dtype == torch.int32
    scale, zero_point = scale_and_zero_point(torch.tensor([-14.0, 0.0]), torch.tensor([7.0, 0.0]), 4, True)
    assert scale.tolist() == [2.0, 1.0]
    assert zero_point.tolist() == [0, 0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e38, 3.4e38])
def test_extreme_ranges_have_usable_grids(symmetric: bool, magnitude: float) -> None:
    scale, _ = scale_and_zero_point(torch.tensor([-magnitude]), torch.tensor([magnitude]), 8, symmetric)
    assert 0 < scale.item() < float("inf")


def test_minmax() -> None:
    groups = torch.tensor([[-3.0, 1.0, 2.0], [1.0, 2.0, 5.0]])
    low, high = MinMax()(groups, 8, False)
    assert low.tolist() == [-3, 0]
    assert high.tolist() == [2, 5]
    low, high = MinMax()(groups, 8, True)
    assert low.tolist() == [-3, -5]
    assert high.tolist() == [3, 5]


@pytest.mark.parametrize("percent", [51.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("count", [1, 2, 1000, 1001])
def test_percentile_agrees_with_numpy(percent: float, count: int) -> None:
    groups = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    low, high = Percentile(percent)(groups, 8, False)
    x = groups.double().numpy()
    expected_low = np.minimum(np.percentile(x, 100 - percent, axis=1), 0)
    expected_high = np.maximum(np.percentile(x, percent, axis=1), 0)
    np.testing.assert_allclose(low.numpy(), expected_low, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(high.numpy(), expected_high, rtol=1e-5, atol=1e-6)
    low, high = Percentile(percent)(groups, 8, True)
    np.testing.assert_allclose(high.numpy(), np.percentile(np.abs(x), percent, axis=1), rtol=1e-5, atol=1e-6)
    assert torch.equal(low, -high)


def test_percentile_of_more_values_than_torch_quantile_takes() -> None:
    x = torch.arange(2**24 + 2, dtype=torch.int32).remainder_(1000).float()[None]
    _, high = Percentile(99.99)(x, 8, True)
    assert high.item() == 999


def test_percentile_of_a_group_that_is_almost_all_zeros_keeps_the_rest() -> None:
    groups = torch.zeros(2, 100_000)
    groups[0, 0], groups[0, 1] = 4.0, -2.0
    for symmetric, expected in ((True, (-4.0, 4.0)), (False, (-2.0, 4.0))):
        low, high = Percentile(99.9)(groups, 8, symmetric)
        assert (low[0].item(), high[0].item()) == expected
        assert low[1].item() == high[1].item() == 0


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    power=st.sampled_from([1, 3, 5]),
    shift=st.sampled_from([-3.0, 0.0, 1.0]),
    magnitude=st.sampled_from([1e-25, 1.0, 1e25]),
    shape=st.sampled_from([(1, 1), (5, 7), (2, 300), (1, 3000)]),
)
def test_mse_is_never_worse_than_minmax(
    seed: int, bits: int, symmetric: bool, power: int, shift: float, magnitude: float, shape: tuple[int, int]
) -> None:
    groups = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).pow(power).add(shift) * magnitude
    searched = squared_errors(groups, *MSE(20)(groups, bits, symmetric), bits, symmetric)
    plain = squared_errors(groups, *MinMax()(groups, bits, symmetric), bits, symmetric)
    assert (searched <= plain * (1 + 1e-5)).all()


def test_mse_finds_the_best_symmetric_candidate() -> None:
    groups = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).pow(3)
    found = squared_errors(groups, *MSE(50, 0.1)(groups, 3, True), 3, True)
    largest = groups.abs().amax(1)
    every = [squared_errors(groups, -largest * f, largest * f, 3, True) for f in np.linspace(1, 0.1, 50)]
    np.testing.assert_allclose(found, np.min(every, axis=0), rtol=1e-4)


def test_mse_searches_jointly_and_then_each_end() -> None:
    groups = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1)).exp().sub(1.5)
    full_low, full_high = (end.item() for end in MinMax()(groups, 4, False))
    factors = np.linspace(1, 0.1, 30)

    def error(f: float, g: float) -> float:
        return float(squared_errors(groups, torch.tensor([full_low * f]), torch.tensor([full_high * g]), 4, False)[0])

    f = min(factors, key=lambda f: error(f, f))
    low_factor = min(factors, key=lambda g: error(g, f))
    high_factor = min(factors, key=lambda g: error(low_factor, g))
    assert low_factor != high_factor  # else this would not test the separate passes
    low, high = MSE(30, 0.1)(groups, 4, False)
    assert low.item() == pytest.approx(full_low * low_factor, rel=1e-5)
    assert high.item() == pytest.approx(full_high * high_factor, rel=1e-5)


def test_mse_lets_an_outlier_go() -> None:
    x = torch.cat([torch.randn(1, 5000, generator=torch.Generator().manual_seed(2)), torch.tensor([[40.0]])], dim=1)
    _, high = MSE()(x, 3, True)
    assert high.item() < 8


def test_mse_does_not_depend_on_how_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.randn(7, 333, generator=torch.Generator().manual_seed(3))
    for symmetric in (True, False):
        whole = MSE(25)(groups, 4, symmetric)
        for budget in (100, 1000, 10_000):  # splits values, candidates, groups
            with monkeypatch.context() as patch:
                patch.setattr(ranges, "chunk_elements", lambda device, budget=budget: budget)
                chunked = MSE(25)(groups, 4, symmetric)
            found, expected = (squared_errors(groups, *r, 4, symmetric) for r in (chunked, whole))
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mse_of_each_group_is_its_own() -> None:
    groups = torch.randn(4, 200, generator=torch.Generator().manual_seed(4)) * torch.tensor(
        [[1e-3], [1.0], [50.0], [0.0]]
    )
    for symmetric in (True, False):
        together = MSE(25)(groups, 4, symmetric)
        for row in range(4):
            alone = MSE(25)(groups[row : row + 1], 4, symmetric)
            assert (alone[0].item(), alone[1].item()) == (together[0][row].item(), together[1][row].item())


@pytest.mark.parametrize("search", [MinMax(), Percentile(99.5), MSE(50, 0.3)])
def test_round_trip_through_json(search: RangeSearch) -> None:
    assert range_search_from_dict(json.loads(json.dumps(search.to_dict()))) == search


def test_search_by_name() -> None:
    assert range_search("minmax") == MinMax()
    assert range_search("percentile", percent=99.0) == Percentile(99.0)
    assert range_search("mse", candidates=10) == MSE(candidates=10)


def test_unknown_names_and_parameters() -> None:
    with pytest.raises(ValueError, match="no range search 'entropy'; the known ones are minmax, percentile, mse"):
        range_search("entropy")
    with pytest.raises(ValueError, match="'percentile' has no parameter 'percentage'; its parameters: percent"):
        range_search("percentile", percentage=99)
    with pytest.raises(ValueError, match="'minmax' has no parameter 'n'; its parameters: none"):
        range_search("minmax", n=1)
    for description in ({}, "mse", {"type": 3}):
        with pytest.raises(ValueError, match="needs a 'type'"):
            range_search_from_dict(description)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("percentile", {"percent": 50}, "percent must be above 50 and at most 100, not 50"),
        ("percentile", {"percent": 100.1}, "not 100.1"),
        ("percentile", {"percent": float("nan")}, "not nan"),
        ("percentile", {"percent": "99"}, "not '99'"),
        ("mse", {"candidates": 1}, "candidates must be an integer of at least 2, not 1"),
        ("mse", {"candidates": 10.0}, "not 10.0"),
        ("mse", {"shrink_to": 0}, "shrink_to must lie between 0 and 1, not 0"),
        ("mse", {"shrink_to": 1.0}, "not 1.0"),
    ],
)
def test_parameters_out_of_range(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        range_search(name, **parameters)


def test_importance_decides_which_values_the_range_serves() -> None:
    # Two bits, symmetric: levels -2s, -s, 0, s. Of 1 and 10 only one can be met well; the important one is.
    values = torch.tensor([[1.0, 1.0, 1.0, 10.0]])
    for importance, served in (([1.0, 1.0, 1.0, 0.0], 1.0), ([0.0, 0.0, 0.0, 1.0], 10.0)):
        _, high = MSE(candidates=1000)(values, 2, True, torch.tensor([importance]))
        assert high.item() == pytest.approx(served, rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_importance_changes_nothing(symmetric: bool) -> None:
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    plain = MSE()(values, 4, symmetric)
    weighted = MSE()(values, 4, symmetric, torch.full_like(values, 4.0))
    assert torch.equal(plain[0], weighted[0])
    assert torch.equal(plain[1], weighted[1])


def test_weighted_mse_minimises_the_weighted_error() -> None:
    generator = torch.Generator().manual_seed(1)
    values, importance = torch.randn(1, 200, generator=generator), torch.rand(1, 200, generator=generator) ** 4
    _, high = MSE(candidates=100, shrink_to=0.02)(values, 3, True, importance)

    def error(limit: float) -> float:
        scale = np.float32(limit) / np.float32(3)
        codes = np.clip(np.round(values.numpy() / scale), -4, 3)
        return float((importance.numpy() * (codes * scale - values.numpy()) ** 2).sum())

    largest = float(values.abs().max())
    best = min(error(largest * factor) for factor in np.linspace(1.0, 0.02, 100))
    assert error(high.item()) == pytest.approx(best, rel=1e-4)
