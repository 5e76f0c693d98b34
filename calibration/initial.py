"""Where inversion starts: white noise, or procedural images that share statistics with photographs.

Procedural images are built in logits and squashed into pixels once: next to nothing is clipped, and what is very
light or dark loses contrast as it does on film. They wrap around, as jitter rolls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.errors import DfqError

InitialImages = Callable[[int, tuple[int, int], torch.Generator], Tensor]
"""(count, (H, W), CPU generator) -> pixels [count, 3, H, W], float32 in [0, 1]."""

# A square root of the covariance of the colours of photographs, rows scaled to unit variance: light, red against
# blue, and both against green (Olah, Mordvintsev and Schubert, Feature Visualization, Distill 2017).
COLOUR = F.normalize(torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]]))
# ImageNet's mean colour, in logits; how far one image's lies from it, and the deviation of the logits within one image:
# its median and the spread of its logarithm. These give pixels the means and deviations that photographs have.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).logit()
_MEAN_SPREAD = 0.7
_CONTRAST = 1.2
_CONTRAST_SPREAD = 0.35

# These, and the numbers in `_painted`, were chosen by how well the second moments of DeiT-Tiny's and ViT-Tiny's
# activations on leaves replace those on photographs in GPTQ; the optimum is flat.
# Radii of leaves as fractions of sqrt(HW). The smallest is drawn per image: some show twenty leaves, some a thousand.
_SMALLEST = (0.015, 0.2)
_LARGEST = 1.0
# Leaves over each point, were they all discs: about three points in a thousand show the ground behind them.
_LAYERS = 8.0
_NARROWEST = 0.05
_ROUND = 32
_CORNERS = torch.tensor([3, 4, 4, 5, _ROUND, _ROUND, _ROUND])
# Points looked at together, at about 60 bytes each.
_CHUNK = 2**18


def white_noise(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 3, H, W] from N(0, 1) in the model's normalised space: where published inversions start."""
    return torch.randn(count, 3, *image_size, generator=generator)


def pink_noise(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Pixels [count, 3, H, W] of random phase whose amplitude falls as 1/f (Field, JOSA A 1987)."""
    return _exposed(_fractal(torch.ones(count), image_size, generator), generator)


def dead_leaves(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Pixels [count, 3, H, W] of opaque shapes in front of one another, their sizes r drawn from a density ~ r^-3.

    The dead leaves model (Lee, Mumford and Huang, IJCV 2001), whose images Baradad et al. (Learning to See by Looking
    at Noise, NeurIPS 2021) train on in place of photographs. Here leaves are ellipses, rectangles, triangles and
    pentagons, of 1/f texture and some with stripes; palette, roughness, sizes, slenderness and sharpness vary from
    image to image.
    """
    leaves = _scatter(count, image_size, generator)
    seen = _foremost(leaves, count, image_size)
    images = _exposed(_painted(leaves, seen, generator), generator)
    # Neither lenses nor resampling leave edges as hard as they were drawn: a binomial blur, of any strength.
    blurred = F.avg_pool2d(F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="circular"), 2, 1), 2, 1)
    return torch.lerp(images, blurred, torch.rand(count, 1, 1, 1, generator=generator))


_PROCEDURAL: dict[str, InitialImages] = {"pink": pink_noise, "leaves": dead_leaves}
INITIAL = ("noise", *_PROCEDURAL)
"""What `initial_images` can make."""


def initial_images(
    kind: str,
    count: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """`kind` (of `INITIAL`), in the model's normalised space: [count, 3, H, W].

    image_size: (H, W); generator: CPU; mean, std: of the model's preprocessing.
    Raises DfqError for an unknown kind.
    """
    if kind == "noise":
        return white_noise(count, image_size, generator)
    if kind not in _PROCEDURAL:
        raise DfqError(f"unknown initial images {kind!r}: choose from {', '.join(INITIAL)}")
    mean_, std_ = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (_PROCEDURAL[kind](count, image_size, generator) - mean_) / std_


def _coloured(independent: Tensor) -> Tensor:
    """[N, 3, ...], channels independent and of unit variance -> the same with the colour covariance of photographs."""
    return torch.einsum("cd,nd...->nc...", COLOUR, independent)


def _exposed(x: Tensor, generator: torch.Generator) -> Tensor:
    """x: [B, 3, H, W], of about zero mean and unit variance -> pixels, with a mean and contrast per image."""
    mean = _MEAN + _MEAN_SPREAD * _coloured(torch.randn(len(x), 3, generator=generator))
    contrast = _CONTRAST * (_CONTRAST_SPREAD * torch.randn(len(x), 1, 1, 1, generator=generator)).exp()
    return (mean[:, :, None, None] + contrast * x).sigmoid()


def _fractal(exponents: Tensor, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Coloured Gaussian fields whose amplitude falls as f^-exponent; exponents: [B] -> [B, 3, H, W]."""
    height, width = image_size
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    frequency[0, 0] = torch.inf
    white = torch.randn(len(exponents), 3, height, width, generator=generator)
    spectrum = torch.fft.rfft2(white) * frequency ** -exponents.view(-1, 1, 1, 1)
    field = torch.fft.irfft2(spectrum, s=(height, width))
    return _coloured(field / field.std(dim=(-2, -1), keepdim=True))


class _Leaves(NamedTuple):
    """Leaves of a batch of images, those of one image together and from back to front; all tensors [N].

    row, column: of the centre, in pixels; along >= across: half axes, in pixels; corners: `_ROUND` for an ellipse.
    """

    image: Tensor
    row: Tensor
    column: Tensor
    along: Tensor
    across: Tensor
    angle: Tensor
    corners: Tensor


def _scatter(count: int, image_size: tuple[int, int], generator: torch.Generator) -> _Leaves:
    """As many leaves as it takes to cover `count` images."""
    height, width = image_size
    side = math.sqrt(height * width)
    uniform = partial(torch.rand, generator=generator)
    low, high = _SMALLEST
    smallest = (side * low * (high / low) ** uniform(count)).clamp_min(1.0)
    ratio = smallest / (side * _LARGEST)
    mean_area = 2 * math.pi * smallest.square() * -ratio.log() / (1 - ratio.square())
    number = (_LAYERS * height * width / mean_area).ceil().long()
    image = torch.arange(count).repeat_interleave(number)
    n = len(image)
    # The distribution function of a density ~ r^-3 between the smallest and the largest, inverted.
    radius = smallest[image] / (1 - uniform(n) * (1 - ratio[image].square())).sqrt()
    slenderness = _NARROWEST ** (uniform(count)[image] * uniform(n) / 2)
    return _Leaves(
        image=image,
        row=height * uniform(n),
        column=width * uniform(n),
        along=(radius / slenderness).clamp_max(side * _LARGEST),
        across=radius * slenderness,
        angle=2 * math.pi * uniform(n),
        corners=_CORNERS[torch.randint(len(_CORNERS), (n,), generator=generator)],
    )


def _foremost(leaves: _Leaves, count: int, image_size: tuple[int, int]) -> Tensor:
    """The number of the leaf seen at each pixel of `count` images: LongTensor [count, H, W].

    Leaves are numbered from back to front, so the one seen is the highest number that covers a pixel, and they can be
    laid in any order: all of about one size together, each on the square it fits into. The first leaf of an image is
    its ground, seen where no other is.
    """
    height, width = image_size
    seen = torch.searchsorted(leaves.image, torch.arange(count)).repeat_interleave(height * width)
    # Half the side of the square: a centre lies up to half a pixel off. In powers of sqrt(2), to have few sizes.
    reach = (2 ** (((leaves.along + 0.5).log2() * 2).ceil() / 2)).ceil().long()
    for half in sorted(set(reach.tolist())):
        offset = torch.arange(-half, half + 1)
        for numbers in (reach == half).nonzero().split(max(1, _CHUNK // len(offset) ** 2)):
            leaf = _Leaves(*(values[numbers, None] for values in leaves))
            i, j = leaf.row.long() + offset[:, None], leaf.column.long() + offset
            down, right = i + 0.5 - leaf.row, j + 0.5 - leaf.column
            u = (right * leaf.angle.cos() + down * leaf.angle.sin()) / leaf.along
            v = (down * leaf.angle.cos() - right * leaf.angle.sin()) / leaf.across
            # A regular polygon in the unit circle reaches as far as its sides, seen from the middle of the nearest.
            sector = math.pi / leaf.corners
            bearing = torch.atan2(v, u).remainder(2 * sector) - sector
            inside = torch.hypot(u, v) * bearing.cos() <= sector.cos()
            pixel = (leaf.image * height + i % height) * width + j % width
            seen.scatter_reduce_(0, pixel[inside], numbers[..., None].expand_as(inside)[inside], "amax")
    return seen.view(count, height, width)


def _painted(leaves: _Leaves, seen: Tensor, generator: torch.Generator) -> Tensor:
    """Colour, texture and stripes of the leaves seen, [B, H, W]: [B, 3, H, W], of about zero mean and unit variance."""
    count, height, width = seen.shape
    n = len(leaves.image)
    uniform = partial(torch.rand, generator=generator)
    colour = _coloured(torch.randn(n, 3, generator=generator))

    # Each leaf is cut from another part of one field per image, rough or smooth.
    field = _fractal(0.7 + 1.3 * uniform(count), (height, width), generator)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    down, right = (torch.randint(side, (n,), generator=generator)[seen] for side in (height, width))
    cut = ((y + down) % height * width + (x + right) % width).view(count, 1, -1).expand(-1, 3, -1)
    texture = field.flatten(2).gather(2, cut).view_as(field)
    roughness = uniform(n).square() * (0.5 + uniform(count))[leaves.image]

    # Stripes, on every second leaf: soft-edged, and not so fine that they would alias.
    strength = uniform(n) * (uniform(n) < 0.5)
    wavelength = (leaves.along * (0.05 + 0.55 * uniform(n))).clamp_min(3.0)
    wave = torch.polar(2 * math.pi / wavelength, 2 * math.pi * uniform(n))
    phase = y * wave.imag[seen] + x * wave.real[seen] + (2 * math.pi * uniform(n))[seen]
    stripes = strength[seen] * (3 * phase.cos()).tanh()
    return colour[seen].movedim(-1, 1) + roughness[seen][:, None] * texture + stripes[:, None]
