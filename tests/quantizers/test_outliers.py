"""A few channels with large values, quantized apart from the others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import (
    MSE,
    LogQuantizer,
    OutlierQuantizer,
    PerAxis,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    build,
    outlier_channels,
)

APART = torch.tensor([1, 4])


def massive(seed: int = 0, factor: float = 200.0) -> Tensor:
    """[2, 30, 6], two channels of which are `factor` times as large as the others."""
    values = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(seed))
    values[..., APART] *= factor
    return values


def mains() -> dict[str, Quantizer]:
    return {
        "affine": UniformQuantizer(4, symmetric=False, search=MSE()),
        "symmetric": UniformQuantizer(3, symmetric=True),
        "twin": TwinUniformQuantizer(4, split="sign"),
        "log": LogQuantizer(4, base="search", shift=0.17),
        "log, fewest bits": LogQuantizer(2, base="sqrt2"),
    }


KINDS = list(mains())


# --- which channels


def test_channels_that_stick_out_by_hand() -> None:
    # Largest magnitudes 1, 5, 2, 40, 3: the median is 3.
    values = torch.tensor([[[1.0, -5.0, 2.0, 0.0, 3.0]], [[0.0, 1.0, -1.0, -40.0, 2.0]]])
    assert outlier_channels(values, 10).tolist() == [3]
    assert outlier_channels(values, 1.5).tolist() == [1, 3]
    assert outlier_channels(values, 40 / 3).tolist() == []  # more than, not as much as
    assert outlier_channels(values, 1000).dtype == torch.int64


def test_channels_that_are_never_used_set_no_standard() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 50.0]])
    assert outlier_channels(values, 20).tolist() == [6]
    assert outlier_channels(torch.zeros(3, 4), 20).tolist() == []
    assert outlier_channels(torch.ones(3, 1), 20).tolist() == []


# --- what becomes of values


def test_by_hand() -> None:
    # Main: 2 bits, symmetric, over [-1, 1]: scale 1, levels -2..1. Apart: 8 bits, scale 254 / 127 = 2.
    x = torch.tensor([[1.0, 254.0], [-0.4, -3.0], [0.6, 300.0]])
    quantizer = OutlierQuantizer(UniformQuantizer(2, symmetric=True), torch.tensor([1])).fit(x[:2])
    q = quantizer.quantize(x)
    assert q.dtype == torch.int8
    assert q.tolist() == [[1, 127], [0, -2], [1, 127]]  # -1.5 to even
    assert quantizer.dequantize(q).tolist() == quantizer(x).tolist() == [[1, 254], [0, -4], [1, 254]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_sees_its_own_channels_only(kind: str) -> None:
    x = massive()
    main, alone = mains()[kind], mains()[kind]
    others = [channel for channel in range(6) if channel not in APART]
    y = OutlierQuantizer(main, APART).fit(x)(x)
    assert torch.equal(y[..., others], alone.fit(x[..., others])(x[..., others]))
    for channel in APART.tolist():
        eight = UniformQuantizer(8, symmetric=main.signed).fit(x[..., channel])
        assert torch.equal(y[..., channel], eight(x[..., channel]))


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.sampled_from([1.0, 30.0, 1e4]))
def test_fake_quantization_is_dequantized_integers(kind: str, seed: int, factor: float) -> None:
    quantizer = OutlierQuantizer(mains()[kind], APART).fit(massive(seed, factor))
    # Also for values beyond those it was fitted on, and for other shapes.
    for x in (massive(seed + 1, 2 * factor), massive(seed, factor)[0]):
        q = quantizer.quantize(x)
        assert q.dtype == quantizer.dtype == quantizer.main.dtype
        assert q.shape == x.shape
        assert torch.equal(quantizer(x), quantizer.dequantize(q))
    rest = torch.cat([q[..., :1], q[..., 2:4], q[..., 5:]], -1)
    assert quantizer.main.qmin <= int(rest.min()) <= int(rest.max()) <= quantizer.main.qmax


def test_values_and_integers_are_left_as_they_are() -> None:
    x = massive()
    quantizer = OutlierQuantizer(mains()["log"], APART).fit(x)
    q = quantizer.quantize(x)
    before = x.clone(), q.clone()
    quantizer(x)
    quantizer.dequantize(q)
    assert torch.equal(x, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("kind", ["affine", "symmetric"])
def test_the_others_keep_their_levels(kind: str) -> None:
    x = massive(factor=1000)
    main, plain = mains()[kind], mains()[kind].fit(x)
    apart = OutlierQuantizer(main, APART).fit(x)
    others = torch.tensor([0, 2, 3, 5])

    def error(quantizer: Quantizer, channels: Tensor) -> float:
        return (quantizer(x) - x)[..., channels].square().mean().item()

    step = main.tensors()["scale"].item()
    assert step < 1.5
    assert error(apart, others) < 1.3 * step**2 / 12  # as of rounding alone
    assert error(plain, others) == pytest.approx(x[..., others].square().mean().item(), rel=0.01)  # all rounded to zero
    assert error(apart, APART) < error(plain, APART) / 50  # 8 bits instead of 4 or 3


def test_errors_count_by_their_importance() -> None:
    """One large value in channel 0 sets the range, unless it does not count."""
    x = torch.tensor([[1.0, 500.0, 0.01]]).repeat(50, 1)
    x[0, 0] = 30.0
    importance = torch.ones(50, 1)
    importance[0] = 0
    plain = OutlierQuantizer(UniformQuantizer(2, symmetric=True, search=MSE()), torch.tensor([1]))
    assert plain.fit(x)(x)[0, 0].item() == pytest.approx(30.0, rel=0.05)
    assert plain.fit(x, importance)(x)[0, 0].item() == pytest.approx(1.0, rel=0.2)


def test_the_gradient_is_zero_where_clipped() -> None:
    quantizer = OutlierQuantizer(UniformQuantizer(4, symmetric=False), torch.tensor([1]))
    quantizer.fit(torch.tensor([[0.0, 0.0], [1.0, 100.0]]))
    x = torch.tensor([[0.5, 50.0], [1.5, 150.0], [-1.0, 99.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_any_search_may_try_other_parameters() -> None:
    x = massive()
    quantizer = OutlierQuantizer(mains()["affine"], APART).fit(x)
    y = quantizer(x)
    alone = mains()["affine"].fit(x[..., [0, 2, 3, 5]])
    candidates = quantizer.candidates(x)
    assert len(candidates) == len(alone.candidates(x[..., [0, 2, 3, 5]]))
    assert len(quantizer.neighbours(0.1)) == len(alone.neighbours(0.1))
    for candidate in (candidates[-1], quantizer.neighbours(0.1)[0]):
        other = OutlierQuantizer(mains()["affine"]).load_tensors(candidate)
        assert torch.equal(other(x)[..., APART], y[..., APART])
        assert not torch.equal(other(x), y)


# --- kept and built again


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_json(kind: str) -> None:
    x = massive()
    quantizer = OutlierQuantizer(mains()[kind], APART)
    description = json.loads(json.dumps(quantizer.describe()))
    assert build(description).describe() == quantizer.describe()
    assert not quantizer.fitted
    quantizer.fit(x)
    assert quantizer.fitted
    again = build(description, {name: tensor.clone() for name, tensor in quantizer.tensors().items()})
    assert isinstance(again, OutlierQuantizer)
    assert torch.equal(again.quantize(x), quantizer.quantize(x))
    assert torch.equal(again(x), quantizer(x))
    assert again.bits == quantizer.bits


def test_tensors_are_those_of_both_parts_and_copied() -> None:
    channels = APART.clone()
    quantizer = OutlierQuantizer(mains()["affine"], channels).fit(massive())
    channels.fill_(0)
    tensors = quantizer.tensors()
    assert set(tensors) == {"channels", "main_scale", "main_zero_point", "apart_scale", "apart_zero_point"}
    assert tensors["channels"].tolist() == [1, 4]
    assert tensors["apart_scale"].shape == (2,)
    given_ = {name: tensor.clone() for name, tensor in tensors.items()}
    again = OutlierQuantizer(mains()["affine"]).load_tensors(given_)
    given_["channels"].fill_(0)
    given_["apart_scale"].fill_(9)
    assert torch.equal(again(massive()), quantizer(massive()))


def test_half_precision_of_a_model_leaves_the_parameters() -> None:
    quantizer = OutlierQuantizer(mains()["affine"], APART).fit(massive())
    before = {name: tensor.clone() for name, tensor in quantizer.tensors().items()}
    after = quantizer.half().tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert quantizer(massive().half()).dtype == torch.float16


# --- bad input


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        (torch.tensor([], dtype=torch.int64), r"with K at least 1, not torch\.int64 of shape \[0\]"),
        (torch.tensor(3), r"of shape \[K\] .* not torch\.int64 of shape \[\]"),
        (torch.tensor([0.0, 1.0]), "must be int64, .* not torch.float32"),
        (torch.tensor([1, 2], dtype=torch.int32), "must be int64, .* not torch.int32"),
        (torch.tensor([2, 1]), r"ascending and not negative, not \[2, 1\]"),
        (torch.tensor([1, 1]), r"ascending and not negative, not \[1, 1\]"),
        (torch.tensor([-1, 1]), r"ascending and not negative, not \[-1, 1\]"),
    ],
)
def test_channels_that_cannot_be_right(channels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OutlierQuantizer(UniformQuantizer(4, symmetric=True), channels)
    fitted = OutlierQuantizer(UniformQuantizer(4, symmetric=True), APART).fit(massive())
    with pytest.raises(ValueError, match=said):
        OutlierQuantizer(UniformQuantizer(4, symmetric=True)).load_tensors(fitted.tensors() | {"channels": channels})


def test_a_main_quantizer_that_has_ranges_per_channel_is_refused() -> None:
    for main in (
        UniformQuantizer(4, symmetric=True, granularity=PerAxis(-1)),
        OutlierQuantizer(UniformQuantizer(4, symmetric=True)),
    ):
        with pytest.raises(ValueError, match="only from a quantizer with one range for all others"):
            OutlierQuantizer(main, APART)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("channels"), "has the tensors channels, main_... and apart_..., not apart_scale, main_scale"),
        (lambda t: t.update(scale=torch.ones(1)), "not apart_scale, channels, main_scale, scale"),
        (lambda t: t.pop("main_scale"), "a symmetric UniformQuantizer has the tensors scale, not none"),
        (lambda t: t.update(main_scale=torch.ones(2)), "per tensor has one scale, not 2"),
        (lambda t: t.update(apart_scale=torch.ones(3)), "2 channels apart need a scale each"),
        (lambda t: t.update(apart_scale=torch.tensor([1.0, 0.0])), "positive and finite"),
    ],
)
def test_tensors_that_cannot_be_right(change: Any, said: str) -> None:
    tensors = OutlierQuantizer(UniformQuantizer(4, symmetric=True), APART).fit(massive()).tensors()
    change(tensors)
    with pytest.raises(ValueError, match=said):
        OutlierQuantizer(UniformQuantizer(4, symmetric=True)).load_tensors(tensors)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"type": "outliers"}, "'outliers' quantizer has wrong keys; missing: main"),
        ({"type": "outliers", "main": None}, "is a dictionary, not NoneType"),
        ({"type": "outliers", "main": {"type": "outliers", "main": {}}}, "a quantizer that keeps none apart itself"),
        ({"type": "outliers", "main": {"type": "cubic"}}, "no quantizer type 'cubic'"),
    ],
)
def test_descriptions_that_cannot_be_right(description: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(description)


def test_values_that_cannot_be_quantized() -> None:
    quantizer = OutlierQuantizer(UniformQuantizer(4, symmetric=True), APART)
    with pytest.raises(RuntimeError, match="not fitted"):
        quantizer(massive())
    with pytest.raises(RuntimeError, match="say which channels are apart"):
        OutlierQuantizer(UniformQuantizer(4, symmetric=True)).fit(massive())
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer.fit(massive() / 0)
    with pytest.raises(ValueError, match=r"integers are torch\.int8"):
        quantizer.fit(massive()).dequantize(torch.zeros(2, 6))


def test_the_error_is_that_of_an_independent_computation() -> None:
    x = massive(3)
    y = OutlierQuantizer(UniformQuantizer(4, symmetric=False), APART).fit(x)(x).numpy()
    values = x.numpy().astype(np.float64)
    others = np.delete(values, APART.numpy(), axis=-1)
    expected = np.empty_like(values)
    for channel in range(6):
        own = values[..., channel] if channel in APART else others
        bits = 8 if channel in APART else 4
        low, high = min(own.min(), 0), max(own.max(), 0)
        scale = (high - low) / (2**bits - 1)
        codes = np.clip(np.round(values[..., channel] / scale) + np.round(-low / scale), 0, 2**bits - 1)
        expected[..., channel] = (codes - np.round(-low / scale)) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
