"""A classifier in closed form, against numbers worked out by hand and least squares from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm import create_model

from dfq.transfer.ridge import classifier_of, ends_in_layer_norm


def test_one_feature_by_hand() -> None:
    """Features 1 and 3 about their mean are -1 and 1, second moment 2; the logits' difference about theirs -1 and 1."""
    features = torch.tensor([[1.0], [3.0]])
    logits = torch.tensor([[5.0, 5.0], [9.0, 7.0]])
    # Without what both classes have in common: 0, 0 and 1, -1, of mean 0.5, -0.5. Half of 2 is added to the moment.
    weight, bias = classifier_of(features, logits, 0.5, "pool")
    assert weight.flatten().tolist() == pytest.approx([1 / 3, -1 / 3])
    # At the mean, 2, the logits' own mean.
    assert bias.tolist() == pytest.approx([0.5 - 2 / 3, -0.5 + 2 / 3])
    weight, bias = classifier_of(features, logits, 0.5, "origin")
    assert weight.flatten().tolist() == pytest.approx([1 / 3, -1 / 3])
    assert bias.tolist() == [0.0, 0.0]


def test_without_shrinkage_it_is_least_squares() -> None:
    rng = np.random.default_rng(0)
    features, logits = rng.normal(1.0, 2.0, (50, 4)), rng.normal(0.0, 1.0, (50, 3))
    centred = logits - logits.mean(1, keepdims=True)
    expected, *_ = np.linalg.lstsq(np.c_[features, np.ones(50)], centred, rcond=None)
    weight, bias = classifier_of(torch.tensor(features), torch.tensor(logits), 0.0, "pool")
    np.testing.assert_allclose(weight.T, expected[:4], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias, expected[4], rtol=1e-4, atol=1e-6)


def test_features_that_say_nothing() -> None:
    """All alike, or fewer pictures than features: a classifier all the same, and a finite one."""
    for features in (torch.ones(4, 3), torch.zeros(4, 3), torch.eye(8)[:2]):
        weight, bias = classifier_of(features, torch.randn(len(features), 2), 0.0, "pool")
        assert bool(weight.isfinite().all())
        assert bool(bias.isfinite().all())


def test_the_origin_is_where_what_all_images_share_does_not_count() -> None:
    """Logits linear in the features but for a shift that made images have in common: it is not learned."""
    torch.manual_seed(0)
    true = torch.randn(3, 5)
    true -= true.mean(0)
    real = torch.randn(400, 5)
    shift_in, shift_out = 10 * torch.randn(5), 10 * torch.randn(3)
    made = torch.randn(400, 5)
    weight, bias = classifier_of(made + shift_in, made @ true.T + shift_out, 1e-6, "origin")
    same = (real @ weight.T + bias).argmax(1) == (real @ true.T).argmax(1)
    assert same.float().mean() > 0.99
    weight, bias = classifier_of(made + shift_in, made @ true.T + shift_out, 1e-6, "pool")
    same = (real @ weight.T + bias).argmax(1) == (real @ true.T).argmax(1)
    assert same.float().mean() < 0.9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", True),
        ("swin_tiny_patch4_window7_224", True),
        ("convnext_atto", True),
        ("resnet10t", False),
        ("mobilenetv3_small_050", False),
    ],
)
def test_whose_features_a_layer_norm_gives(name: str, expected: bool) -> None:
    assert ends_in_layer_norm(create_model(name, pretrained=False)) is expected
