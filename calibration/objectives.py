"""What inversion minimises: a weighted sum of terms on what the model computes, and on the pixels themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.attention import Attention, Need, class_attention_layers
from calibration.tokens import PatchGrid


@dataclass(frozen=True)
class Scene:
    """What stays the same while a batch of `count` images is inverted; `generator` is a CPU one."""

    vit: nn.Module
    grid: PatchGrid
    count: int
    device: torch.device
    generator: torch.Generator


@dataclass(frozen=True)
class Step:
    """One forward pass of the images `rows` of the batch, b of them.

    logits: [b, C], float32; targets: [b] class indices or [b, C] probabilities; patches: [b, K], which patch of the
    unmoved grid each patch token shows; attention: of this pass, with what the objective needs.
    """

    logits: Tensor
    targets: Tensor
    rows: slice
    patches: Tensor
    attention: Attention


# Of a pass: a value per image, [b]. Of the pixels: one for the whole batch, [].
PassTerm = Callable[[Step], Tensor]
PixelTerm = Callable[[Tensor], Tensor]


class _WithGradient(torch.autograd.Function):
    """A value whose gradient was found along with it, in closed form; what it was found from is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """x: [b, ...]; value: [] or [b], by image; gradient of its sum to x: as x."""
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0].view(-1, *[1] * (gradient.dim() - 1)) * gradient, None, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [b, C]; targets: [b] class indices, or [b, C] probabilities -> [b], in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def soft_targets(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """labels: [B] -> probabilities [B, C] that leave the wanted class company (SARDFQ, arXiv 2412.16553, soft labels).

    Softmax of logits from N(0, 1), but for the wanted class from U(5, 10). `generator` is a CPU one.
    """
    logits = torch.randn(len(labels), num_classes, generator=generator)
    wanted = 5 + 5 * torch.rand(len(labels), 1, generator=generator)
    return logits.scatter_(1, labels.cpu().view(-1, 1), wanted).softmax(-1).to(labels.device)


_ALL, _HEAD, _TAIL = slice(None), slice(None, -1), slice(1, None)
_NEIGHBOURS = (
    ((_ALL, _HEAD), (_ALL, _TAIL)),
    ((_HEAD, _ALL), (_TAIL, _ALL)),
    ((_HEAD, _HEAD), (_TAIL, _TAIL)),
    ((_HEAD, _TAIL), (_TAIL, _HEAD)),
)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the Frobenius norms of the horizontal, vertical and both diagonal differences, whole batch: [].

    images: [B, 3, H, W]. DeepInversion (Yin et al., CVPR 2020, eq. 3), as used by SMI: on the unaugmented pixels of the
    whole image, patches that have stopped included.
    """
    x = images.detach()
    norms, gradient = [], torch.zeros_like(x)
    for one, other in _NEIGHBOURS:
        difference = x[..., *one] - x[..., *other]
        norm = torch.linalg.vector_norm(difference)
        # Kept on the device: a Python number here would have a GPU wait four times a step.
        inverse = norm.clamp_min(torch.finfo(x.dtype).tiny).reciprocal()
        gradient[..., *one].addcmul_(difference, inverse)
        gradient[..., *other].addcmul_(difference, inverse, value=-1)
        norms.append(norm)
    value: Tensor = _WithGradient.apply(images, torch.stack(norms).sum(), gradient)
    return value


def bounded_variation(scene: Scene) -> PixelTerm:
    """|total variation - tau| with one random tau for the batch (PSAQ-ViT, ECCV 2022): images neither noisy nor bare.

    Published: tau from U(2500, 3000) for 32 images of 224x224 pixels, weight 0.05. A Frobenius norm over the batch
    grows with the square root of the number of pixels, and tau with it here.
    """
    height, width = scene.grid.image_size
    scale = math.sqrt(scene.count * height * width / (32 * 224 * 224))
    target = scale * (2500 + 500 * torch.rand((), generator=scene.generator).item())
    return lambda images: (total_variation(images) - target).abs()


KDE_BANDWIDTH = 0.01
KDE_POINTS = 10
KDE_FLOOR = 1e-4
"""The density estimate of patch similarities, as published by PSAQ-ViT."""

_MAX_KERNEL_VALUES = 2**22
"""Kernel values held at once; enough to keep a GPU busy, and no more than a layer's activations."""


def patch_similarity_entropy(step: Step) -> Tensor:
    """Minus the entropy of how alike the patches are, summed over the layers: [b] (PSAQ-ViT, ECCV 2022).

    Noise leaves all patches equally alike, a picture does not; so the lower, the more diverse. In each layer: cosine
    similarities of all pairs of patches (of pairs in the same window, where there are windows), their density by a
    Gaussian kernel at points spread evenly from the lowest to the highest, and the trapezoidal integral of
    -p log p. As published the points are constants to the gradient. The published code spreads them over the range of
    the whole batch; here it is the image's own, so that an image's loss does not depend on its company.
    """
    entropies = []
    images = len(step.logits)
    for output in step.attention.outputs:
        norm = output.norm(dim=-1, keepdim=True)
        # A zero vector has no direction: it is like no patch, and gets no gradient.
        units = output / torch.where(norm > 1e-8, norm, torch.inf)
        units = units.view(images, -1, *units.shape[1:])
        parts = [_similarity_entropy(part) for part in torch.split(units.detach(), _images_at_once(units))]
        entropy, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        entropies.append(_WithGradient.apply(units, entropy, gradient))
    return -torch.stack(entropies).sum(0)


def _images_at_once(units: Tensor) -> int:
    _, windows, tokens, _ = units.shape
    return max(1, _MAX_KERNEL_VALUES // (KDE_POINTS * windows * tokens * (tokens + 1) // 2))


def _similarity_entropy(units: Tensor) -> tuple[Tensor, Tensor]:
    """units: [b, W, T, D], unit vectors -> entropy [b] and its gradient to them.

    The similarities being symmetric, kernels are formed for one triangle of their matrix.
    """
    images, windows, tokens, _ = units.shape
    row, column = torch.triu_indices(tokens, tokens, device=units.device)
    upper, lower = row * tokens + column, column * tokens + row
    entries = windows * tokens**2
    weight = (torch.where(row == column, 1.0, 2.0).to(units.dtype) / entries).repeat(windows)

    matrix = (units @ units.mT).flatten(2)
    similarities = matrix[..., upper].flatten(1)
    low, high = similarities.aminmax(dim=1, keepdim=True)
    spacing = (high - low) / (KDE_POINTS - 1)
    points = low + spacing * torch.arange(KDE_POINTS, device=units.device)
    exponents = (similarities.unsqueeze(1) - points.unsqueeze(2)).div_(KDE_BANDWIDTH).square_().mul_(-0.5)
    # Where exp would underflow, it takes a CPU ten times as long.
    kernels = exponents.clamp_min_(-80).exp_().div_(KDE_BANDWIDTH * math.sqrt(2 * math.pi))

    density = kernels @ weight + KDE_FLOOR
    trapezoids = spacing.repeat(1, KDE_POINTS)
    trapezoids[:, :: KDE_POINTS - 1] /= 2
    entropy = -(trapezoids * density * density.log()).sum(1)

    slope = -trapezoids * (density.log() + 1)
    pulls = torch.stack([slope * points, slope], dim=1) @ kernels
    to_entry = (pulls[:, 0] - similarities * pulls[:, 1]) / (KDE_BANDWIDTH**2 * entries)
    to_entry = to_entry.view(images, windows, -1)
    matrix[..., upper] = to_entry
    matrix[..., lower] = to_entry
    return entropy, 2 * matrix.view(images, windows, tokens, tokens) @ units


PRIOR_COMPONENTS = 5
PRIOR_STD = (0.05, 0.25)
PRIOR_FLOOR = 1e-3
"""The random maps: up to 5 components is published; widths, in sides of the image, and the even share are ours."""


def gaussian_mixtures(shape: tuple[int, ...], grid: PatchGrid, generator: torch.Generator) -> Tensor:
    """Random maps over the patches, [*shape, N], each summing to 1: 1 to 5 Gaussian blobs of random weight.

    Centres lie anywhere in the image; standard deviations are `PRIOR_STD` of its sides, and half a patch at least. A
    share of `PRIOR_FLOOR` is spread evenly, so that a map says something about any patches it is restricted to.
    `generator` is a CPU one.
    """
    size = (*shape, PRIOR_COMPONENTS)

    def profiles(length: int) -> Tensor:
        low, high = PRIOR_STD
        centre = torch.rand(*size, 1, generator=generator)
        std = (low + (high - low) * torch.rand(*size, 1, generator=generator)).clamp_min(0.5 / length)
        positions = (torch.arange(length) + 0.5) / length
        return (-0.5 * ((positions - centre) / std).square()).exp() / std

    number = torch.randint(1, PRIOR_COMPONENTS + 1, (*shape, 1), generator=generator)
    weights = (1 - torch.rand(size, generator=generator)) * (torch.arange(PRIOR_COMPONENTS) < number)
    down, right = profiles(grid.rows), profiles(grid.columns)
    maps = ((weights.unsqueeze(-1) * down).mT @ right).flatten(-2)
    return (1 - PRIOR_FLOOR) * _shares(maps) + PRIOR_FLOOR / grid.num_patches


def attention_prior(scene: Scene) -> PassTerm:
    """Class attention like that to a few objects: near a random Gaussian mixture per image, block and head.

    Attention priors alignment (SARDFQ, ICCV 2025): for the blocks l >= L/2, squared error between the attention of the
    class token and its map, mean over patches and heads, times l / L, summed over the blocks. Both are renormalised
    over the K patches in play, so errors shrink as 1 / K^2; here they are multiplied by K^2, and a weight w is the
    published a1 = w K^2: 1 stands for 38,416 with all 196 patches of a ViT/16, in the upper part of the range 1 to 1e5
    that a1 was searched in.
    """
    layers = class_attention_layers(scene.vit)
    depth = max(layers) + 1
    heads = layers[depth - 1].num_heads
    maps = gaussian_mixtures((scene.count, len(layers), heads), scene.grid, scene.generator).to(scene.device)
    weights = torch.tensor([(block + 1) / depth for block in layers], device=scene.device)

    def of_pass(step: Step) -> Tensor:
        attention = torch.stack([step.attention.class_attention[block] for block in layers], dim=1)
        wanted = maps[step.rows].gather(-1, step.patches[:, None, None].expand_as(attention))
        errors = attention.shape[-1] * (_shares(attention) - _shares(wanted))
        return errors.square().mean((2, 3)) @ weights

    return of_pass


def _shares(x: Tensor) -> Tensor:
    """x: [..., K], not negative -> divided by its sum, or all zeros."""
    return x / x.sum(-1, keepdim=True).clamp_min(1e-12)


_PASS_TERMS: dict[str, Callable[[Scene], PassTerm]] = {
    "cross_entropy": lambda _: lambda step: cross_entropy(step.logits, step.targets),
    "patch_similarity_entropy": lambda _: patch_similarity_entropy,
    "attention_prior": attention_prior,
}
_PIXEL_TERMS: dict[str, Callable[[Scene], PixelTerm]] = {
    "total_variation": lambda _: total_variation,
    "bounded_variation": bounded_variation,
}
_NEEDS: dict[str, Need] = {"patch_similarity_entropy": "outputs", "attention_prior": "class_attention"}

TERMS = (*_PASS_TERMS, *_PIXEL_TERMS)


@dataclass(frozen=True)
class Loss:
    """The objective of one batch, its random choices made: (weight, term) pairs, and what to capture for them."""

    needs: frozenset[Need]
    pass_terms: list[tuple[float, PassTerm]]
    pixel_terms: list[tuple[float, PixelTerm]]

    def of_pass(self, step: Step) -> Tensor:
        """The terms that are an image's own, whatever else shares its pass: [b]."""
        total = step.logits.new_zeros(len(step.logits))
        with torch.autocast(total.device.type, enabled=False):
            for weight, term in self.pass_terms:
                total = total + weight * term(step)
        return total

    def of_pixels(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W], the whole batch, normalised, unmoved -> []."""
        total = images.new_zeros(())
        for weight, term in self.pixel_terms:
            total = total + weight * term(images)
        return total


@dataclass(frozen=True)
class Objective:
    """sum of weight * term; `weights` maps names in `TERMS` to their weights, and 0 leaves a term out."""

    weights: dict[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0, "total_variation": 1e-4})

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in TERMS:
                raise ValueError(f"unknown objective {name!r}: choose from {', '.join(TERMS)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} must be a number from 0 up, not {weight}")
        if not any(self.weights.values()):
            raise ValueError(f"an objective needs a term with a weight above 0: choose from {', '.join(TERMS)}")

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be captured of each forward pass that a Step is made from."""
        return frozenset(need for name, need in _NEEDS.items() if self.weights.get(name))

    def start(self, scene: Scene) -> Loss:
        """What is random (attention priors, the target of total variation) is drawn here, once per batch.

        Raises DfqError for a model that lacks what a term needs.
        """
        # In the order of the tables: the draws must not hang on how `weights` is written.
        return Loss(
            self.needs,
            [(self.weights[name], make(scene)) for name, make in _PASS_TERMS.items() if self.weights.get(name)],
            [(self.weights[name], make(scene)) for name, make in _PIXEL_TERMS.items() if self.weights.get(name)],
        )

    def describe(self) -> dict[str, Any]:
        return dict(self.weights)
