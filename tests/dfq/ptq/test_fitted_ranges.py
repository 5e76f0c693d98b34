"""Ranges, integers and where they stand, against values found without the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.modules import QuantizedConv2d, QuantizedLinear
from dfq.recipe import recipe_from_dict
from quantizers import UniformQuantizer

MINMAX_WEIGHTS = {"symmetric": True, "granularity": "channel", "range": "minmax"}


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


class Extremes:
    """Smallest and largest value of what was given a name, over any number of batches."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, x: Tensor) -> None:
        self.values[name].append(x.detach().double().flatten())

    def of(self, name: str) -> tuple[float, float]:
        values = torch.cat(self.values[name])
        return values.min().item(), values.max().item()


def watch(module: nn.Module, seen: Extremes) -> list[Any]:
    """Hooks on timm's own modules, by the names of the sites of the preset `paper`."""
    handles = []

    def on_input(path: str, name: str) -> None:
        part = module.get_submodule(path)
        handles.append(part.register_forward_pre_hook(lambda _m, args: seen.add(name, args[0])))

    def on_output(path: str, name: str) -> None:
        part = module.get_submodule(path)
        handles.append(part.register_forward_hook(lambda _m, _args, out: seen.add(name, out)))

    on_input("patch_embed", "patch_embed.proj.input")
    on_output("patch_embed", "patch_embed.proj.output")
    on_output("pos_drop", "pos_drop.output")
    for index in range(len(module.blocks)):
        block = f"blocks.{index}"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc2"):
            on_input(f"{block}.{layer}", f"{block}.{layer}.input")
            on_output(f"{block}.{layer}", f"{block}.{layer}.output")
        on_input(f"{block}.mlp.fc1", f"{block}.mlp.fc1.input")
        on_input(f"{block}.norm2", f"{block}.residual_attn")
        on_output(block, f"{block}.residual_mlp")
        on_output(f"{block}.attn.qkv", f"{block}.qkv")
    on_input("head", "head.input")
    on_output("head", "head.output")
    return handles


def add_scores(module: nn.Module, seen: Extremes) -> None:
    """The scores follow from what qkv gave: rows of 72 are q, k and v of 3 heads of 8."""
    for index in range(len(module.blocks)):
        for image in seen.values.pop(f"blocks.{index}.qkv"):
            qkv = image.view(-1, 3, 3, 8)
            scores = torch.einsum("nhd,mhd->hnm", qkv[:, 0], qkv[:, 1]) / 8**0.5
            seen.add(f"blocks.{index}.attn.scores", scores)


def run_sparsely(module: nn.Module, image: Tensor, kept: list[int]) -> None:
    """timm's forward pass, the tokens of the kept patches picked by hand after the position embedding."""
    tokens = module._pos_embed(module.patch_embed(image[None]))
    tokens = tokens[:, [0] + [1 + patch for patch in kept]]
    for block in module.blocks:
        tokens = block(tokens)
    module.forward_head(module.norm(tokens))


def ranges_of(module: nn.Module, images: Tensor, mask: Tensor) -> Extremes:
    seen = Extremes()
    handles = watch(module, seen)
    for image, patches in zip(images, mask, strict=True):
        pixels = normalised(image) * patches.repeat_interleave(8, 0).repeat_interleave(8, 1)
        run_sparsely(module, pixels, patches.flatten().nonzero()[:, 0].tolist())
    for handle in handles:
        handle.remove()
    add_scores(module, seen)
    seen.add("patch_embed.norm.output", torch.cat(seen.values["patch_embed.proj.output"]))
    seen.add("patch_embed.norm.output", module.cls_token)
    seen.add("pos_embed", module.pos_embed)
    return seen


def check_ranges(sites: dict[str, Any], seen: Extremes) -> None:
    activations = {name for name in sites if not name.endswith("weight")}
    assert activations == set(seen.values)
    for name in activations:
        low, high = seen.of(name)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        assert sites[name].scale.item() == pytest.approx(scale, rel=1e-4), name
        assert abs(sites[name].zero_point.item() - round(-low / scale)) <= 1, name


def test_min_max_ranges_are_those_of_the_activations(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny(), images_for()
    # In two batches, the last one smaller: the running extremes are those of all.
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe="paper", batch_size=3, progress=False)
    check_ranges(quantized.sites, ranges_of(model.module, images.images, images.mask))


def test_a_sparse_set_counts_its_kept_patches_only(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    mask = torch.zeros(5, 16, dtype=torch.bool)
    for image, kept in enumerate(([0, 3], [5, 6, 7], [1, 15], [2, 8, 9], [4, 10])):
        mask[image, kept] = True
    mask = mask.view(5, 4, 4)
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(mask=mask), recipe="paper", progress=False)
    check_ranges(quantized.sites, ranges_of(model.module, images_for().images, mask))

    # The preset that samples values does so with any mixture of images, too.
    fast = dfq.quantize(model, "w8a8", calibration=images_for(mask=mask), recipe="fast", progress=False)
    assert all(site.fitted for site in fast.sites.values())

    dense = dfq.quantize(model, "w8a8", calibration=images_for(), recipe="paper", progress=False)
    for name in ("blocks.0.attn.qkv.input", "blocks.1.mlp.fc2.input"):
        assert dense.sites[name].scale.item() > 1.01 * quantized.sites[name].scale.item(), name


def test_learned_tokens_share_the_range_of_the_patches(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny("deit_tiny_distilled_patch16_224")
    model.module.dist_token[0, 0, 0] = 1000.0
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), recipe="paper", progress=False)
    site = quantized.sites["patch_embed.norm.output"]
    assert site.scale.item() >= 1000 / 255
    for name in ("cls_token", "dist_token"):
        token = getattr(quantized.module, name)
        torch.testing.assert_close(token / site.scale, (token / site.scale).round(), rtol=0, atol=1e-3)
    assert quantized.module.dist_token[0, 0, 0].item() == pytest.approx(1000.0, rel=1e-2)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_are_rounded_to_the_nearest_per_channel(
    bits: int, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    recipe = recipe_from_dict({"weights": MINMAX_WEIGHTS}, name="minmax", where="test")
    quantized = dfq.quantize(model, f"w{bits}a8", calibration=images_for(), recipe=recipe, progress=False)
    layers = [
        (path, layer)
        for path, layer in quantized.module.named_modules()
        if isinstance(layer, QuantizedLinear | QuantizedConv2d)
    ]
    assert len(layers) == 2 * 4 + 2
    for path, layer in layers:
        weight = model.module.get_submodule(path).weight.numpy()
        rows = weight.reshape(len(weight), -1)
        scale = (np.abs(rows).max(1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)).astype(np.float32)
        integers = np.clip(np.round(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert layer.integers.dtype == torch.int8
        np.testing.assert_array_equal(layer.integers.numpy().reshape(rows.shape), integers, err_msg=path)
        np.testing.assert_array_equal(layer.weight.numpy().reshape(rows.shape), (integers * scale).astype(np.float32))


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_range_for_each_head(
    search: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    # The first 24 outputs of qkv are q, 8 for each of 3 heads.
    for values in (model.module.blocks[0].attn.qkv.weight, model.module.blocks[0].attn.qkv.bias):
        values[8:16] *= 10
        values[16:24] *= 100
    settings = {"granularity": "head", "range": search, "symmetric": True}
    recipe = recipe_from_dict({"sites": {"blocks.*.attn.q": settings}}, name="heads", where="test")
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), recipe=recipe, progress=False)
    site = quantized.sites["blocks.0.attn.q"]
    assert isinstance(site, UniformQuantizer)
    assert site.scale is not None
    first, second, third = site.scale.tolist()
    assert 3 < second / first < 30
    assert 3 < third / second < 30


def test_output_mse_weighs_an_error_by_the_mean_square_of_its_input(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """Of every row the range makes sum E[x_i^2] (w_i - w^_i)^2 smallest, x the inputs of timm's layer.

    Each token counts by its root mean square to the power -3/2.
    """
    model, images = tiny(), images_for(mask=torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.6)
    recipe = recipe_from_dict(
        {"weights": {"symmetric": True, "granularity": "channel", "range": "output_mse"}}, name="test", where="test"
    )
    quantized = dfq.quantize(model, "w3a8", calibration=images, recipe=recipe, batch_size=2, progress=False)

    seen: dict[str, list[Tensor]] = defaultdict(list)
    names = ("patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "head")
    for name in names:
        module = model.module.get_submodule(name)
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].detach()))
    for image, patches in zip(images.images, images.mask, strict=True):
        pixels = normalised(image) * patches.repeat_interleave(8, 0).repeat_interleave(8, 1)
        run_sparsely(model.module, pixels, patches.flatten().nonzero()[:, 0].tolist())

    for name in names:
        weight = model.module.get_submodule(name).weight.double()
        if weight.dim() == 4:
            mean_square = torch.cat(seen[name]).double().square().mean((0, 2, 3))
            counts = mean_square[None, :, None, None].expand_as(weight).flatten(1).numpy()
        else:
            rows = torch.cat([x.flatten(0, -2) if x.dim() > 1 else x[None] for x in seen[name]]).double()
            sizes = rows.square().mean(1, keepdim=True).sqrt()
            counts = (rows.square() / sizes**1.5).mean(0).expand_as(weight).numpy()
        w = weight.flatten(1).numpy()

        def error(scale: np.ndarray, w: np.ndarray = w, counts: np.ndarray = counts) -> np.ndarray:
            rounded = np.clip(np.round(w / scale[:, None]), -4, 3) * scale[:, None]
            return np.asarray((counts * (w - rounded) ** 2).sum(1))

        largest = np.abs(w).max(1)
        best = np.min([error(largest * factor / 3) for factor in np.linspace(1.0, 0.02, 100)], axis=0)
        scale = quantized.sites[f"{name}.weight"].tensors()["scale"].double().numpy()
        np.testing.assert_allclose(error(scale), best, rtol=1e-3)


def test_token_mse_is_not_ruled_by_massive_tokens(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """One token of 17 is thirty times larger: the absolute error keeps it, and rounds all others to zero."""
    model = tiny()
    model.module.blocks[1].mlp.act = _OneMassiveToken()
    highest = {}
    for search in ("mse", "token_mse"):
        recipe = recipe_from_dict({"sites": {"blocks.1.mlp.fc2.input": {"range": search}}}, name="t", where="t")
        quantized = dfq.quantize(model, "w8a4", calibration=images_for(), recipe=recipe, progress=False)
        site = quantized.sites["blocks.1.mlp.fc2.input"].tensors()
        highest[search] = site["scale"].item() * (15 - site["zero_point"].item())
    assert highest["mse"] > 15
    assert highest["token_mse"] < 10


class _OneMassiveToken(nn.Module):
    """Values in [0, 1), but the third token of each image, which is 30 times as large."""

    def forward(self, x: Tensor) -> Tensor:
        values = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        values[:, 2] *= 30
        return values
