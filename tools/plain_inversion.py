"""Dense inversion the way it is usually written: what `bench_inversion.py` measures dfq against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from calibration import Settings
from calibration.inversion import COMPARE_EVERY, pixel_bounds


@contextmanager
def as_usually_run(vit: nn.Module) -> Iterator[list[Tensor]]:
    """Weights take gradients and attention is unfused; the list it yields takes each block's map, [B, heads, N, N]."""
    layers: list[Any] = [module for module in vit.modules() if isinstance(module, Attention)]
    fused = [layer.fused_attn for layer in layers]
    required = [parameter.requires_grad for parameter in vit.parameters()]
    maps: list[Tensor] = []
    hooks = [layer.attn_drop.register_forward_pre_hook(lambda _module, args: maps.append(args[0])) for layer in layers]
    vit.requires_grad_(True)
    for layer in layers:
        layer.fused_attn = False
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        for layer, was in zip(layers, fused, strict=True):
            layer.fused_attn = was
        vit.zero_grad()
        for parameter, was in zip(vit.parameters(), required, strict=True):
            parameter.requires_grad_(was)


def plain_variation(images: Tensor) -> Tensor:
    """images: [B, 3, H, W] -> the four Frobenius norms of DeepInversion (CVPR 2020), eq. 3, left to autograd: []."""
    right = images[:, :, :, :-1] - images[:, :, :, 1:]
    down = images[:, :, :-1, :] - images[:, :, 1:, :]
    falling = images[:, :, :-1, :-1] - images[:, :, 1:, 1:]
    rising = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    total: Tensor = right.norm() + down.norm() + falling.norm() + rising.norm()
    return total


def invert_plainly(
    vit: nn.Module,
    initial: Tensor,
    labels: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    iterations: int,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor, list[Tensor]], None] | None = None,
) -> Tensor:
    """Dense inversion the way it is usually written, in float32, of the objective and settings `invert` has by default.

    initial: [B, 3, H, W], normalised; labels: [B]. on_step: called every `COMPARE_EVERY` iterations, with the number of
    iterations done, the loss [] and the attention maps, while the gradients are still there. No best iterate is kept.
    """
    settings = Settings(iterations)
    low, high = pixel_bounds(mean, std, initial.device)
    most_down, most_right = (round(side * settings.augment.fraction) for side in initial.shape[-2:])
    images = initial.clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=settings.learning_rate, betas=settings.betas)
    with as_usually_run(vit) as maps:
        for done in range(1, iterations + 1):
            maps.clear()
            down = int(torch.randint(-most_down, most_down + 1, (), generator=generator))
            right = int(torch.randint(-most_right, most_right + 1, (), generator=generator))
            moved = torch.roll(images, (down, right), dims=(2, 3))
            if torch.rand((), generator=generator) < 0.5:
                moved = torch.flip(moved, dims=(3,))
            adam.zero_grad()
            vit.zero_grad()
            loss = F.cross_entropy(vit(moved), labels) + 1e-4 * plain_variation(images)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            images.data = images.data.clamp(low, high)
            if on_step is not None and done % COMPARE_EVERY == 0:
                on_step(done, loss.detach(), maps)
    return images.detach()
