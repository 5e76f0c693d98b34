"""The pipeline: what it takes, what it leaves alone, and that it does what it is for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.background import with_leaves
from calibration.calibration_set import CalibrationSet
from dfq.datasets import reference_digits
from dfq.errors import DfqError, UnsupportedModelError, UsageError
from dfq.evaluation import evaluate
from dfq.models import Model
from dfq.ptq.engine import kept_state, prepare
from dfq.ptq.modules import QuantizedConv2d, QuantizedLinear
from dfq.recipe import load_recipe, parse_bits, preset_names, recipe_from_dict


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.25


def test_bits_of_recipes_with_and_without_an_exception(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    fast, paper = (
        dfq.quantize(tiny(), "w4a6", calibration=images_for(), recipe=recipe, progress=False)
        for recipe in ("fast", "paper")
    )
    assert fast.bits == paper.bits == "w4a6"
    assert fast.sites["patch_embed.proj.weight"].bits == fast.sites["head.weight"].bits == 8
    assert fast.sites["patch_embed.proj.input"].bits == fast.sites["head.input"].bits == 8
    assert fast.sites["blocks.0.attn.qkv.weight"].bits == 4
    assert fast.sites["blocks.0.attn.softmax"].bits == 6
    assert {q.bits for name, q in paper.sites.items() if name.endswith("weight")} == {4}
    assert {q.bits for name, q in paper.sites.items() if not name.endswith("weight")} == {6}


@pytest.mark.parametrize(("background", "seen"), [("leaves", True), ("none", False)])
def test_sparse_images_stand_in_front_of_what_the_recipe_says(
    background: Any, seen: bool, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.zeros(6, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    model, images, recipe = tiny(), images_for(6, mask), replace(load_recipe("fast"), background=background)
    sparse, filled = (
        dfq.quantize(model, "w4a4", calibration=each, recipe=recipe, progress=False).tensors()
        for each in (images, with_leaves(images))
    )
    assert (sparse.keys() == filled.keys() and all(torch.equal(sparse[name], filled[name]) for name in sparse)) is seen
    # Where some patches are run alone, positions have no means.
    assert any("position_mean" in name for name in sparse) is seen


def test_presets_but_for_published_ones_have_leaves_behind_sparse_images() -> None:
    grounds = {name: load_recipe(name).background for name in preset_names()}
    assert {name for name, background in grounds.items() if background == "leaves"} == {"fast", "accurate", "deploy"}


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a16_leaves_activations_in_floating_point(preset: str, reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "w8a16", calibration=noise, recipe=preset, progress=False)
    assert quantized.bits == "w8a16"
    assert quantized.sites
    assert all(name.endswith(".weight") for name in quantized.sites)
    # Nothing but weights and the last bits of the position embedding differ: put the weights back, and the function is
    # that of full precision.
    exact, _ = prepare(reference, parse_bits("w8a16"), load_recipe(preset))
    for path, layer in quantized.module.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedConv2d):
            layer.weight = exact.get_submodule(path).weight
    x, _ = noise.batches(4, torch.device("cpu"))[0]
    torch.testing.assert_close(quantized(x), reference(x), rtol=1e-3, atol=1e-3)


def test_the_model_itself_is_left_as_it_is(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, x = tiny(), normalised(images_for().images)
    state = {key: value.clone() for key, value in model.module.state_dict().items()}
    kinds = [type(module) for module in model.module.modules()]
    before = model(x)
    for preset in ("fast", "paper"):
        quantized = dfq.quantize(model, "w2a2", calibration=images_for(), recipe=preset, progress=False)
        assert not torch.allclose(quantized(x), before, rtol=0.1)
    assert [type(module) for module in model.module.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in model.module.state_dict().items())
    assert torch.equal(model(x), before)


def test_more_bits_are_nearer_to_full_precision(reference: Model) -> None:
    leaves = dfq.generate(reference, "leaves", 8, progress=False)
    digits = reference_digits(reference)
    results = [
        evaluate(
            dfq.quantize(reference, bits, calibration=leaves, progress=False),
            digits,
            baseline=reference,
            limit=100,
            progress=False,
        )
        for bits in ("w3a3", "w8a8")
    ]
    comparisons = [result.comparison for result in results]
    assert all(comparison is not None for comparison in comparisons)
    sqnr = [comparison.logit_sqnr_db for comparison in comparisons if comparison is not None]
    assert sqnr == sorted(sqnr)
    assert sqnr[-1] > 20
    assert comparisons[-1] is not None
    assert comparisons[-1].agreement > 97


def test_it_is_the_same_every_time_and_leaves_the_random_state_alone(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny(), images_for()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = (dfq.quantize(model, "w4a4", calibration=images, progress=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, other = first.tensors(), second.tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_set_may_be_given_by_its_folder(reference: Model, noise: CalibrationSet, tmp_path: Path) -> None:
    dfq.generate(reference, "gaussian", 8, out=tmp_path, progress=False)
    first = dfq.quantize(reference, "w8a8", calibration=noise, recipe="paper", progress=False).tensors()
    second = dfq.quantize(reference, "w8a8", calibration=tmp_path, recipe="paper", progress=False).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_set_the_model_is_inverted(
    reference: Model, noise: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Model, int]] = []

    def generate(model: Model, *, num_images: int) -> CalibrationSet:
        asked.append((model, num_images))
        return noise

    monkeypatch.setattr("dfq.generation.generate", generate)
    recipe = replace(load_recipe("paper"), num_images=7)
    quantized = dfq.quantize(reference, "w8a8", recipe=recipe, progress=False)
    assert asked == [(reference, 7)]
    assert quantized.calibration == {"num_images": 8, "run": noise.run}


@pytest.mark.parametrize(
    ("bits", "recipe"), [("w1a8", "fast"), ("w4", "fast"), ("w4a8", "fsat"), ("w4a8", {"head.nput": {}})]
)
def test_bits_and_recipe_are_checked_before_images_are_made(
    bits: str, recipe: Any, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("images were made")

    monkeypatch.setattr("dfq.generation.generate", generate)
    if isinstance(recipe, dict):
        recipe = recipe_from_dict({"sites": recipe}, name="mine", where="mine.toml")
    with pytest.raises(UsageError):
        dfq.quantize(reference, bits, recipe=recipe, progress=False)


def test_a_batch_has_one_image_or_more(reference: Model, noise: CalibrationSet) -> None:
    with pytest.raises(UsageError, match="the batch size is 0; it must be 1 or more"):
        dfq.quantize(reference, "w8a8", calibration=noise, batch_size=0, progress=False)


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


# Where channels are rotated, scale and offset of a norm have become part of the layer after it.
@pytest.mark.parametrize(("preset", "slot"), [("fast", "fc2"), ("paper", "fc1")])
def test_activations_that_are_not_finite_name_their_site(
    preset: str, slot: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model = tiny()
    model.module.blocks[1].norm2.bias[0] = torch.inf
    with pytest.raises(DfqError, match=rf"cannot find a range for blocks\.1\.mlp\.{slot}\.input: .*NaN or infinity"):
        dfq.quantize(model, calibration=images_for(), recipe=preset, progress=False)


def test_other_models_are_refused(reference: Model, noise: CalibrationSet) -> None:
    cnn: Any = replace(reference, module=nn.Conv2d(3, 3, 3))
    with pytest.raises(UnsupportedModelError, match="is a Conv2d, neither a timm VisionTransformer"):
        dfq.quantize(cnn, calibration=noise, progress=False)


def test_a_quantized_model_says_what_it_is(reference: Model, noise: CalibrationSet) -> None:
    recipe = recipe_from_dict({"first_last_bits": 8}, name="mine", where="test")
    quantized = dfq.quantize(reference, "W4A8", calibration=noise, recipe=recipe, progress=False)
    assert quantized.describe() == "reference, W4A8, recipe mine, patch embedding and classifier at 8 bits"
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
    tiny: Callable[..., Model],
    images_for: Callable[..., CalibrationSet],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        dfq.quantize(tiny(), "w8a8", calibration=images_for(), progress=False)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def position_embedding(model: Model, bits: str, recipe: str) -> Tensor:
    module, _ = prepare(model, parse_bits(bits), load_recipe(recipe))
    assert isinstance(module.pos_embed, Tensor)
    return module.pos_embed


def test_position_embeddings_are_rounded_to_float16_before_anything_is_calibrated(tiny: Callable[..., Model]) -> None:
    model = tiny()
    # Near 1 float16 has steps of 2^-10 above and 2^-11 below; ties go to even.
    model.module.pos_embed.flatten()[:4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 - 2**-13, 0.5])
    before = model.module.pos_embed.clone()
    # Weights alone: without a rotation, which would have mixed them.
    rounded = position_embedding(model, "w4a16", "paper")
    assert rounded.dtype == torch.float32
    assert rounded.flatten()[:4].tolist() == [1, 1 + 2**-9, 1, 0.5]
    assert (rounded - before).abs().max() <= 2**-11 * before.abs().max()
    assert torch.equal(model.module.pos_embed, before)


def test_position_embeddings_that_are_quantized_are_not_rounded_first(tiny: Callable[..., Model]) -> None:
    model = tiny()
    assert torch.equal(position_embedding(model, "w4a8", "paper"), model.module.pos_embed)


def test_position_embeddings_beyond_float16_are_left_alone(tiny: Callable[..., Model]) -> None:
    model = tiny()
    model.module.pos_embed[0, 3, 5] = 70000.0
    assert torch.equal(position_embedding(model, "w4a16", "paper"), model.module.pos_embed)


def test_position_embeddings_are_kept_in_half_the_bytes_where_nothing_is_lost(tiny: Callable[..., Model]) -> None:
    model = tiny()
    exact, _ = prepare(model, parse_bits("w4a16"), load_recipe("paper"))
    kept = kept_state(exact)
    assert kept["pos_embed"].dtype == torch.float16
    assert torch.equal(kept["pos_embed"].float(), exact.pos_embed)
    assert {tensor.dtype for name, tensor in kept.items() if name != "pos_embed"} == {torch.float32}
    exact.pos_embed[0, 3, 5] = 1 / 3
    assert kept_state(exact)["pos_embed"].dtype == torch.float32
