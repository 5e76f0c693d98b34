from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.ptq import search
from dfq.ptq.modules import QuantizedConv2d
from dfq.ptq.search import convolution_rows, fisher_logit_gradient, search_product
from quantizers import (
    MSE,
    Granularity,
    LogQuantizer,
    PerAxis,
    PerTensor,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(fit_on: Tensor, granularity: Granularity = PerTensor(), bits: int = 3) -> UniformQuantizer:  # noqa: B008
    return UniformQuantizer(bits, symmetric=False, granularity=granularity, search=MSE()).fit(fit_on)


def channel_errors(
    x: Tensor, w: Tensor, x_quantizer: Quantizer | None, w_quantizer: Quantizer | None, weight: Tensor | None = None
) -> np.ndarray:
    """Squared error of `x @ w^T` in each output channel, summed in float64."""
    x_hat, w_hat = (
        (values if quantizer is None else quantizer(values)).double().numpy()
        for values, quantizer in ((x, x_quantizer), (w, w_quantizer))
    )
    squares = (x_hat @ w_hat.T - x.double().numpy() @ w.double().numpy().T) ** 2
    return np.asarray((squares if weight is None else squares * weight.double().numpy()).sum(0))


# The largest inputs meet the smallest weights: how much an error counts cannot be told from one operand.
CHANNELS = torch.logspace(0.7, -0.7, 24)
X = draw(300, 24).pow(3) * CHANNELS
W = draw(10, 24, seed=1) / CHANNELS
WEIGHT = draw(300, 10, seed=2).square()


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_the_error_of_a_linear_layer_becomes_less(sides: str, weight: Tensor | None) -> None:
    x_quantizer = affine(X) if sides != "right" else None
    w_quantizer = affine(W, PerAxis(0)) if sides != "left" else None
    before = channel_errors(X, W, x_quantizer, w_quantizer, weight)
    search_product(X, W, x_quantizer, w_quantizer, weight)
    after = channel_errors(X, W, x_quantizer, w_quantizer, weight)
    assert after.sum() < 0.95 * before.sum()
    if sides == "right":
        assert (after <= before * (1 + 1e-5)).all()


def test_more_rounds_are_never_worse() -> None:
    errors = []
    for rounds in (1, 2, 3):
        quantizers = affine(X), affine(W, PerAxis(0))
        search_product(X, W, *quantizers, rounds=rounds)
        errors.append(channel_errors(X, W, *quantizers).sum())
    assert errors[1] <= errors[0] * (1 + 1e-5)
    assert errors[2] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_of_all_exponents_the_one_with_the_least_output_error_is_found(weight: Tensor | None) -> None:
    x = F.gelu(X)
    quantizer = TwinUniformQuantizer(4, split="sign").fit(x)
    search_product(x, W, quantizer, None, weight)
    every = []
    for exponent in quantizer.exponents:
        other = TwinUniformQuantizer(4, split="sign").load_tensors({"exponent": torch.tensor([exponent])})
        every.append(channel_errors(x, W, other, None, weight).sum())
    assert channel_errors(x, W, quantizer, None, weight).sum() == pytest.approx(min(every), rel=1e-5)


def test_each_output_channel_finds_what_it_would_find_alone() -> None:
    together = affine(W, PerAxis(0))
    alone = [copy.deepcopy(together) for _ in W]
    search_product(X, W, None, together, WEIGHT)
    for channel, quantizer in enumerate(alone):
        part = slice(channel, channel + 1)
        quantizer.load_tensors({name: tensor[part] for name, tensor in quantizer.tensors().items()})
        search_product(X, W[part], None, quantizer, WEIGHT[:, part])
        torch.testing.assert_close(quantizer(W[part]), together(W)[part])


def test_each_head_finds_what_it_would_find_alone() -> None:
    q, k = draw(2, 3, 7, 8).pow(3), draw(2, 3, 9, 8, seed=1) * torch.logspace(0, -2, 8)
    quantizers = affine(q, PerAxis(1)), affine(k, PerAxis(1))
    alone = [[copy.deepcopy(quantizer) for quantizer in quantizers] for _ in range(3)]
    search_product(q, k, *quantizers, rounds=2)
    for head, pair in enumerate(alone):
        part = slice(head, head + 1)
        for quantizer in pair:
            quantizer.load_tensors({name: tensor[part] for name, tensor in quantizer.tensors().items()})
        search_product(q[:, part], k[:, part], *pair, rounds=2)
        torch.testing.assert_close(pair[0](q[:, part]), quantizers[0](q)[:, part])
        torch.testing.assert_close(pair[1](k[:, part]), quantizers[1](k)[:, part])


def test_input_channels_share_their_outputs_and_so_their_candidate() -> None:
    quantizer = affine(X, PerAxis(-1))
    fitted = quantizer.tensors()["scale"].clone()
    before = channel_errors(X, W, quantizer, None).sum()
    search_product(X, W, quantizer, None)
    assert channel_errors(X, W, quantizer, None).sum() <= before
    assert quantizer.tensors()["scale"].shape == fitted.shape == (24,)


def test_softmax_times_v_takes_v_as_it_is() -> None:
    probabilities = (draw(2, 3, 11, 13) * 4).softmax(-1)
    v = draw(2, 3, 13, 8, seed=1).pow(3)
    flat, mirrored = (LogQuantizer(3, base="search").fit(probabilities) for _ in range(2))
    for granularity, of_transposed in ((PerAxis(1), PerAxis(1)), (PerAxis(-1), PerAxis(-2))):
        v_quantizer, same = affine(v, granularity), affine(v.mT, of_transposed)
        before = (flat(probabilities) @ v_quantizer(v) - probabilities @ v).square().sum()
        search_product(probabilities, v, flat, v_quantizer, transpose_right=False)
        search_product(probabilities, v.mT, mirrored, same)
        after = (flat(probabilities) @ v_quantizer(v) - probabilities @ v).square().sum()
        assert after < before
        torch.testing.assert_close(same(v.mT).mT, v_quantizer(v))
        torch.testing.assert_close(mirrored(probabilities), flat(probabilities))


def test_a_channel_of_v_finds_what_it_would_find_alone() -> None:
    probabilities, v = (draw(2, 1, 11, 13) * 4).softmax(-1), draw(2, 1, 13, 4, seed=1).pow(3)
    together = affine(v, PerAxis(-1))
    alone = affine(v[..., 2:3])
    search_product(probabilities, v, None, together, transpose_right=False)
    search_product(probabilities, v[..., 2:3], None, alone, transpose_right=False)
    torch.testing.assert_close(alone(v[..., 2:3]), together(v)[..., 2:3])


def test_outputs_of_more_weight_are_served_better() -> None:
    favoured = torch.arange(300)[:, None] < 150
    small = X * torch.where(favoured, 0.1, 1.0)
    plain, weighted = affine(small), affine(small)
    search_product(small, W, plain, None)
    search_product(small, W, weighted, None, favoured.float().expand(300, 10))
    errors = [channel_errors(small[:150], W, quantizer, None).sum() for quantizer in (plain, weighted)]
    assert errors[1] < 0.7 * errors[0]


def test_only_the_ratios_of_weights_count() -> None:
    found = []
    for factor in (1.0, 1e-36):
        quantizers = affine(X), affine(W, PerAxis(0))
        search_product(X, W, *quantizers, WEIGHT * factor)
        found.append([quantizer.tensors()["scale"] for quantizer in quantizers])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_weights_that_are_all_zero_leave_what_was_fitted() -> None:
    quantizer = affine(X)
    before = quantizer.tensors()["scale"].clone()
    search_product(X, W, quantizer, None, torch.zeros(300, 10))
    assert torch.equal(quantizer.tensors()["scale"], before)


def test_it_does_not_depend_on_how_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(5, 3, 7, 8).pow(3), draw(5, 3, 9, 8, seed=1)
    errors = []
    for budget in (1, 500, 10**9):
        monkeypatch.setattr(search, "_chunk_elements", lambda device, budget=budget: budget)
        linear = affine(X), affine(W, PerAxis(0))
        search_product(X, W, *linear, WEIGHT)
        heads = affine(q, PerAxis(1)), affine(k)
        search_product(q, k, *heads)
        attention = (heads[0](q) @ heads[1](k).mT - q @ k.mT).square().sum().item()
        errors.append((channel_errors(X, W, *linear, WEIGHT).sum(), attention))
    np.testing.assert_allclose(errors[1:], errors[:1] * 2, rtol=1e-4)


def test_unfitted_quantizers_are_fitted_first() -> None:
    quantizers = [
        (UniformQuantizer(4, symmetric=True), UniformQuantizer(4, symmetric=True, granularity=PerAxis(0))) for _ in "ab"
    ]
    quantizers[1][0].fit(X)
    quantizers[1][1].fit(W)
    for pair in quantizers:
        search_product(X, W, *pair)
    torch.testing.assert_close(quantizers[0][0](X), quantizers[1][0](X))
    torch.testing.assert_close(quantizers[0][1](W), quantizers[1][1](W))


def test_what_does_not_fit_together_is_refused() -> None:
    quantizer = affine(X)
    with pytest.raises(ValueError, match=r"\[300, 24\] and \[24, 10\] have no product left @ right\^T"):
        search_product(X, W.T, quantizer, None)
    with pytest.raises(ValueError, match=r"\[300, 24\] and \[10, 24\] have no product left @ right$"):
        search_product(X, W, quantizer, None, transpose_right=False)
    with pytest.raises(ValueError, match="have no product"):
        search_product(X.view(3, 100, 24), W, quantizer, None)
    with pytest.raises(ValueError, match=r"weight has shape \[300, 1\], and the product \[300, 10\]"):
        search_product(X, W, quantizer, None, WEIGHT[:, :1])
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        search_product(X, W, quantizer, None, rounds=0)


@pytest.mark.parametrize("options", [{"stride": 4}, {"stride": 2, "padding": 1, "dilation": 2}])
def test_a_convolution_is_a_product_of_its_rows(options: dict[str, int]) -> None:
    layer = QuantizedConv2d(nn.Conv2d(3, 5, (4, 2), bias=False, **options))
    x = draw(2, 3, 13, 12)
    expected = layer(x).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(convolution_rows(x, layer) @ layer.weight.flatten(1).T, expected)


def test_convolutions_that_are_not_one_product_are_refused() -> None:
    x = draw(1, 4, 8, 8)
    with pytest.raises(ValueError, match="2 groups"):
        convolution_rows(x, QuantizedConv2d(nn.Conv2d(4, 4, 3, groups=2)))
    with pytest.raises(ValueError, match="padding 'same'"):
        convolution_rows(x, QuantizedConv2d(nn.Conv2d(4, 4, 3, padding="same")))


def test_the_covariance_of_logit_gradients_is_the_fisher_information_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0])
    gradient = fisher_logit_gradient(logits.expand(200_000, 4), torch.Generator().manual_seed(0)).double().numpy()
    p = np.exp(logits.double().numpy())
    p /= p.sum()
    np.testing.assert_allclose(gradient.mean(0), 0, atol=3e-3)
    np.testing.assert_allclose(np.cov(gradient.T), np.diag(p) - np.outer(p, p), atol=2e-3)


def test_logit_gradients_are_drawn_from_the_generator_and_sum_to_zero() -> None:
    logits = draw(3, 50).requires_grad_()
    first, again = (fisher_logit_gradient(logits, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    torch.testing.assert_close(first.sum(-1), torch.zeros(3), rtol=0, atol=1e-6)
    # A prediction without doubt tells nothing about the layers before it.
    assert fisher_logit_gradient(torch.tensor([[100.0, 0.0]]), torch.Generator()).abs().max() < 1e-6
