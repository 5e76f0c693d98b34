"""Rounding that makes up for its errors: against formulas in numpy, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dfq.ptq.compensate import SecondMoment, round_compensated
from quantizers import PerAxis, PerGroup, Quantizer, UniformQuantizer


def correlated(images: int = 40, tokens: int = 20, channels: int = 24, seed: int = 0) -> Tensor:
    """[B, N, C], eight directions that carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, channels, generator=torch.Generator().manual_seed(99))
    low = torch.randn(images, tokens, 8, generator=generator) @ mixing
    return low + 0.1 * torch.randn(images, tokens, channels, generator=generator)


def weights(out: int = 16, channels: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(out, channels, generator=torch.Generator().manual_seed(seed))


def per_channel(weight: Tensor, bits: int, *, symmetric: bool = False) -> UniformQuantizer:
    return UniformQuantizer(bits, symmetric=symmetric, granularity=PerAxis(0)).fit(weight)


def moment_of(x: Tensor, evenness: float = 0.0, batch_size: int = 16) -> SecondMoment:
    moment = SecondMoment(evenness)
    for batch in x.split(batch_size):
        moment.add(batch)
    return moment


def output_error(x: Tensor, weight: Tensor, quantizer: Quantizer, integers: Tensor) -> float:
    return (x @ (quantizer.dequantize(integers) - weight).T).square().mean().item()


# --- the second moment


@pytest.mark.parametrize("evenness", [0.0, 0.5, 1.0])
def test_the_second_moment(evenness: float) -> None:
    x = correlated(images=7)
    x[:, 3] *= 50
    rows = x.double().numpy().reshape(-1, 24)
    weight = np.linalg.norm(rows, axis=1) ** (-2 * evenness)
    expected = np.einsum("t,ti,tj->ij", weight, rows, rows) / len(rows)
    np.testing.assert_allclose(
        moment_of(x, evenness, 3).values(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_tokens_count_by_their_importance_too() -> None:
    x = correlated(images=7)
    importance = torch.rand(7, 20, generator=torch.Generator().manual_seed(5))
    moment = SecondMoment(0.5, importance.split(3))
    for batch in x.split(3):
        moment.add(batch)
    rows, counts = x.double().numpy().reshape(-1, 24), importance.double().numpy().reshape(-1)
    expected = np.einsum("t,ti,tj->ij", counts / np.linalg.norm(rows, axis=1), rows, rows) / len(rows)
    np.testing.assert_allclose(moment.values(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_even_tokens_count_alike_by_hand() -> None:
    moment = SecondMoment(1.0)
    moment.add(torch.tensor([[[3.0, 4.0], [600.0, 800.0]]]))  # both in the direction (0.6, 0.8)
    torch.testing.assert_close(moment.values(), torch.tensor([[0.36, 0.48], [0.48, 0.64]]))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11])
def test_every_fourth_image_is_held_out_however_they_come(batch_size: int) -> None:
    x = correlated(images=11)
    seen, held_out = moment_of(x, batch_size=batch_size).split()
    chosen = [3, 7]
    others = [index for index in range(11) if index not in chosen]
    for moment, images in ((seen, others), (held_out, chosen)):
        rows = x[images].double().numpy().reshape(-1, 24)
        np.testing.assert_allclose(moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-3)


def test_of_less_than_four_images_none_is_held_out() -> None:
    moment = moment_of(correlated(images=3))
    seen, held_out = moment.split()
    assert torch.equal(seen, moment.values())
    assert torch.equal(held_out, moment.values())


def test_tokens_of_zeros_are_no_trouble() -> None:
    moment = SecondMoment(1.0)
    moment.add(torch.zeros(2, 3, 4))
    moment.add(torch.ones(2, 3, 4))
    torch.testing.assert_close(moment.values(), torch.full((4, 4), 0.25 / 2))


def test_a_layer_nothing_entered_is_an_error_of_the_program() -> None:
    with pytest.raises(RuntimeError, match="no activation passed"):
        SecondMoment(0.5).values()
    with pytest.raises(RuntimeError, match="no activation passed"):
        SecondMoment(0.5).split()


# --- rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_error_is_less_than_of_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    x, weight = correlated(), weights()
    quantizer = per_channel(weight, bits, symmetric=symmetric)
    before = weight.clone()
    integers, damping = round_compensated(weight, quantizer, moment_of(x), [0.01])
    assert damping == 0.01
    assert integers.dtype == quantizer.dtype
    assert integers.shape == weight.shape
    assert quantizer.qmin <= int(integers.min()) <= int(integers.max()) <= quantizer.qmax
    nearest = quantizer.quantize(weight)
    assert output_error(x, weight, quantizer, integers) < 0.5 * output_error(x, weight, quantizer, nearest)
    # It is bought with the error of the weights themselves.
    assert (quantizer.dequantize(integers) - weight).norm() > (quantizer.dequantize(nearest) - weight).norm()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("size", [5, 8])
def test_in_groups_each_column_is_rounded_on_the_grid_of_its_own(size: int) -> None:
    x, weight = correlated(), weights() * torch.linspace(0.1, 3, 24)
    quantizer = UniformQuantizer(4, symmetric=False, granularity=PerGroup(size)).fit(weight)
    integers, _ = round_compensated(weight, quantizer, moment_of(x), [0.01])
    nearest = output_error(x, weight, quantizer, quantizer.quantize(weight))
    assert output_error(x, weight, quantizer, integers) < 0.5 * nearest
    # Where no column says anything of another, nothing is to be made up for.
    integers, _ = round_compensated(weight, quantizer, moment_of(24**0.5 * torch.eye(24)[:, None]), [0.01])
    assert torch.equal(integers, quantizer.quantize(weight))


def test_one_group_to_a_row_is_a_channel() -> None:
    x, weight = correlated(), weights()
    grouped = UniformQuantizer(4, symmetric=False, granularity=PerGroup(24)).fit(weight)
    by_channel = per_channel(weight, 4).load_tensors(grouped.tensors())
    found, expected = (round_compensated(weight, each, moment_of(x), [0.01])[0] for each in (grouped, by_channel))
    assert torch.equal(found, expected)


def test_more_columns_than_are_rounded_at_once() -> None:
    """The columns of a later part of the matrix hear of the errors in an earlier one."""
    channels = 150
    x, weight = correlated(channels=channels), weights(channels=channels)
    quantizer = per_channel(weight, 4)
    integers, _ = round_compensated(weight, quantizer, moment_of(x), [0.01])
    nearest = output_error(x, weight, quantizer, quantizer.quantize(weight))
    assert output_error(x, weight, quantizer, integers) < 0.2 * nearest


def test_against_the_optimal_brain_surgeon_column_by_column() -> None:
    """OBS (Hassibi & Stork, 1993), with the inverse of what is left of the Hessian taken anew for every column."""
    x, weight = correlated(channels=9), weights(out=3, channels=9)
    quantizer = per_channel(weight, 3)
    moment, damping = moment_of(x), 0.05
    hessian = moment.values().double().numpy()
    hessian += damping * np.trace(hessian) / 9 * np.eye(9)
    remaining, left = weight.double().numpy().copy(), list(np.argsort(-np.diag(hessian), kind="stable"))
    expected = np.zeros(weight.shape)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        values = torch.from_numpy(remaining[:, column : column + 1]).float()
        expected[:, column] = quantizer.quantize(values)[:, 0]
        error = remaining[:, column] - quantizer(values)[:, 0].double().numpy()
        remaining[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        left = left[1:]
    integers, _ = round_compensated(weight, quantizer, moment, [damping])
    np.testing.assert_array_equal(integers.numpy(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_where_inputs_are_uncorrelated_it_rounds_to_nearest(symmetric: bool) -> None:
    moment = SecondMoment(0.0)
    moment.add(torch.eye(24).expand(4, 24, 24) * 3)
    weight = weights()
    quantizer = per_channel(weight, 4, symmetric=symmetric)
    integers, _ = round_compensated(weight, quantizer, moment, [0.1])
    assert torch.equal(integers, quantizer.quantize(weight))


def test_a_single_column() -> None:
    weight = weights(channels=1)
    quantizer = UniformQuantizer(3, symmetric=False).fit(weight)
    integers, _ = round_compensated(weight, quantizer, moment_of(correlated(channels=1)), [0.1, 1.0])
    assert torch.equal(integers, quantizer.quantize(weight))


def test_channels_that_are_never_used_are_rounded_to_nearest() -> None:
    x, weight = correlated(), weights()
    dead = [0, 5, 23]
    x[..., dead] = 0
    quantizer = per_channel(weight, 3)
    integers, _ = round_compensated(weight, quantizer, moment_of(x), [0.0])
    assert torch.equal(integers[:, dead], quantizer.quantize(weight)[:, dead])
    used = [channel for channel in range(24) if channel not in dead]
    alone, _ = round_compensated(weight[:, used], quantizer, moment_of(x[..., used]), [0.0])
    assert (integers[:, used] == alone).float().mean() > 0.98  # but for the damping that the dead ones need


def test_nothing_but_zeros_went_in() -> None:
    weight = weights()
    quantizer = per_channel(weight, 3)
    integers, _ = round_compensated(weight, quantizer, moment_of(torch.zeros(4, 5, 24)), [0.1])
    assert torch.equal(integers, quantizer.quantize(weight))


def test_an_output_without_weights_stays_without() -> None:
    weight = weights()
    weight[3] = 0
    quantizer = per_channel(weight, 4)
    integers, _ = round_compensated(weight, quantizer, moment_of(correlated()), [0.01])
    assert bool((quantizer.dequantize(integers)[3] == 0).all())


# --- the damping


def test_the_damping_is_chosen_by_images_it_has_not_seen() -> None:
    """Fewer rows than channels: without damping their noise is fitted. On plenty of rows none is needed."""
    weight = weights(out=64, channels=48)
    quantizer = per_channel(weight, 3)
    dampings = (1e-5, 0.3)
    few = torch.randn(8, 4, 48, generator=torch.Generator().manual_seed(3))
    _, damping = round_compensated(weight, quantizer, moment_of(few), dampings)
    assert damping == 0.3
    _, damping = round_compensated(weight, quantizer, moment_of(correlated(images=400, channels=48)), dampings)
    assert damping == 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chosen_damping_has_the_least_error_on_held_out_images(seed: int) -> None:
    x, weight = correlated(images=12, tokens=3, seed=seed), weights(seed=seed)
    quantizer = per_channel(weight, 3)
    dampings = [1e-4, 1e-2, 1.0, 30.0]
    held_out = torch.arange(12) % 4 == 3
    errors = []
    for damping in dampings:
        integers, _ = round_compensated(weight, quantizer, moment_of(x[~held_out]), [damping])
        errors.append(output_error(x[held_out], weight, quantizer, integers))
    integers, chosen = round_compensated(weight, quantizer, moment_of(x), dampings)
    assert len(set(errors)) > 1
    assert errors[dampings.index(chosen)] == min(errors)
    # The integers then are those of all images.
    assert torch.equal(integers, round_compensated(weight, quantizer, moment_of(x), [chosen])[0])


def test_much_damping_is_rounding_to_nearest() -> None:
    weight = weights()
    quantizer = per_channel(weight, 4)
    integers, _ = round_compensated(weight, quantizer, moment_of(correlated()), [1e7])
    assert torch.equal(integers, quantizer.quantize(weight))
