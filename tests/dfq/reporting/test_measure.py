"""Where a quantized network loses precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import dfq
from calibration import CalibrationSet
from calibration.background import with_leaves
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import load_recipe
from dfq.reporting.measure import measure


def power_ratio_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    exact, found = exact.double(), found.double()
    return 10 * math.log10(float((exact**2).sum() / ((exact - found) ** 2).sum()))


def test_the_last_stage_is_the_logits(reference: Model, noise: CalibrationSet, w4a8: QuantizedModel) -> None:
    quantized = w4a8
    found = measure(quantized, noise, reference, batch_size=3, progress=False)
    (images, _) = noise.batches(8, reference.device)[0]
    exact, rounded = reference(images), quantized(images)
    assert found.num_images == 8
    assert found.stages[-1].name == "head"
    assert found.stages[-1].sqnr_db == pytest.approx(power_ratio_db(exact, rounded), abs=1e-3)
    assert found.agreement == 100 * (exact.argmax(1) == rounded.argmax(1)).double().mean().item()


def test_a_layer_is_compared_with_the_same_layer_in_full_precision(
    reference: Model, noise: CalibrationSet, w4a8: QuantizedModel
) -> None:
    quantized = w4a8
    seen: dict[str, list[torch.Tensor]] = {}
    for network in (reference.module, quantized.module):
        for name in ("blocks.1.mlp.fc1", "blocks.1.attn.qkv"):
            layer = network.get_submodule(name)
            layer.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out))
    (images, _) = noise.batches(8, reference.device)[0]
    reference(images), quantized(images)
    for network in (reference.module, quantized.module):
        for name in seen:
            network.get_submodule(name)._forward_hooks.clear()
    found = {layer.name: layer.sqnr_db for layer in measure(quantized, noise, reference, progress=False).layers}
    assert found["blocks.1.mlp.fc1"] == pytest.approx(power_ratio_db(*seen["blocks.1.mlp.fc1"]), abs=1e-3)
    exact, rounded = (out[..., : 2 * out.shape[-1] // 3] for out in seen["blocks.1.attn.qkv"])
    assert found["blocks.1.attn.qkv"] == pytest.approx(power_ratio_db(exact, rounded), abs=1e-3)


def test_a_recipe_that_rotates_and_rescales(reference: Model, noise: CalibrationSet) -> None:
    """At 8 bits little is lost: were channels not those of the other network, nothing would agree."""
    quantized = dfq.quantize(reference, "w8a8", calibration=noise, recipe="fast", progress=False)
    found = measure(quantized, noise, reference, progress=False)
    assert min(entry.sqnr_db for entry in (*found.stages, *found.layers)) > 20
    names = [site.name for site in found.sites]
    assert set(names) == {name for name in quantized.sites if not name.endswith(".weight")}
    block = [name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")]
    assert block[0] == "attn.qkv.input"
    assert set(block[1:5]) == {"attn.q", "attn.k", "attn.softmax", "attn.v"}
    assert block[5:] == ["attn.proj.input", "mlp.fc1.input", "mlp.fc2.input"]


def test_rounding_of_a_site(reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "w4a4", calibration=noise, recipe="paper", progress=False)
    name = "blocks.0.mlp.fc2.input"
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = quantized.module.get_submodule(name).register_forward_hook(
        lambda _m, inputs, out: passed.append((inputs[0], out))
    )
    (images, _) = noise.batches(8, reference.device)[0]
    quantized(images)
    handle.remove()
    ((values, kept),) = passed
    found = {site.name: site for site in measure(quantized, noise, progress=False).sites}[name]
    assert (found.bits, found.low, found.high) == (4, values.min().item(), values.max().item())
    assert (found.kept_low, found.kept_high) == (kept.min().item(), kept.max().item())
    assert found.sqnr_db == pytest.approx(power_ratio_db(values, kept), abs=1e-3)


def test_without_full_precision_there_are_only_sites(noise: CalibrationSet, w4a8: QuantizedModel) -> None:
    found = measure(w4a8, noise, progress=False)
    assert (found.layers, found.stages, found.agreement) == ((), (), None)
    assert found.sites


def test_sparse_images(tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    model, images = tiny(), images_for(4, mask)
    quantized = dfq.quantize(model, "w8a8", calibration=images, recipe="paper", progress=False)
    found = measure(quantized, images, model, progress=False)
    assert found.stages[-1].sqnr_db > 10


def test_sparse_images_are_seen_as_in_calibration(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.zeros(8, 4, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    model, images = tiny(), images_for(8, mask)
    quantized = dfq.quantize(model, "w4a4", calibration=images, progress=False)
    assert measure(quantized, images, model, progress=False) == measure(
        quantized, with_leaves(images), model, progress=False
    )


def test_sparse_images_are_refused_where_positions_have_means(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    recipe = replace(load_recipe("fast"), background="none")
    quantized = dfq.quantize(tiny(), "w4a4", calibration=images_for(8), recipe=recipe, progress=False)
    with pytest.raises(DfqError, match="keeps some patches of its images only"):
        measure(quantized, images_for(4, mask), progress=False)


def test_images_of_another_normalisation_are_refused(
    noise: CalibrationSet, w4a8: QuantizedModel, tiny: Callable[..., Model]
) -> None:
    with pytest.raises(DfqError, match="was made with mean"):
        measure(w4a8, noise, tiny(img_size=64), progress=False)


def test_nothing_is_left_behind(reference: Model, noise: CalibrationSet, w4a8: QuantizedModel) -> None:
    quantized = w4a8
    (images, _) = noise.batches(8, reference.device)[0]
    before = quantized(images)
    measure(quantized, noise, reference, progress=False)
    assert torch.equal(quantized(images), before)
    assert not any(module._forward_hooks for module in quantized.module.modules())
