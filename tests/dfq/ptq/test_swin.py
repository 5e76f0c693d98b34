"""Swin: windows, shifts and merged patches compute what timm's do, and are quantized as the blocks of a ViT are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dfq
from calibration.background import with_leaves
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError, RecipeError, UnsupportedModelError
from dfq.models import Model
from dfq.ptq.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear, adapt
from dfq.ptq.sites import PlannedSite, list_sites, plan_sites
from dfq.recipe import Bits, load_recipe, recipe_from_dict
from dfq.support import check_quantizable
from quantizers import LogQuantizer, TwinUniformQuantizer, UniformQuantizer

KINDS: dict[str, dict[str, Any]] = {
    "shifted windows": {},
    "windows that do not divide the patches": {"window_size": 3},
    "one window": {"window_size": 8},
    "shifted though there is one window": {"always_partition": True},
    "oblong images": {"img_size": (32, 48)},
    "an odd number of patches": {"img_size": 28},
    "any image size": {"dynamic_img_size": True},
    "no qkv bias": {"qkv_bias": False},
}
BLOCKS = ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1")
BLOCK_GEMM = {
    *("attn.qkv.input", "attn.qkv.weight", "attn.q", "attn.k", "attn.v", "attn.softmax"),
    *("attn.proj.input", "attn.proj.weight", "mlp.fc1.input", "mlp.fc1.weight", "mlp.fc2.input", "mlp.fc2.weight"),
}
BLOCK_FULL = BLOCK_GEMM | {
    *("attn.scores", "attn.qkv.output", "attn.proj.output", "mlp.fc1.output", "mlp.fc2.output"),
    *("residual_attn", "residual_mlp"),
}
MERGING = {"layers.1.downsample.reduction.input", "layers.1.downsample.reduction.weight"}
ENDS = {"patch_embed.proj.input", "patch_embed.proj.weight", "head.fc.input", "head.fc.weight"}
OUTPUTS = {
    *("patch_embed.proj.output", "patch_embed.norm.output", "layers.1.downsample.reduction.output", "head.fc.output"),
}


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_blocks(names: set[str]) -> set[str]:
    return {f"{block}.{name}" for block in BLOCKS for name in names}


class Keep(nn.Module):
    """Remembers what passes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


class Nothing(nn.Module):
    """Gives zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture
def pictures(images_for: Callable[..., CalibrationSet]) -> Callable[..., CalibrationSet]:
    """Random pictures cut into the 8x8 patches of the tiny Swin."""

    def make(dropped: int = 0) -> CalibrationSet:
        mask = torch.ones(5, 8, 8, dtype=torch.bool)
        mask.view(5, 64)[:, :dropped] = False
        return images_for(mask=mask)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_does_not_change(kind: str, tiny_swin: Callable[..., Model]) -> None:
    module = tiny_swin(**KINDS[kind]).module
    x = randn(3, 3, *module.patch_embed.img_size)
    before = module(x)
    adapted = adapt(copy.deepcopy(module))
    kinds = [type(m) for m in adapted.modules()]
    assert nn.Linear not in kinds
    assert nn.Conv2d not in kinds
    # Four in each block, the merging's, the head's.
    assert (kinds.count(QuantizedLinear), kinds.count(QuantizedConv2d)) == (4 * 4 + 1 + 1, 1)
    assert before.std() > 0.1
    torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_of_each_part_does_not_change(kind: str, tiny_swin: Callable[..., Model]) -> None:
    original = tiny_swin(**KINDS[kind]).module
    adapted = adapt(copy.deepcopy(original))
    # Blocks with a shift and without, or the kind would not be what it says.
    shifted = [any(block.shift_size) for block in original.layers[0].blocks]
    assert shifted == ([False, False] if kind == "one window" else [False, True])
    height, width = original.patch_embed.grid_size
    x = randn(2, height, width, 16)
    for path in (*BLOCKS[:2], "layers.1.downsample", *BLOCKS[2:]):
        expected = original.get_submodule(path)(x)
        torch.testing.assert_close(adapted.get_submodule(path)(x), expected, rtol=1e-4, atol=1e-4, msg=path)
        x = expected


def attention_of_the_whole_image(block: nn.Module, x: Tensor) -> NDArray[np.float64]:
    """x: [H, W, D] -> [H, W, D], token by token: Swin, section 3.2, of one head."""
    size, shift = block.window_size[0], block.shift_size[0]
    weight, bias = block.attn.qkv.weight.double().numpy(), block.attn.qkv.bias.double().numpy()
    table = block.attn.relative_position_bias_table.double().numpy().reshape(2 * size - 1, 2 * size - 1)
    height, width, dim = x.shape
    projected = x.double().numpy() @ weight.T + bias
    q, k, v = projected[..., :dim], projected[..., dim : 2 * dim], projected[..., 2 * dim :]

    def window_of(row: int, column: int) -> tuple[int, int]:
        # The window border runs `shift` lower and further right; rows above the first one are a window of their own.
        return (row - shift) // size, (column - shift) // size

    mixed = np.zeros_like(v)
    for row, column in np.ndindex(height, width):
        others = [place for place in np.ndindex(height, width) if window_of(*place) == window_of(row, column)]
        scores = np.array(
            [
                q[row, column] @ k[r, c] / np.sqrt(dim) + table[row - r + size - 1, column - c + size - 1]
                for r, c in others
            ]
        )
        powers = np.exp(scores - scores.max())
        mixed[row, column] = sum(p * v[place] for p, place in zip(powers / powers.sum(), others, strict=True))
    out: NDArray[np.float64] = mixed @ block.attn.proj.weight.double().numpy().T + block.attn.proj.bias.double().numpy()
    return out


@pytest.mark.parametrize("index", [0, 1])
def test_tokens_attend_within_their_window(index: int, tiny_swin: Callable[..., Model]) -> None:
    block = adapt(tiny_swin().module).layers[0].blocks[index]
    block.norm1 = nn.Identity()
    x = randn(2, 8, 8, 16)
    keep = Keep()
    block.mlp, block.residual_attn = Nothing(), keep
    block(x)
    for image in range(2):
        expected = x[image].double().numpy() + attention_of_the_whole_image(block, x[image])
        actual = keep.seen[image].view(8, 8, 16).double().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_scores_are_seen_without_bias_and_mask_and_probabilities_with_them(tiny_swin: Callable[..., Model]) -> None:
    module = adapt(tiny_swin().module)
    block = module.layers[0].blocks[1]
    keeps = {slot: Keep() for slot in ("q", "k", "v", "scores", "softmax")}
    for slot, keep in keeps.items():
        setattr(block.attn, slot, keep)
    block(randn(3, 8, 8, 16))
    q, k, scores, softmax = (keeps[slot].seen for slot in ("q", "k", "scores", "softmax"))
    assert q.shape == k.shape == keeps["v"].seen.shape == (3 * 4, 1, 16, 16)  # 4 windows, 1 head, 4x4 tokens
    torch.testing.assert_close(scores, torch.einsum("bhnd,bhmd->bhnm", q, k) / 4)
    torch.testing.assert_close(softmax.sum(-1), torch.ones(12, 1, 16))
    assert not torch.allclose(softmax, scores.softmax(-1), atol=0.01)
    # Of the last window, a corner of each of four windows of the image, no token sees more than its own corner.
    last = softmax[3, 0].view(4, 4, 4, 4)
    assert last[:2, :2, 2:].abs().max() < 1e-20
    assert last[:2, :2, :, 2:].abs().max() < 1e-20
    torch.testing.assert_close(last[:2, :2, :2, :2].sum((-1, -2)), torch.ones(2, 2))


@pytest.mark.parametrize("slot", ["attn.q", "attn.softmax", "attn.v", "attn.scores", "residual_attn", "residual_mlp"])
def test_what_a_slot_gives_is_used(slot: str, tiny_swin: Callable[..., Model]) -> None:
    block = adapt(tiny_swin().module).layers[0].blocks[1]
    x = randn(2, 8, 8, 16)
    before = block(x)
    owner, _, name = slot.rpartition(".")
    setattr(block.get_submodule(owner), name, Nothing())
    assert not torch.allclose(block(x), before, atol=0.01)
    if slot == "residual_mlp":
        assert bool((block(x) == 0).all())


def test_sites_of_both_scopes(tiny_swin: Callable[..., Model]) -> None:
    module = adapt(tiny_swin().module)
    gemm = [site.name for site in list_sites(module, "gemm")]
    full = [site.name for site in list_sites(module, "full")]
    assert sorted(gemm) == sorted(in_blocks(BLOCK_GEMM) | MERGING | ENDS)
    assert sorted(full) == sorted(in_blocks(BLOCK_FULL) | MERGING | ENDS | OUTPUTS)
    for site in list_sites(module, "full"):
        assert hasattr(module.get_submodule(site.owner), site.slot)


def plan(model: Model, recipe: str) -> dict[str, PlannedSite]:
    return {p.site.name: p for p in plan_sites(adapt(model.module), load_recipe(recipe), Bits(4, 6))}


def test_all_between_the_products_by_squared_error(
    tiny_swin: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    content = {"scope": "full", "weights": {"quantize": False}, "activations": {"range": "mse"}}
    recipe = recipe_from_dict(content, name="r", where="r")
    images = images_for(2, torch.ones(2, 8, 8, dtype=torch.bool))
    model = tiny_swin()
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe=recipe, progress=False)
    assert "patch_embed.norm.output" in quantized.sites
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


def test_the_recipe_fast_means_the_blocks_of_swin_too(tiny_swin: Callable[..., Model]) -> None:
    planned = plan(tiny_swin(), "fast")
    assert {name for name, p in planned.items() if p.bits == 8} == ENDS
    for block in BLOCKS:
        softmax, gelu = planned[f"{block}.attn.softmax"].settings, planned[f"{block}.mlp.fc2.input"].settings
        assert (softmax.quantizer, softmax.split) == ("least_error", "magnitude")
        assert (gelu.quantizer, gelu.split, gelu.range) == ("least_error", "sign", "token_mse")
        assert {planned[f"{block}.attn.{slot}"].settings.granularity for slot in "qkv"} == {"head"}


def test_the_paper_recipe_means_the_blocks_of_swin_too(tiny_swin: Callable[..., Model]) -> None:
    left_out = {"attn.softmax", "attn.q", "attn.k", "attn.v", "mlp.fc1.output"}
    planned = plan(tiny_swin(), "paper")
    assert set(planned) == in_blocks(BLOCK_FULL - left_out) | MERGING | ENDS | OUTPUTS


def test_a_pattern_for_a_vit_alone_is_refused_with_the_nearest_site(tiny_swin: Callable[..., Model]) -> None:
    recipe = recipe_from_dict({"sites": {"blocks.*.attn.softmax": {"bits": 8}}}, name="mine", where="mine.toml")
    with pytest.raises(RecipeError, match=r"matches no site of this model; .* layers\.\d\.blocks\.0\.attn\.softmax$"):
        plan_sites(adapt(tiny_swin().module), recipe, Bits(4, 8))


@pytest.mark.parametrize("recipe", ["deploy", "fast", "paper", "ptq4vit", "repq"])
def test_a_quantized_swin_comes_back_bit_for_bit(
    recipe: str, tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    model = tiny_swin()
    x = randn(4, 3, 32, 32)
    quantized = dfq.quantize(model, "w8a8", calibration=pictures(), recipe=recipe, progress=False)
    logits, original = quantized(x), model(x)
    error = (logits - original).norm() / original.norm()
    assert 0 < error < 0.1
    dfq.save(quantized, tmp_path / "saved")
    again = dfq.load(tmp_path / "saved", device="cpu")
    assert torch.equal(again(x), logits)
    assert list(again.sites) == list(quantized.sites)
    state, before = again.module.state_dict(), quantized.module.state_dict()
    assert state.keys() == before.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)  # log tables hold a NaN
    if recipe == "fast":
        kinds = {type(again.sites[f"{block}.attn.softmax"]) for block in BLOCKS}
        assert kinds <= {TwinUniformQuantizer, LogQuantizer, UniformQuantizer}


def test_an_offset_of_the_merging_comes_back(
    tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    """timm's `reduction` has no bias; where the range of each channel is moved into the norm before it, it gets one."""
    content = {"reparametrize": "full", "sites": {"*.reduction.input": {"granularity": "channel"}}}
    recipe = recipe_from_dict(content, name="mine", where="test")
    quantized = dfq.quantize(tiny_swin(), "w8a8", calibration=pictures(), recipe=recipe, progress=False)
    assert quantized.tensors()["layers.1.downsample.reduction.bias"].abs().max() > 0
    assert quantized.sites["layers.1.downsample.reduction.input"].tensors()["scale"].shape == (1,)
    dfq.save(quantized, tmp_path)
    x = randn(4, 3, 32, 32)
    assert torch.equal(dfq.load(tmp_path, device="cpu")(x), quantized(x))


def test_fewer_bits_make_a_larger_error_and_a_smaller_file(
    tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet]
) -> None:
    model = tiny_swin()
    x = randn(4, 3, 32, 32)
    errors, sizes = [], []
    for bits in ("w8a16", "w4a16", "w2a16"):
        quantized = dfq.quantize(model, bits, calibration=pictures(), progress=False)
        errors.append((quantized(x) - model(x)).norm().item())
        sizes.append(quantized.weight_bytes)
        layers = [m for m in quantized.module.modules() if isinstance(m, QuantizedLayer)]
        assert all(layer.integers is not None for layer in layers)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_min_max_ranges_are_those_of_the_activations(
    tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny_swin(), pictures()
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe="paper", batch_size=3, progress=False)
    seen: dict[str, Tensor] = {}
    # On timm's own modules.
    for path, module in model.module.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda _m, args, key=f"{path}.input": seen.update({key: args[0]}))
            module.register_forward_hook(lambda _m, _args, out, key=f"{path}.output": seen.update({key: out}))
        elif path in BLOCKS:
            module.register_forward_hook(lambda _m, _args, out, key=f"{path}.residual_mlp": seen.update({key: out}))
    model((images.images.float() / 255 - 0.5) / 0.25)
    # All but what only dfq has a name for: the sums after attention, the scores, the normed patches.
    inner = in_blocks({"residual_attn", "attn.scores"}) | {"patch_embed.norm.output"}
    assert {name for name in quantized.sites if not name.endswith("weight")} - inner <= seen.keys()
    for name in seen.keys() & quantized.sites.keys():
        low, high = min(seen[name].min().item(), 0.0), max(seen[name].max().item(), 0.0)
        assert quantized.sites[name].scale.item() == pytest.approx((high - low) / 255, rel=1e-4), name


def test_a_set_that_leaves_patches_out_is_refused(
    tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet]
) -> None:
    with pytest.raises(DfqError, match=r"a SwinTransformer cannot run on 54 of its 64 patches: .* dense method"):
        dfq.quantize(tiny_swin(), "w8a8", calibration=pictures(dropped=10), recipe="paper", progress=False)


def test_in_front_of_leaves_it_takes_a_sparse_set(
    tiny_swin: Callable[..., Model], pictures: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny_swin(), pictures(dropped=10)
    sparse, whole = (
        dfq.quantize(model, "w8a8", calibration=each, progress=False).tensors()
        for each in (images, with_leaves(images))
    )
    assert images.is_sparse
    assert all(torch.equal(sparse[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.0.blocks.1", "SwinTransformerBlock"),
        ("layers.1.blocks.0.attn", "WindowAttention"),
        ("layers.0.blocks.0.mlp", "Mlp"),
        ("layers.1.downsample", "PatchMerging"),
        ("patch_embed", "PatchEmbed"),
        ("head", "ClassifierHead"),
    ],
)
def test_other_parts_are_refused_by_name(path: str, expected: str, tiny_swin: Callable[..., Model]) -> None:
    module = tiny_swin().module
    check_quantizable("tiny", module)
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=f"^tiny: {path} is a Flatten, .* only timm's {expected} there$"):
        check_quantizable("tiny", module)
