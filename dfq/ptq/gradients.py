"""How much each token's output matters to the prediction, by the gradients that reach it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.ptq.modules import QuantizedConv2d
from dfq.ptq.search import fisher_logit_gradient
from dfq.ptq.stages import Stage, stages

# Gradients hold on to the activations of the whole network: of so many images at a time.
_IMAGES_PER_PASS = 8


def token_gradients(
    network: nn.Module, layers: Iterable[str], batches: Sequence[tuple[Tensor, Tensor | None]]
) -> dict[str, list[Tensor]]:
    """Squared gradients at the outputs of layers, summed over channels: the Fisher diagonal by token, in expectation.

    network: adapted, in full precision; layers: paths; batches: (images [B, 3, H, W], keep [B, K] or None). Gives, by
    path and batch, a tensor [B, ...] over the tokens that the layer takes, one draw of labels from the prediction each.
    """
    generator = torch.Generator().manual_seed(0)
    chain = stages(network)
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    for images, keep in batches:
        parts: dict[str, list[Tensor]] = {path: [] for path in found}
        for start in range(0, len(images), _IMAGES_PER_PASS):
            part = slice(start, start + _IMAGES_PER_PASS)
            value: Any = (images[part].requires_grad_(), None if keep is None else keep[part])
            outputs: dict[str, Tensor] = {}
            handles = [
                network.get_submodule(path).register_forward_hook(partial(_keep_output, outputs, path))
                for path in parts
            ]
            try:
                with torch.enable_grad():
                    for stage in chain:
                        value = stage.run(value)
            finally:
                for handle in handles:
                    handle.remove()
            gradients = torch.autograd.grad(value, list(outputs.values()), fisher_logit_gradient(value, generator))
            for path, gradient in zip(outputs, gradients, strict=True):
                # Activations that are not finite are an error where they are seen, with the name of their site.
                squares = gradient.square().nan_to_num(0.0, 0.0)
                pixels = isinstance(network.get_submodule(path), QuantizedConv2d)
                parts[path].append(squares.sum(1).flatten(1) if pixels else squares.sum(-1))
        for path, squares_of in parts.items():
            found[path].append(torch.cat(squares_of))
    return found


def _keep_output(outputs: dict[str, Tensor], path: str, _layer: nn.Module, _args: Any, output: Tensor) -> None:
    # What a layer makes of a learned token, as of the query that attention pooling has, hangs on no image.
    outputs[path] = output if output.requires_grad else output.requires_grad_()


def tempered(gradients: Sequence[Tensor], power: float) -> list[Tensor]:
    """Gradients to a power, those near zero lifted to a thousandth of the mean: no token counts for nothing."""
    mean = torch.cat([gradient.flatten() for gradient in gradients]).mean()
    floor = (mean * 1e-3).clamp(min=torch.finfo(torch.float32).tiny)
    return [(gradient + floor).pow(power) / mean.clamp(min=floor).pow(power) for gradient in gradients]


def stage_importance(stage: Stage, gradients: Mapping[str, Sequence[Tensor]], power: float) -> list[Tensor] | None:
    """Of the tokens a block gives, batch by batch; None where gradients are not to count or not known.

    The last linear of a block ends in a residual sum: the gradients there are those of what the block gives.
    """
    found = gradients.get(f"{stage.name}.mlp.fc2")
    return None if found is None or power == 0 else tempered(found, power)
