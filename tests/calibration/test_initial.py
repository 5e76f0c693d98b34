from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from calibration.errors import DfqError
from calibration.initial import (
    INITIAL,
    InitialImages,
    _foremost,
    _Leaves,
    _scatter,
    dead_leaves,
    initial_images,
    pink_noise,
    white_noise,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
Array = NDArray[np.float64]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def light(images: Tensor) -> Array:
    """[B, H, W], each of zero mean."""
    x = images.double().mean(1)
    centred: Array = (x - x.mean(dim=(1, 2), keepdim=True)).numpy()
    return centred


def spectral_slope(images: Tensor, low: float, high: float) -> float:
    """Exponent of the radially averaged power between two frequencies, in cycles per pixel."""
    x = light(images)
    power = (np.abs(np.fft.fft2(x)) ** 2).mean(0).ravel()
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(side) for side in x.shape[1:]), indexing="ij")).ravel()
    rings = np.digitize(frequency, np.linspace(low, high, 21))
    points = [(np.log(frequency[rings == k].mean()), np.log(power[rings == k].mean())) for k in range(1, 21)]
    return float(stats.linregress(*zip(*points, strict=True)).slope)


def kurtosis_of_differences(images: Tensor) -> float:
    """Of horizontally neighbouring pixels, median over images; 3 for a Gaussian."""
    differences = np.diff(light(images), axis=-1).reshape(len(images), -1)
    return float(np.median(stats.kurtosis(differences, axis=1, fisher=False)))


@pytest.fixture(scope="module", params=[pink_noise, dead_leaves])
def images(request: pytest.FixtureRequest) -> Tensor:
    made: Tensor = request.param(48, (96, 96), seeded())
    return made


def test_noise_is_what_torch_draws() -> None:
    expected = torch.randn(3, 3, 16, 24, generator=seeded(5))
    assert torch.equal(white_noise(3, (16, 24), seeded(5)), expected)
    assert torch.equal(initial_images("noise", 3, (16, 24), seeded(5), MEAN, STD), expected)
    assert abs(float(white_noise(8, (32, 32), seeded()).std()) - 1) < 0.02


@pytest.mark.parametrize(("kind", "make"), [("pink", pink_noise), ("leaves", dead_leaves)])
def test_procedural_pixels_are_normalised(kind: str, make: InitialImages) -> None:
    pixels = make(2, (32, 48), seeded(5)).numpy()
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        made = initial_images(kind, 2, (32, 48), seeded(5), MEAN, STD)[:, channel].numpy()
        np.testing.assert_allclose(made, (pixels[:, channel] - mean) / std, atol=1e-5)


def test_an_unknown_kind() -> None:
    assert tuple(INITIAL) == ("noise", "pink", "leaves")
    with pytest.raises(DfqError, match=r"^unknown initial images 'grey': choose from noise, pink, leaves$"):
        initial_images("grey", 1, (32, 32), seeded(), MEAN, STD)


@pytest.mark.parametrize("make", [pink_noise, dead_leaves])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (32, 160), (288, 64)])
def test_pixels_of_any_size(make: InitialImages, size: tuple[int, int]) -> None:
    made = make(3, size, seeded(1))
    assert made.shape == (3, 3, *size)
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    assert made.min() >= 0
    assert made.max() <= 1
    assert (made.std(dim=(2, 3)) > 0.01).all()


@pytest.mark.parametrize("make", [pink_noise, dead_leaves])
def test_images_hang_on_the_generator_alone(make: InitialImages) -> None:
    generator = seeded(3)
    torch.manual_seed(1)
    first, second = make(2, (32, 32), generator), make(2, (32, 32), generator)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(make(2, (32, 32), seeded(3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (second, make(2, (32, 32), seeded(4)), first.flip(0)):
        assert (other - first).abs().mean() > 0.02


def test_light_and_contrast_are_those_of_photographs(images: Tensor) -> None:
    """ImageNet's published mean and deviation are about 0.45 and 0.225; single images are lighter, darker, flatter."""
    means, deviations = images.mean(dim=(1, 2, 3)), images.std(dim=(2, 3)).mean(1)
    assert means.mean() == pytest.approx(0.45, abs=0.06)
    assert 0.08 < means.std() < 0.2
    assert deviations.mean() == pytest.approx(0.22, abs=0.04)
    assert 0.03 < deviations.std() < 0.1
    red, _, blue = images.mean(dim=(0, 2, 3)).tolist()
    assert 0.02 < red - blue < 0.15
    assert ((images < 0.5 / 255) | (images > 254.5 / 255)).float().mean() < 0.02


def test_colours_are_correlated_as_in_photographs(images: Tensor) -> None:
    """Correlations by hand from the published matrix [[.26, .09, .02], [.27, 0, -.05], [.27, -.09, .03]] times itself:
    red and green .0692 / sqrt(.0761 * .0754), red and blue .0627 / sqrt(.0761 * .0819), green and blue
    .0714 / sqrt(.0754 * .0819).
    """
    logits = images.double().clamp(1e-4, 1 - 1e-4).logit().flatten(2).numpy()
    found = np.mean([np.corrcoef(image) for image in logits], axis=0)
    np.testing.assert_allclose(found[np.triu_indices(3, 1)], [0.914, 0.794, 0.909], atol=0.05)


@pytest.mark.parametrize("size", [(128, 128), (64, 224)])
def test_the_power_of_pink_noise_falls_as_the_square_of_frequency(size: tuple[int, int]) -> None:
    assert spectral_slope(pink_noise(24, size, seeded()), 2 / min(size), 0.5) == pytest.approx(-2, abs=0.1)


def test_pink_noise_has_no_direction() -> None:
    """The same power at the same frequency along both axes of an oblong image."""
    x = light(pink_noise(64, (64, 192), seeded()))
    power = (np.abs(np.fft.fft2(x)) ** 2).mean(0)
    down, right = power[4:24, 0], power[0, 12:72:3]  # 4/64 = 12/192 cycles per pixel, and so on
    assert np.log(down / right).mean() == pytest.approx(0, abs=0.2)


def test_leaves_have_edges_and_noise_has_not() -> None:
    """Neighbouring pixels differ little or much: the heavy tails of photographs, where pink noise is Gaussian."""
    assert kurtosis_of_differences(pink_noise(32, (112, 112), seeded())) == pytest.approx(3, abs=1)
    assert kurtosis_of_differences(dead_leaves(32, (112, 112), seeded())) > 8


def test_the_spectrum_of_leaves_is_that_of_photographs() -> None:
    """The power of photographs has an exponent of -1.9 +- 0.4 (van der Schaaf and van Hateren 1996), faster where
    a lens or resampling took the finest detail.
    """
    assert -3 < spectral_slope(dead_leaves(48, (160, 160), seeded()), 0.0125, 0.25) < -1.6


def test_leaves_differ_from_image_to_image() -> None:
    """In how busy they are: from a few large leaves to many small ones."""
    number = torch.bincount(_scatter(64, (224, 224), seeded()).image)
    assert number.min() < 50
    assert number.max() > 800
    busy = dead_leaves(48, (96, 96), seeded()).diff(dim=-1).abs().mean(dim=(1, 2, 3))
    assert busy.quantile(0.9) > 2.5 * busy.quantile(0.1)


def test_leaves_grow_with_the_image() -> None:
    small, large = _scatter(4, (112, 160), seeded(2)), _scatter(4, (224, 320), seeded(2))
    for name in ("row", "column", "along", "across"):
        torch.testing.assert_close(2 * getattr(small, name), getattr(large, name))
    for name in ("image", "angle", "corners"):
        assert torch.equal(getattr(small, name), getattr(large, name))


def test_sizes_of_leaves_follow_the_inverse_cube() -> None:
    """Of a density ~ r^-3, a quarter lies above twice the smallest size and a sixteenth above four times."""
    leaves = _scatter(200, (224, 224), seeded())
    size = (leaves.along * leaves.across).sqrt()
    busiest = size[leaves.image == int(torch.bincount(leaves.image).argmax())]
    assert len(busiest) > 1000
    for factor in (2, 4):
        share = float((busiest > factor * busiest.min()).double().mean())
        assert share == pytest.approx(factor**-2, abs=4 * math.sqrt(factor**-2 / len(busiest)))


@pytest.mark.parametrize("size", [(32, 32), (48, 160)])
def test_leaves_cover_the_plane(size: tuple[int, int]) -> None:
    leaves = _scatter(16, size, seeded())
    seen = _foremost(leaves, 16, size)
    assert seen.shape == (16, *size)
    assert (leaves.image[seen] == torch.arange(16).view(-1, 1, 1)).all()
    ground = torch.stack([seen[k] == (leaves.image == k).nonzero()[0, 0] for k in range(16)])
    assert ground.double().mean() < 0.02
    # Nowhere more of it than elsewhere: leaves are as dense at the border as in the middle.
    assert ground[..., :4].double().mean() < 0.03


def covers(leaf: tuple[float, ...], y: Array, x: Array) -> NDArray[np.bool_]:
    """Whether points lie on the left of every side of a polygon whose first corner is in the direction `angle`."""
    row, column, along, across, angle, corners = leaf
    turns = 2 * np.pi * np.arange(corners) / corners
    u, v = along * np.cos(turns), across * np.sin(turns)
    xs, ys = column + u * np.cos(angle) - v * np.sin(angle), row + u * np.sin(angle) + v * np.cos(angle)
    inside = np.ones(y.shape, dtype=bool)
    for x0, y0, x1, y1 in zip(xs, ys, np.roll(xs, -1), np.roll(ys, -1), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inside


def test_the_leaf_in_front_is_seen() -> None:
    """Against a painter who lays leaf on leaf, each with its copies on the other side of the borders."""
    height, width, each = 19, 28, 12
    rng = np.random.default_rng(0)
    n = 2 * each
    along = rng.uniform(1, 11, n)
    values = {
        "row": rng.uniform(0, height, n),
        "column": rng.uniform(0, width, n),
        "along": along,
        "across": along * rng.uniform(0.2, 1, n),
        "angle": rng.uniform(0, 2 * np.pi, n),
        "corners": rng.choice([3, 4, 5, 32], n),
    }
    painted = np.stack([np.full((height, width), k * each) for k in range(2)])
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    for number, leaf in enumerate(zip(*values.values(), strict=True)):
        for down in (-height, 0, height):
            for right in (-width, 0, width):
                painted[number // each][covers(leaf, y + down, x + right)] = number

    image = torch.arange(2).repeat_interleave(each)
    leaves = _Leaves(image, *(torch.from_numpy(array) for array in values.values()))
    seen = _foremost(leaves, 2, (height, width)).numpy()
    assert len(np.unique(seen)) > 12
    np.testing.assert_array_equal(seen, painted)
