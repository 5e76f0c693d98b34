"""The quantizers of one stage, searched by the error of the matrix products that their tensors enter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.ptq.fitting import is_one_product
from dfq.ptq.modules import AttentionSlots, QuantizedConv2d, QuantizedLayer
from dfq.ptq.search import convolution_rows, fisher_logit_gradient, search_product
from dfq.ptq.stages import Stage
from dfq.recipe import OutputSearch
from quantizers import Quantizer

# Random gradients of each image's logits; more of them or more images come to the same.
_DRAWS = 2
# Gradients hold on to everything from the stage to the logits: of so many images at a time.
_IMAGES_PER_PASS = 8
# Tokens that a product is looked at on, however many the images have; with more the search only gets slower.
_TOKENS = 2**13


@dataclass(frozen=True)
class Product:
    """A matrix product of a stage.

    left, right: the names of the operands' sites; weights: [out, ...] of the right one, None where it passes a slot;
    result: the slot where errors of the product are seen, None where there is none; left_rows, result_rows: from what
    passes these slots to the operand and to the product, as `search_product` takes them.
    """

    left: str
    right: str
    weights: Tensor | None
    result: str | None
    left_rows: Callable[[Tensor], Tensor]
    result_rows: Callable[[Tensor], Tensor]
    transpose_right: bool = True


def stage_products(network: nn.Module, stage: Stage) -> Iterator[Product]:
    """Those of an adapted network's stage: linears, the patch embedding's convolution, q k^T and softmax times v."""
    for path, module in network.named_modules():
        if not stage.owns(f"{path}."):
            continue
        if isinstance(module, QuantizedLayer) and is_one_product(module):
            rows, result_rows = _tokens_as_rows, _tokens_as_rows
            if isinstance(module, QuantizedConv2d):
                rows, result_rows = partial(convolution_rows, layer=module), _pixels_as_rows
            names = f"{path}.input", f"{path}.weight"
            yield Product(*names, module.weight.flatten(1), f"{path}.output", rows, result_rows)
        elif isinstance(module, AttentionSlots):
            yield Product(f"{path}.q", f"{path}.k", None, f"{path}.scores", _unchanged, _unchanged)
            if module.deferred:
                continue  # What becomes of the product hangs on the sum of the exponentials as well.
            mixed = f"{path}.proj.input" if module.projects_what_is_mixed else None
            heads = partial(_split_heads, num_heads=module.num_heads)
            yield Product(f"{path}.softmax", f"{path}.v", None, mixed, _unchanged, heads, transpose_right=False)


@torch.no_grad()
def search_stage(
    network: nn.Module,
    stage: Stage,
    following: Sequence[Stage],
    fitted: Mapping[str, Quantizer],
    inputs: Sequence[Any],
    run: Callable[[Any], Tensor],
    settings: OutputSearch,
) -> None:
    """Search both operands' quantizers of every product of a stage in turn (PTQ4ViT, ECCV 2022, section 3.3).

    network: in full precision from this stage on; following: the stages up to the head, for the gradients that
    `error = "fisher"` takes; fitted: quantizers by site, none in its place yet, changed in place; inputs, run: what
    enters the stage in full precision, batch by batch, and what the stage does with it.
    """
    searched = dict(fitted)
    products = list(stage_products(network, stage))
    if settings.operands == "activations":
        for product in products:
            if product.weights is not None:
                searched.pop(product.right, None)
    products = [p for p in products if p.left in searched or p.right in searched]
    generator = torch.Generator().manual_seed(0) if settings.error == "fisher" else None
    seen = [_look(network, products, run, following, part, generator) for part in _parts(inputs, settings.images)]
    for product in products:
        left = _joined([product.left_rows(passed[product.left]) for passed, _ in seen])
        right, weight = product.weights, None
        if right is None:
            right = _joined([passed[product.right] for passed, _ in seen])
        if product.result is not None and generator is not None:
            weight = _joined([product.result_rows(squares[product.result]) for _, squares in seen])
        # Of linears [R, C] tokens are left out, of attention [B, H, N, D] whole images or windows.
        tokens = len(left) * (1 if left.dim() == 2 else left.shape[2])
        step = -(-tokens // _TOKENS)
        search_product(
            left[::step],
            right if product.weights is not None else right[::step],
            searched.get(product.left),
            searched.get(product.right),
            None if weight is None else weight[::step],
            settings.rounds,
            transpose_right=product.transpose_right,
        )


def _look(
    network: nn.Module,
    products: Sequence[Product],
    run: Callable[[Any], Tensor],
    following: Sequence[Stage],
    batch: Any,
    generator: torch.Generator | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By slot: what passes those of the products' operands, and the squared gradients at those of their results.

    Without a generator there are no gradients.
    """
    operands = {p.left for p in products} | {p.right for p in products if p.weights is None}
    results = [p.result for p in products if p.result is not None]
    squares: dict[str, Tensor] = {}
    with torch.set_grad_enabled(generator is not None), _caught(network, operands.union(results)) as passed:
        value = run(batch)
        if generator is not None and results:
            for stage in following:
                value = stage.run(value)
            found = _squared_gradients(value, [passed[name] for name in results], generator)
            squares = dict(zip(results, found, strict=True))
    return {name: passed[name].detach() for name in operands}, squares


def _squared_gradients(logits: Tensor, tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """At tensors that lead to the logits: the Fisher diagonal, but for a constant factor."""
    sums = [torch.zeros_like(tensor) for tensor in tensors]
    for _ in range(_DRAWS):
        gradients = torch.autograd.grad(logits, tensors, fisher_logit_gradient(logits, generator), retain_graph=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.square()
    return sums


@contextmanager
def _caught(network: nn.Module, slots: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What passes these slots while it is open, by name; where gradients are enabled, they can be taken there."""
    caught: dict[str, Tensor] = {}

    def catch(name: str, _slot: nn.Module, _args: Any, x: Tensor) -> None:
        # Neither weights nor images ask for gradients.
        caught[name] = x.requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x

    handles = [network.get_submodule(name).register_forward_hook(partial(catch, name)) for name in slots]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _parts(inputs: Sequence[Any], count: int) -> Iterator[Any]:
    """The first `count` images of what enters a stage, as tensors or, at the stem, as (images, keep)."""
    for batch in inputs:
        tensors = (batch,) if isinstance(batch, Tensor) else batch
        size = min(len(tensors[0]), count)
        for start in range(0, size, _IMAGES_PER_PASS):
            part = tuple(None if t is None else t[start : min(start + _IMAGES_PER_PASS, size)] for t in tensors)
            yield part[0] if isinstance(batch, Tensor) else part
        count -= size


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one. In attention, those of fewer tokens get zeros, which stay zero and add nothing to an error."""
    if parts[0].dim() == 2:
        return torch.cat(list(parts))
    rows, columns = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return torch.cat([F.pad(part, (0, columns - part.shape[-1], 0, rows - part.shape[-2])) for part in parts])


def _unchanged(x: Tensor) -> Tensor:
    return x


def _tokens_as_rows(x: Tensor) -> Tensor:
    """[..., C] -> [R, C]"""
    return x.flatten(0, -2)


def _pixels_as_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B H W, C], as `convolution_rows` has them."""
    return x.flatten(2).mT.flatten(0, 1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, heads D] -> [B, heads, N, D]"""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)
