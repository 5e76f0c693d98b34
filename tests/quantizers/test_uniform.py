from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import MSE, Granularity, MinMax, PerAxis, Percentile, PerGroup, PerTensor, RangeSearch, UniformQuantizer

EXAMPLES = settings(max_examples=60)


@st.composite
def fitted(draw: st.DrawFn) -> tuple[UniformQuantizer, Tensor]:
    """A fitted quantizer and the `[4, 3, 6]` values it was fitted on."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randn(4, 3, 6, generator=generator).pow(draw(st.sampled_from([1, 3])))
    x = x * draw(st.sampled_from([1e-6, 1.0, 1e4])) + draw(st.sampled_from([0.0, -5.0, 2.0]))
    granularities: list[Granularity] = [PerTensor(), PerAxis(0), PerAxis(1), PerAxis(-1)]
    searches: list[RangeSearch] = [MinMax(), Percentile(90.0), MSE(10)]
    quantizer = UniformQuantizer(
        draw(st.integers(2, 8)),
        symmetric=draw(st.booleans()),
        granularity=draw(st.sampled_from(granularities)),
        search=draw(st.sampled_from(searches)),
    )
    return quantizer.fit(x), x


def test_symmetric_by_hand() -> None:
    quantizer = UniformQuantizer(4, symmetric=True).fit(torch.tensor([-3.5, 1.0, 2.0]))  # scale 3.5 / 7
    assert quantizer.tensors()["scale"].tolist() == [0.5]
    x = torch.tensor([-100.0, -4.0, -3.5, -0.25, 0.0, 0.25, 0.75, 0.8, 3.5, 100.0])
    q = quantizer.quantize(x)
    assert q.dtype == torch.int8
    assert q.tolist() == [-8, -8, -7, 0, 0, 0, 2, 2, 7, 7]  # ties go to the even integer
    assert quantizer.dequantize(q).tolist() == [-4.0, -4.0, -3.5, 0.0, 0.0, 0.0, 1.0, 1.0, 3.5, 3.5]


def test_affine_by_hand() -> None:
    quantizer = UniformQuantizer(2, symmetric=False).fit(torch.tensor([-1.0, 2.0]))  # scale 1, zero point 1
    assert quantizer.tensors()["zero_point"].tolist() == [1]
    assert quantizer.tensors()["zero_point"].dtype == torch.uint8
    q = quantizer.quantize(torch.tensor([-7.0, -1.0, -0.5, 0.5, 1.5, 2.0, 9.0]))
    assert q.dtype == torch.uint8
    assert q.tolist() == [0, 0, 1, 1, 3, 3, 3]
    assert quantizer.dequantize(q).tolist() == [-1, -1, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_agrees_with_numpy(bits: int, symmetric: bool) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(bits)) + 0.5
    quantizer = UniformQuantizer(bits, symmetric=symmetric).fit(x)
    values = x.numpy()
    if symmetric:
        bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero_point = np.abs(values).max() / top, 0.0
    else:
        bottom, top = 0, 2**bits - 1
        scale = (values.max() - values.min()) / top
        zero_point = np.round(-values.min() / scale)
    assert quantizer.scale is not None
    assert quantizer.scale.item() == pytest.approx(float(scale), rel=1e-6)
    expected = np.clip(np.round(values / quantizer.scale.item()) + zero_point, bottom, top)
    np.testing.assert_array_equal(quantizer.quantize(x).numpy(), expected)
    np.testing.assert_allclose(quantizer(x).numpy(), (expected - zero_point) * scale, rtol=1e-5)


@EXAMPLES
@given(fitted(), st.floats(0.1, 10))
def test_integers_and_forward_are_consistent(case: tuple[UniformQuantizer, Tensor], stretch: float) -> None:
    quantizer, x = case
    for values in (x, x * stretch, torch.zeros_like(x), x * 1e30):
        q = quantizer.quantize(values)
        assert q.shape == x.shape
        assert q.dtype == quantizer.dtype
        assert quantizer.qmin <= int(q.min())
        assert int(q.max()) <= quantizer.qmax
        assert torch.equal(quantizer(values), quantizer.dequantize(q))
    assert (quantizer(torch.zeros_like(x)) == 0).all()


@EXAMPLES
@given(fitted())
def test_fake_quantization_is_idempotent(case: tuple[UniformQuantizer, Tensor]) -> None:
    quantizer, x = case
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    assert torch.equal(quantizer.quantize(once), quantizer.quantize(x))


@EXAMPLES
@given(fitted())
def test_error_inside_the_range_is_at_most_half_a_step(case: tuple[UniformQuantizer, Tensor]) -> None:
    quantizer, x = case
    scale = quantizer.granularity.broadcast(quantizer.tensors()["scale"], x)
    zero_point = quantizer.granularity.broadcast(quantizer.zero_point, x)  # type: ignore[arg-type]
    inside = (x >= scale * (quantizer.qmin - zero_point)) & (x <= scale * (quantizer.qmax - zero_point))
    excess = (quantizer(x) - x).abs() - scale * 0.5 - x.abs() * 1e-6
    assert (excess[inside] <= 0).all()
    if quantizer.search == MinMax():
        assert (excess <= 0).all()  # rounding of the zero point may clip, but never by more


@EXAMPLES
@given(fitted())
def test_monotonic(case: tuple[UniformQuantizer, Tensor]) -> None:
    quantizer, x = case
    larger = x + x.abs() * 0.1 + 1e-7
    assert (quantizer(larger) >= quantizer(x)).all()


@pytest.mark.parametrize("search", [MinMax(), Percentile(95.0), MSE(20)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_axis_equals_a_loop_of_per_tensor(search: RangeSearch, symmetric: bool, axis: int) -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    together = UniformQuantizer(4, symmetric=symmetric, granularity=PerAxis(axis), search=search).fit(x)(x)
    for index in range(x.shape[axis]):
        part = x.select(axis, index)
        alone = UniformQuantizer(4, symmetric=symmetric, search=search).fit(part)(part)
        torch.testing.assert_close(together.select(axis, index), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("search", [MinMax(), MSE(20)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_group_equals_a_loop_of_per_tensor_with_scales_in_half_precision(
    search: RangeSearch, symmetric: bool
) -> None:
    x = torch.randn(3, 14, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 15)
    together = UniformQuantizer(4, symmetric=symmetric, granularity=PerGroup(5), search=search).fit(x)
    scales = together.tensors()["scale"]
    assert scales.dtype == torch.float16
    for number, (row, start) in enumerate((row, start) for row in range(3) for start in (0, 5, 10)):
        part = x[row, start : start + 5]
        alone = UniformQuantizer(4, symmetric=symmetric, search=search).fit(part).tensors()
        assert scales[number] == alone["scale"].half()
        alone["scale"] = alone["scale"].half()
        expected = UniformQuantizer(4, symmetric=symmetric).load_tensors(alone)(part)
        assert torch.equal(together(x)[row, start : start + 5], expected)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_groups_come_back_as_they_were_kept(magnitude: float) -> None:
    x = magnitude * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(4, symmetric=False, granularity=PerGroup(8)).fit(x)
    kept = quantizer.tensors()
    # What half precision does not reach is kept in single.
    assert kept["scale"].dtype == (torch.float16 if magnitude == 1.0 else torch.float32)
    again = UniformQuantizer(4, symmetric=False, granularity=PerGroup(8)).load_tensors(kept)
    assert torch.equal(again(x), quantizer(x))
    assert ((quantizer(x) - x).abs() <= 0.6 * quantizer.granularity.broadcast(kept["scale"].float(), x)).all()


def test_channels_fitted_on_batches_serve_single_tensors() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(8, symmetric=False, granularity=PerAxis(-1)).fit(x)
    assert quantizer.tensors()["scale"].shape == (3,)
    assert torch.equal(quantizer(x)[0], quantizer(x[0]))
    with pytest.raises(ValueError, match=r"was fitted on 3 groups, but axis -1 .* has 4"):
        quantizer(torch.zeros(2, 4))


@pytest.mark.parametrize("search", [MinMax(), Percentile(), MSE(10)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_groups(search: RangeSearch, symmetric: bool) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [-2.5, -2.5, -2.5]])
    quantizer = UniformQuantizer(3, symmetric=symmetric, granularity=PerAxis(0), search=search).fit(x)
    torch.testing.assert_close(quantizer(x), x, rtol=1e-6, atol=0)
    assert quantizer.tensors()["scale"][0].item() == 1
    assert quantizer.quantize(x)[0].tolist() == [0, 0, 0]


def test_scalars_and_empty_tensors_can_be_quantized() -> None:
    quantizer = UniformQuantizer(4, symmetric=True).fit(torch.tensor(3.5))
    assert quantizer(torch.tensor(0.6)).item() == 0.5
    assert quantizer(torch.zeros(0, 3)).shape == (0, 3)


def test_the_gradient_is_one_inside_and_zero_where_clipped() -> None:
    quantizer = UniformQuantizer(4, symmetric=True).fit(torch.tensor([3.5]))  # representable: -4 to 3.5, steps of 0.5
    x = torch.tensor([-4.3, -4.2, -4.0, 0.1, 3.5, 3.7, 3.8, 50.0], requires_grad=True)
    weights = torch.arange(1.0, 9)
    (quantizer(x) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]  # -4.2 and 3.7 still round to an integer of the grid


def test_the_gradient_mask_of_affine_channels() -> None:
    fit_on = torch.tensor([[-1.0, 0.0], [2.0, 30.0]])
    quantizer = UniformQuantizer(2, symmetric=False, granularity=PerAxis(-1)).fit(fit_on)
    x = torch.tensor([[-1.6, -6.0], [1.9, 29.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    quantizer = UniformQuantizer(8, symmetric=False).fit(x)
    assert quantizer.tensors()["scale"].dtype == torch.float32
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, quantizer.dequantize(quantizer.quantize(x)).to(dtype))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert (x.grad == 1).all()


def test_forward_leaves_its_input_and_keeps_nan() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    before = x.clone()
    for symmetric in (True, False):
        y = UniformQuantizer(4, symmetric=symmetric).fit(torch.tensor([-7.0, 7.0]))(x)
        assert y.isnan().tolist() == [False, True, False, False]
        assert y[2].item() <= 7.5
        assert y[3].item() >= -8
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("search", ["mse", None, MSE])
def test_the_search_must_be_one(search: object) -> None:
    with pytest.raises(ValueError, match="search must be a range search"):
        UniformQuantizer(8, symmetric=True, search=search)  # type: ignore[arg-type]


def test_other_arguments_of_another_kind() -> None:
    with pytest.raises(ValueError, match="granularity must be PerTensor"):
        UniformQuantizer(8, symmetric=True, granularity=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="symmetric must be True or False, not 'yes'"):
        UniformQuantizer(8, symmetric="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_are_each_groups_range_scaled_down(symmetric: bool) -> None:
    x = torch.tensor([[-3.5, 7.0], [-0.7, 0.35]])
    quantizer = UniformQuantizer(4, symmetric=symmetric, granularity=PerAxis(0))
    candidates = quantizer.candidates(x)
    widest = (
        torch.tensor([1.0, 0.1]) if symmetric else torch.tensor([0.7, 0.07])
    )  # 7 / 7, 0.7 / 7; 10.5 / 15, 1.05 / 15
    torch.testing.assert_close(candidates[0]["scale"], widest)
    assert len(candidates) > 10
    for wider, narrower in pairwise(candidates):
        torch.testing.assert_close(narrower["scale"], wider["scale"] * 0.8)


def test_neighbours_of_an_affine_range_move_either_end_or_both() -> None:
    # [-6, 9] at 4 bits: scale 1, zero point 6.
    quantizer = UniformQuantizer(4, symmetric=False).fit(torch.tensor([-6.0, 9.0]))
    found = {(n["scale"].item(), n["zero_point"].item()) for n in quantizer.neighbours(1 / 3)}
    # high 6: [-6, 6]; high 12: [-6, 12]; low -4: [-4, 9]; low -8: [-8, 9]; both: [-4, 6] and [-8, 12].
    expected = {(12 / 15, 8), (18 / 15, 5), (13 / 15, 5), (17 / 15, 7), (10 / 15, 6), (20 / 15, 6)}
    assert {(round(s, 5), z) for s, z in found} == {(round(s, 5), z) for s, z in expected}


def test_neighbours_of_a_range_with_one_end_at_zero_move_the_other() -> None:
    quantizer = UniformQuantizer(4, symmetric=False).fit(torch.tensor([0.0, 15.0]))
    assert [(round(n["scale"].item(), 5), n["zero_point"].item()) for n in quantizer.neighbours(0.1)] == [
        *[(0.9, 0), (1.1, 0)]
    ]


def test_neighbours_of_a_symmetric_range() -> None:
    quantizer = UniformQuantizer(4, symmetric=True).fit(torch.tensor([-7.0, 2.0]))
    assert [round(n["scale"].item(), 5) for n in quantizer.neighbours(0.1)] == [0.9, 1.1]
