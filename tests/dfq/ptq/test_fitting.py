"""A stage quantized: the quantizer with the least error, ranges per channel moved as far as it pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq import fitting
from dfq.ptq.engine import prepare
from dfq.ptq.fitting import fit_quantizer, move_ranges, observe
from dfq.ptq.gradients import tempered, token_gradients
from dfq.ptq.sites import PlannedSite, Site
from dfq.ptq.stages import stages
from dfq.recipe import SiteSettings, parse_bits, recipe_from_dict
from quantizers import (
    DynamicQuantizer,
    LogQuantizer,
    OutlierQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one of several quantizers


def fitted(values: Tensor, bits: int, **settings: Any) -> Quantizer:
    return fit_quantizer(PlannedSite(Site("blocks.0.attn", "softmax"), bits, SiteSettings(**settings)), values)


def test_the_quantizer_with_the_least_error_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(1000, 4, generator=generator)
    # At 8 bits half of the levels of a twin range would be lost on what is small, and few values are.
    assert type(fitted(even, 8, quantizer="least_error", split="magnitude")) is UniformQuantizer
    # Nine tenths within a 64th: there twin levels are 1 / (64 * 127) apart, even ones 1 / 255.
    small = even / torch.where(torch.rand(1000, 1, generator=generator) < 0.9, 64, 1)
    assert type(fitted(small, 8, quantizer="least_error", split="magnitude")) is TwinUniformQuantizer
    # Of attention that is nearly even, the largest value is an exception: levels near it would be wasted.
    attention = randn(400, 50).softmax(-1)
    assert type(fitted(attention, 4, quantizer="least_error", split="magnitude")) is LogQuantizer


@pytest.mark.parametrize(("bits", "kind"), [(3, DynamicQuantizer), (7, DynamicQuantizer), (8, UniformQuantizer)])
def test_few_bits_have_a_range_for_each_token(bits: int, kind: type[Quantizer]) -> None:
    values = randn(40, 16) * torch.linspace(0.1, 10, 40)[:, None]
    for search in ("minmax", "mse"):
        found = fitted(values, bits, range=search, dynamic_up_to=7)
        assert type(found) is kind
        if isinstance(found, DynamicQuantizer):
            assert found.searched == (search == "mse")
    # A range per channel that is not moved stays; one per head becomes one per token in each head.
    channel = SiteSettings(granularity="channel", range="mse", dynamic_up_to=7)
    assert (
        type(fit_quantizer(PlannedSite(Site("blocks.0.mlp.fc1", "input"), bits, channel), values)) is UniformQuantizer
    )
    assert type(fitted(values.view(4, 2, 5, 16), bits, granularity="head", range="mse", dynamic_up_to=7)) is kind


@pytest.mark.parametrize("search", ["mse", "token_mse", "probability_mse"])
@pytest.mark.parametrize("kind", ["uniform", "least_error"])
def test_a_row_that_counts_for_five_is_as_good_as_five(search: str, kind: str) -> None:
    settings: dict[str, Any] = {"quantizer": kind, "range": search} | ({} if kind == "uniform" else {"split": "sign"})
    planned = PlannedSite(Site("blocks.0.attn", "softmax"), 4, SiteSettings(**settings))
    rows = nn.functional.gelu(randn(60, 16) * torch.linspace(0.5, 6, 60)[:, None])
    counts = torch.ones(60, 1)
    counts[:20] = 5.0
    repeated = torch.cat([rows, *[rows[:20]] * 4])
    x = torch.linspace(-0.17, 15, 500)
    found, alike = fit_quantizer(planned, rows, counts)(x), fit_quantizer(planned, rows)(x)
    torch.testing.assert_close(found, fit_quantizer(planned, repeated)(x))
    assert not torch.allclose(found, alike)


@pytest.mark.parametrize(("split", "bits"), [("magnitude", 4), ("magnitude", 8), ("sign", 3), ("sign", 8)])
def test_no_single_quantizer_has_a_smaller_error(split: str, bits: int) -> None:
    x = randn(400, 16) * 3
    values = x.softmax(-1) if split == "magnitude" else nn.functional.gelu(x)
    found: dict[str, float] = {}
    for kind in ("twin_uniform", "log", "uniform", "least_error"):
        given = {} if kind == "uniform" else {"split": split}
        found[kind] = (fitted(values, bits, quantizer=kind, **given)(values) - values).square().sum().item()
    assert found["least_error"] == min(found.values()) < max(found.values())


def test_the_least_error_counts_tokens_as_the_range_does() -> None:
    """One token that is a thousand times larger decides, unless all are made to count alike."""
    values = nn.functional.gelu(randn(400, 16))
    values[7] = values[7].abs() * 1000
    others = torch.arange(400) != 7

    def error_of_others(search: str) -> float:
        quantizer = fitted(values, 4, quantizer="least_error", split="sign", range=search)
        return (quantizer(values) - values)[others].square().mean().item()

    assert error_of_others("token_mse") < error_of_others("minmax") / 4


@pytest.mark.parametrize("quantizer", ["twin_uniform", "log", "least_error"])
def test_exponentials_are_rounded_for_the_probabilities_they_become(quantizer: str) -> None:
    """In flat rows every probability is small, whatever becomes of it; in peaked ones the little beside it counts."""
    uniform = torch.rand(200, 1, 1, 50, generator=torch.Generator().manual_seed(2))
    values = torch.cat([0.3 + 0.7 * uniform, 0.02 * uniform])
    values[..., 0] = 1.0

    def error_of_probabilities(search: str) -> float:
        found = fitted(values, 3, quantizer=quantizer, split="magnitude", range=search)(values)
        return (found / found.sum(-1, keepdim=True) - values / values.sum(-1, keepdim=True)).square().mean().item()

    assert error_of_probabilities("probability_mse") < 0.7 * error_of_probabilities("mse")


def test_outliers_are_kept_apart_where_there_are_any() -> None:
    values = nn.functional.gelu(randn(400, 16))
    settings: dict[str, Any] = {"quantizer": "least_error", "split": "sign", "outliers": 20.0}
    assert not isinstance(fitted(values, 4, **settings), OutlierQuantizer)
    values[:, 5] *= 300
    apart = fitted(values, 4, **settings)
    assert isinstance(apart, OutlierQuantizer)
    assert apart.tensors()["channels"].tolist() == [5]
    assert not isinstance(fitted(values, 4, **(settings | {"outliers": 1000.0})), OutlierQuantizer)
    plain = fitted(values, 4, quantizer="least_error", split="sign")
    others = torch.arange(16) != 5
    errors = [(quantizer(values) - values)[:, others].square().mean() for quantizer in (apart, plain)]
    assert errors[0] < errors[1] / 10


def test_values_without_a_range_name_their_site() -> None:
    with pytest.raises(DfqError, match=r"cannot find a range for blocks\.0\.attn\.softmax: .*NaN or infinity"):
        fitted(torch.full((3, 4), torch.nan), 8)


# --- ranges per channel moved


def test_in_full_every_channel_after_a_norm_gets_the_whole_range(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """RepQ-ViT, section 3.2: channels of very different sizes end up with one and the same, and W x with it."""
    model, images = tiny(), images_for()
    norm = model.module.blocks[0].norm1
    norm.weight *= torch.logspace(-1, 1, 24)
    norm.bias *= norm.weight  # So that the range of every channel holds zero.
    model.module.pos_embed.copy_(model.module.pos_embed.half())  # Quantizing rounds it so.
    x = (images.images.float() / 255 - 0.5) / 0.25
    passed: list[Tensor] = []
    model.module.blocks[0].attn.qkv.register_forward_hook(lambda _m, args, out: passed.extend((args[0], out)))
    model(x)
    chosen = recipe_from_dict(
        {
            "reparametrize": "full",
            "activations": {"quantize": False},
            "weights": {"quantize": False},
            "sites": {"blocks.0.attn.qkv.input": {"quantize": True, "granularity": "channel"}},
        },
        name="test",
        where="test",
    )
    quantized = dfq.quantize(model, "w8a4", calibration=images, recipe=chosen, progress=False)
    layer = quantized.module.blocks[0].attn.qkv
    layer.input = nn.Identity()
    layer.register_forward_hook(lambda _m, args, out: passed.extend((args[0], out)))
    quantized(x)
    before, product, after, same = passed
    sizes = [t.flatten(0, 1).amax(0) - t.flatten(0, 1).amin(0) for t in (before, after)]
    assert sizes[0].max() > 50 * sizes[0].min()
    torch.testing.assert_close(sizes[1], sizes[1].mean().expand(24), rtol=1e-4, atol=0)
    torch.testing.assert_close(same, product, rtol=1e-4, atol=1e-4)
    assert quantized.sites["blocks.0.attn.qkv.input"].tensors()["scale"].shape == (1,)


BY_CHANNEL = {"*.attn.qkv.input": {"granularity": "channel"}, "*.mlp.fc1.input": {"granularity": "channel"}}
EVEN = {"weights": {"granularity": "channel", "range": "mse"}, "activations": {"range": "mse"}}


def uneven(model: Model, *, balanced: bool) -> Model:
    """With norms whose channels differ a hundredfold; `balanced`: the weights they meet differ the other way."""
    for block in model.module.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            sizes = torch.logspace(-1.0, 1.0, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(4))]
            norm.weight.copy_(sizes)
            norm.bias.mul_(sizes)
            if balanced:
                linear.weight.div_(sizes)
    return model


def moved(model: Model, images: CalibrationSet, bits: str) -> dict[str, float]:
    """How far ranges were moved, by the norm's name: 1 is in full."""
    ratios: dict[str, dict[str, Tensor]] = {}
    for how in ("full", "searched"):
        recipe = recipe_from_dict(EVEN | {"reparametrize": how, "sites": BY_CHANNEL}, name="test", where="test")
        quantized = dfq.quantize(model, bits, calibration=images, recipe=recipe, progress=False)
        ratios[how] = {
            name: (norm.weight / quantized.module.get_submodule(name).weight).log()
            for name, norm in model.module.named_modules()
            if name.endswith(("norm1", "norm2"))
        }
    strengths = {}
    for name, full in ratios["full"].items():
        assert full.std() > 1
        strengths[name] = (ratios["searched"][name] @ full / full.square().sum()).item()
        # The same power of the ratio for every channel.
        torch.testing.assert_close(ratios["searched"][name], strengths[name] * full, rtol=0, atol=0.3)
    return strengths


def test_ranges_are_moved_as_far_as_the_product_gains(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """Weights of few bits can take no great differences between channels, activations of few bits want none."""
    model, images = uneven(tiny(), balanced=False), images_for()
    few_for_weights, few_for_both, few_for_activations = (
        moved(model, images, bits).values() for bits in ("w2a8", "w4a4", "w8a4")
    )
    assert sum(few_for_weights) / 4 < 0.6
    assert sum(few_for_weights) < sum(few_for_both) < sum(few_for_activations)
    assert min(few_for_activations) > 0.9
    # Where the weights are the better for it, whatever the bits.
    for bits in ("w2a8", "w8a4"):
        assert min(moved(uneven(tiny(), balanced=True), images, bits).values()) > 0.7


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("bits", ["w2a8", "w4a4", "w8a4"])
def test_the_search_does_no_worse_than_all_or_nothing(
    bits: str, balanced: bool, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """By the error of what qkv gives where nothing else is quantized, relative to the size of each token."""
    model, images = uneven(tiny(), balanced=balanced), images_for()
    x = normalised(images.images)
    passed: list[Tensor] = []
    model.module.blocks[0].attn.qkv.register_forward_hook(lambda _m, _args, out: passed.append(out))
    model(x)
    errors = {}
    for how in (None, "full", "searched"):
        site = {"quantize": True} | ({} if how is None else {"granularity": "channel"})
        content = {
            "weights": EVEN["weights"] | {"quantize": False},
            "activations": EVEN["activations"] | {"quantize": False},
            "sites": {"blocks.0.attn.qkv.input": site, "blocks.0.attn.qkv.weight": {"quantize": True}},
        }
        recipe = recipe_from_dict(content | ({"reparametrize": how} if how else {}), name="test", where="test")
        quantized = dfq.quantize(model, bits, calibration=images, recipe=recipe, progress=False)
        quantized.module.blocks[0].attn.qkv.register_forward_hook(lambda _m, _args, out: passed.append(out))
        quantized(x)
        errors[how] = ((passed[-1] - passed[0]).square().sum(-1) / passed[0].square().sum(-1)).mean().item()
    assert max(errors.values()) > 1.1 * min(errors.values())
    assert errors["searched"] < 1.05 * min(errors.values())


@pytest.mark.parametrize("rotation", [None, "heads", "full"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_channels_are_rescaled_where_they_are_not_rotated(
    pre_norm: bool, rotation: str | None, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, images = uneven(tiny(pre_norm=pre_norm), balanced=False), images_for()
    content = EVEN | ({} if rotation is None else {"rotate": rotation})
    moving = {
        how: quantized(model, images, content | {"reparametrize": how, "sites": BY_CHANNEL})
        for how in ("searched", "unrotated")
    }
    left = quantized(model, images, content)
    x = normalised(images.images)
    assert not torch.equal(moving["searched"](x), left(x))
    # A norm before the blocks is in the way of the rotation.
    expected = left if rotation == "full" and not pre_norm else moving["searched"]
    assert torch.equal(moving["unrotated"](x), expected(x))
    assert moving["unrotated"].sites["blocks.0.attn.qkv.input"].tensors()["scale"].shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "by_channel"),
    [
        ({}, []),
        # What is mixed is normed before the projection sees it: not rotated, nor to be rescaled.
        ({"scale_attn_norm": True}, ["attn.proj"]),
        # Heads are rotated, the residual stream is not, and an RMSNorm takes no offset.
        ({"norm_layer": "rmsnorm"}, ["attn.qkv", "mlp.fc1"]),
    ],
)
def test_ranges_per_channel_that_can_be_neither_rotated_nor_moved_stay(
    arguments: dict[str, Any],
    by_channel: list[str],
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
) -> None:
    sites = BY_CHANNEL | {"*.attn.proj.input": {"granularity": "channel"}}
    content = EVEN | {"rotate": "full", "reparametrize": "unrotated", "sites": sites}
    found = quantized(tiny(**arguments), images_for(), content).sites
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1"):
        scale = found[f"blocks.1.{layer}.input"].tensors()["scale"]
        assert len(scale) == (24 if layer in by_channel else 1), layer


@pytest.mark.parametrize("rotation", ["heads", "full"])
def test_what_rotated_heads_give_is_not_rescaled(
    rotation: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """Though the residual stream is not rotated."""
    model, images = tiny(pre_norm=True), images_for()
    by_channel = {"*.attn.proj.input": {"granularity": "channel"}}
    moving = quantized(model, images, EVEN | {"rotate": rotation, "reparametrize": "unrotated", "sites": by_channel})
    x = normalised(images.images)
    assert torch.equal(moving(x), quantized(model, images, EVEN | {"rotate": rotation})(x))


def quantized(model: Model, images: CalibrationSet, content: dict[str, Any]) -> dfq.QuantizedModel:
    recipe = recipe_from_dict(content, name="test", where="test")
    return dfq.quantize(model, "w4a4", calibration=images, recipe=recipe, progress=False)


# --- tokens that count by their gradient


def test_tokens_of_a_linears_input_count_by_its_gradient(
    tiny: Callable[..., Model], tiny_swin: Callable[..., Model]
) -> None:
    recipe = recipe_from_dict({"activations": {"range": "mse", "gradient": 0.5}}, name="r", where="r")
    module, planned = prepare(tiny(), parse_bits("w8a4"), recipe)
    block = stages(module)[1]
    sites = [p for p in planned if block.owns(p.site.name) and not p.site.is_weight]
    tokens = randn(2, 17, 24)
    gradients = {
        f"blocks.0.{layer}": [randn(2, 17, seed=seed).square()]
        for seed, layer in enumerate(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    }
    found = observe(module, sites, None, [tokens], block.run, gradients).importance
    for layer, (squares,) in gradients.items():
        expected = ((squares + 1e-3 * squares.mean()) / squares.mean()).sqrt()
        torch.testing.assert_close(found[f"{layer}.input"].flatten(), expected.flatten())
    for slot in ("q", "k", "v", "softmax"):
        assert bool((found[f"blocks.0.attn.{slot}"] == 1).all())
    alike = observe(module, sites, None, [tokens], block.run).importance
    assert all(bool((counts == 1).all()) for counts in alike.values())
    # Blocks of a Swin pass their tokens on a grid, which their mlps flatten.
    module, planned = prepare(tiny_swin(), parse_bits("w8a4"), recipe)
    block = stages(module)[1]
    (site,) = [p for p in planned if block.owns(p.site.name) and p.site.name.endswith("blocks.0.mlp.fc1.input")]
    batch = randn(2, 3, 32, 32)
    gradients = token_gradients(module, [site.site.owner], [(batch, None)])
    found = observe(module, [site], None, [module.patch_embed(batch)], block.run, gradients).importance
    torch.testing.assert_close(found[site.site.name].flatten(), tempered(gradients[site.site.owner], 0.5)[0].flatten())


def test_the_search_for_ratios_looks_at_tokens_also_where_ranges_are_of_extremes(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"reparametrize": "searched", "activations": {"range": "minmax", "granularity": "channel"}}
    off = {"*.attn.[qkv]": {"granularity": "head"}, "*.softmax": {"granularity": "tensor"}}
    off["patch_embed.proj.input"] = {"granularity": "tensor"}
    recipe = recipe_from_dict(content | {"sites": off}, name="r", where="r")
    module, planned = prepare(tiny(), parse_bits("w8a4"), recipe)
    block = stages(module)[1]
    sites = [p for p in planned if block.owns(p.site.name)]
    looked_at: list[tuple[int, ...]] = []
    product_error = fitting._product_error
    monkeypatch.setattr(
        fitting, "_product_error", lambda rows, *rest: looked_at.append(tuple(rows.shape)) or product_error(rows, *rest)
    )
    move_ranges(module, block, sites, recipe, [randn(3, 17, 24)], block.run)
    # 3 images of 17 tokens.
    assert looked_at
    assert {rows for rows, _ in looked_at} == {51}
