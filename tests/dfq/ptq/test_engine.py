"""The pipeline: ranges, integers and bits against values found without it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.datasets import reference_digits
from dfq.errors import DfqError, UnsupportedModelError, UsageError
from dfq.evaluation import evaluate
from dfq.models import Model
from dfq.ptq.modules import QuantizedConv2d, QuantizedLinear
from dfq.recipe import recipe_from_dict
from quantizers import TwinUniformQuantizer, UniformQuantizer

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
    default = dfq.quantize(model, "w8a8", calibration=images_for(mask=mask), progress=False)
    assert all(site.fitted for site in default.sites.values())

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


def test_bits_of_both_presets(reference: Model, noise: CalibrationSet) -> None:
    default = dfq.quantize(reference, "w4a6", calibration=noise, progress=False)
    paper = dfq.quantize(reference, "w4a6", calibration=noise, recipe="paper", progress=False)
    assert default.bits == paper.bits == "w4a6"
    assert default.sites["patch_embed.proj.weight"].bits == default.sites["head.weight"].bits == 8
    assert default.sites["patch_embed.proj.input"].bits == default.sites["head.input"].bits == 8
    assert default.sites["blocks.0.attn.qkv.weight"].bits == 4
    assert default.sites["blocks.0.attn.softmax"].bits == 6
    assert {q.bits for name, q in paper.sites.items() if name.endswith("weight")} == {4}
    assert {q.bits for name, q in paper.sites.items() if not name.endswith("weight")} == {6}


def test_default_uses_twin_ranges_after_softmax_and_gelu(reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "w8a8", calibration=noise, progress=False)
    twins = {name for name, site in quantized.sites.items() if isinstance(site, TwinUniformQuantizer)}
    assert twins == {f"blocks.{index}.{site}" for index in range(4) for site in ("attn.softmax", "mlp.fc2.input")}
    for name, site in quantized.sites.items():
        assert site.fitted, name


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


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a16_leaves_activations_in_floating_point(preset: str, reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "w8a16", calibration=noise, recipe=preset, progress=False)
    assert quantized.bits == "w8a16"
    assert quantized.sites
    assert all(name.endswith(".weight") for name in quantized.sites)
    # Nothing but weights differs: put them back, and the function is that of full precision.
    for path, layer in quantized.module.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedConv2d):
            layer.weight = reference.module.get_submodule(path).weight
    x, _ = next(noise.batches(4, torch.device("cpu")))
    torch.testing.assert_close(quantized(x), reference(x), rtol=1e-4, atol=1e-4)


def test_the_model_itself_is_left_as_it_is(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, x = tiny(), normalised(images_for().images)
    state = {key: value.clone() for key, value in model.module.state_dict().items()}
    kinds = [type(module) for module in model.module.modules()]
    before = model(x)
    for preset in ("default", "paper"):
        quantized = dfq.quantize(model, "w2a2", calibration=images_for(), recipe=preset, progress=False)
        assert not torch.allclose(quantized(x), before, rtol=0.1)
    assert [type(module) for module in model.module.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert torch.equal(model(x), before)


def test_more_bits_are_nearer_to_full_precision(reference: Model, noise: CalibrationSet) -> None:
    digits = reference_digits(reference)
    results = [
        evaluate(
            dfq.quantize(reference, bits, calibration=noise, progress=False),
            digits,
            baseline=reference,
            limit=150,
            progress=False,
        )
        for bits in ("w2a2", "w4a4", "w8a8")
    ]
    comparisons = [result.comparison for result in results]
    assert all(comparison is not None for comparison in comparisons)
    sqnr = [comparison.logit_sqnr_db for comparison in comparisons if comparison is not None]
    assert sqnr == sorted(sqnr)
    assert sqnr[-1] > 20
    assert comparisons[-1] is not None
    assert comparisons[-1].agreement > 97


def test_it_is_the_same_every_time_and_leaves_the_random_state_alone(reference: Model, noise: CalibrationSet) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = (dfq.quantize(reference, "w4a4", calibration=noise, progress=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, other = first.tensors(), second.tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_set_may_be_given_by_its_folder(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    dfq.generate(reference, "gaussian", 8, out=tmp_path, progress=False)
    first = dfq.quantize(reference, "w8a8", calibration=noise, progress=False).tensors()
    second = dfq.quantize(reference, "w8a8", calibration=tmp_path, progress=False).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_set_the_model_is_inverted(
    reference: Model, noise: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Model] = []

    def generate(model: Model) -> CalibrationSet:
        asked.append(model)
        return noise

    monkeypatch.setattr("dfq.generation.generate", generate)
    quantized = dfq.quantize(reference, "w8a8", progress=False)
    assert asked == [reference]
    assert quantized.calibration == {"num_images": 8, "run": noise.run}


@pytest.mark.parametrize(
    ("bits", "recipe"), [("w1a8", "default"), ("w4", "default"), ("w4a8", "defult"), ("w4a8", {"head.nput": {}})]
)
def test_bits_and_recipe_are_checked_before_images_are_made(
    bits: str, recipe: Any, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(_model: Model) -> CalibrationSet:
        raise AssertionError("images were made")

    monkeypatch.setattr("dfq.generation.generate", generate)
    if isinstance(recipe, dict):
        recipe = recipe_from_dict({"sites": recipe}, name="mine", where="mine.toml")
    with pytest.raises(UsageError):
        dfq.quantize(reference, bits, recipe=recipe, progress=False)


def test_sets_of_other_models_are_refused(
    reference: Model, noise: CalibrationSet, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    large = images_for(
        images=torch.zeros(2, 3, 64, 64, dtype=torch.uint8), mask=torch.ones(2, 8, 8, dtype=torch.bool), count=2
    )
    with pytest.raises(DfqError, match="holds images of 64x64, and tiny takes 32x32: generate one"):
        dfq.quantize(tiny(), calibration=large, progress=False)
    # Also 32x32, but in 8x8 patches.
    with pytest.raises(DfqError, match="counts 8x8 patches, and tiny 4x4"):
        dfq.quantize(tiny(), calibration=noise, progress=False)
    other = images_for(mean=(0.4, 0.5, 0.5))
    with pytest.raises(DfqError, match=r"made with mean \(0\.4, 0\.5, 0\.5\) and std .* mean \(0\.5, 0\.5, 0\.5\)"):
        dfq.quantize(tiny(), calibration=other, progress=False)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_activations_that_are_not_finite_name_their_site(
    preset: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    model.module.blocks[1].norm2.weight[0] = torch.inf
    with pytest.raises(DfqError, match=r"cannot find a range for blocks\.1\.mlp\.fc1\.input: .*NaN or infinity"):
        dfq.quantize(model, calibration=images_for(), recipe=preset, progress=False)


def test_other_models_are_refused(reference: Model, noise: CalibrationSet) -> None:
    cnn: Any = replace(reference, module=nn.Conv2d(3, 3, 3))
    with pytest.raises(UnsupportedModelError, match="is a Conv2d, not a timm VisionTransformer"):
        dfq.quantize(cnn, calibration=noise, progress=False)


def test_a_quantized_model_says_what_it_is(reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "W4A8", calibration=noise, progress=False)
    assert (quantized.name, quantized.bits, quantized.num_classes) == ("reference", "w4a8", 10)
    assert quantized.class_names == tuple("0123456789")
    assert quantized.preprocessing == reference.preprocessing
    assert quantized.device == torch.device("cpu")
    assert quantized.weight_bytes == sum(t.numel() * t.element_size() for t in quantized.tensors().values())
    # Half a byte for each weight inside the blocks (4 blocks of 12 * 64 * 64), one for those at both ends.
    packed = sum(t.numel() for name, t in quantized.tensors().items() if name.endswith(".integers"))
    assert packed == 4 * 12 * 64 * 64 // 2 + 64 * 3 * 4 * 4 + 10 * 64


def test_weights_a_recipe_leaves_alone_stay_in_floating_point(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    recipe = recipe_from_dict({"sites": {"head.*": {"quantize": False}}}, name="mine", where="test")
    quantized = dfq.quantize(model, "w4a8", calibration=images_for(), recipe=recipe, progress=False)
    assert torch.equal(quantized.tensors()["head.weight"], model.module.head.weight)
    assert "head.weight.integers" not in quantized.tensors()


def test_nothing_is_printed_without_progress(
    reference: Model, noise: CalibrationSet, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dfq.quantize(reference, "w8a8", calibration=noise, progress=False)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


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


@pytest.mark.parametrize(("part", "other"), [("activations", "output_mse"), ("weights", "token_mse")])
def test_weighted_searches_have_their_place(part: str, other: str) -> None:
    with pytest.raises(dfq.DfqError, match=f"test, {part}: range '{other}' is not for {part}"):
        recipe_from_dict({part: {"range": other}}, name="test", where="test")


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
