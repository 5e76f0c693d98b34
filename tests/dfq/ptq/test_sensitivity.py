"""What each site costs alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

import dfq
from calibration.background import with_leaves
from calibration.calibration_set import CalibrationSet
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.ptq.modules import PositionMean
from dfq.ptq.probe import Cost, Probe, Trial
from dfq.ptq.sensitivity import Sensitivity, SiteCost, sensitivity, site_trials
from dfq.recipe import DEFAULT_RECIPE, load_recipe, parse_bits
from quantizers import PerAxis, Quantizer, UniformQuantizer


def pixels(images: CalibrationSet) -> Tensor:
    return torch.cat([batch for batch, _ in images.batches(32, torch.device("cpu"))])


def kl_between(reference: Tensor, logits: Tensor) -> float:
    """Another way to the same number: scipy's."""
    p, q = softmax(reference.double().numpy(), axis=1), softmax(logits.double().numpy(), axis=1)
    return float(rel_entr(p, q).sum(1).mean())


@pytest.fixture(scope="module")
def paper(reference: Model, noise: CalibrationSet) -> Probe:
    """Min-max ranges, symmetric weights per channel, activations per tensor: easily done by hand."""
    probe = Probe(reference, parse_bits("w4a4"), load_recipe("paper"), noise, batch_size=3)
    probe.costs(site_trials(probe).values(), progress=False)
    return probe


@pytest.fixture(scope="module")
def found(reference: Model, noise: CalibrationSet) -> Sensitivity:
    return sensitivity(reference, "w4a4", calibration=noise, num_images=4, progress=False)


# --- what is measured


def test_the_cost_of_logits_that_differ() -> None:
    reference = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 4.0]])
    logits = torch.tensor([[2.0, 1.0, 0.5], [0.0, 4.5, 4.0]])
    cost = Cost.of(reference, logits)
    assert cost.kl == pytest.approx(kl_between(reference, logits), rel=1e-9)
    # Powers: 4 + 1 + 9 + 16 = 30 of the reference, 0.25 + 2.25 = 2.5 of the difference.
    assert cost.sqnr_db == pytest.approx(10 * math.log10(12))
    assert cost.changed == 50


def test_the_cost_of_equal_logits() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert Cost.of(logits, logits.clone()) == Cost(0.0, math.inf, 0.0)


def test_weights_alone(paper: Probe, reference: Model, noise: CalibrationSet) -> None:
    layer = "blocks.1.mlp.fc1"
    module = copy.deepcopy(reference.module)
    weight: Any = module.get_submodule(layer).weight
    weight.copy_(UniformQuantizer(4, symmetric=True, granularity=PerAxis(0)).fit(weight)(weight))
    images = pixels(noise)
    expected = kl_between(reference(images), module(images))
    assert paper.cost(((f"{layer}.weight", 4),)).kl == pytest.approx(expected, rel=1e-3)


def test_an_input_alone(paper: Probe, reference: Model, noise: CalibrationSet) -> None:
    layer = "blocks.2.attn.proj"
    module = copy.deepcopy(reference.module)
    seen: list[Tensor] = []
    hook = module.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = pixels(noise)
    exact = module(images)
    hook.remove()
    quantizer = UniformQuantizer(4, symmetric=False).fit(seen[0])
    module.get_submodule(layer).register_forward_pre_hook(lambda _, args: (quantizer(args[0]),))
    assert paper.cost(((f"{layer}.input", 4),)).kl == pytest.approx(kl_between(exact, module(images)), rel=1e-2)


def test_a_parameter_alone(paper: Probe, reference: Model, noise: CalibrationSet) -> None:
    module: Any = copy.deepcopy(reference.module)
    module.pos_embed.copy_(UniformQuantizer(4, symmetric=False).fit(module.pos_embed)(module.pos_embed))
    images = pixels(noise)
    assert paper.cost((("pos_embed", 4),)).kl == pytest.approx(kl_between(reference(images), module(images)), rel=1e-3)


def test_tokens_joined_to_the_patches_share_their_quantizer(paper: Probe) -> None:
    tokens: Any = paper.module.cls_token
    before = tokens.clone()
    inside: list[Tensor] = []
    hook = paper.module.patch_embed.register_forward_hook(lambda *_: inside.append(tokens.clone()))
    site = "patch_embed.norm.output"
    paper.cost(((site, 4),))
    hook.remove()
    assert torch.equal(inside[0], paper.quantizer(site, 4)(before))
    assert not torch.equal(inside[0], before)


def test_all_at_once_is_the_quantized_model(paper: Probe, reference: Model, noise: CalibrationSet) -> None:
    quantized = dfq.quantize(reference, "w4a4", calibration=noise, recipe="paper", progress=False)
    images = pixels(noise)
    together = paper.cost(tuple((p.site.name, p.bits) for p in paper.planned))
    # A few values are rounded to the other side; whole models are alike, not equal.
    assert together.kl == pytest.approx(kl_between(reference(images), quantized(images)), rel=0.1)


def test_what_was_quantized_is_put_back(paper: Probe, reference: Model, noise: CalibrationSet) -> None:
    paper.cost(tuple((p.site.name, p.bits) for p in paper.planned))
    assert paper.cost(()) == Cost(0.0, math.inf, 0.0)
    assert not any(isinstance(module, Quantizer) for module in paper.module.modules())
    images = pixels(noise)
    assert torch.allclose(paper.module(images), reference(images), atol=1e-5)


def test_weights_meet_no_means_of_positions(reference: Model, noise: CalibrationSet) -> None:
    name = "blocks.1.mlp.fc1"
    base = load_recipe("paper")
    inputs = {f"{name}.input": {"dynamic_up_to": 7, "position_rank": 8}}
    probe = Probe(reference, parse_bits("w3a4"), replace(base, sites=base.sites | inputs), noise, batch_size=8)
    trial = ((f"{name}.weight", 3),)
    mean = probe.module.get_submodule(name).position_mean
    assert isinstance(mean, PositionMean)
    places = mean.common()
    module = copy.deepcopy(reference.module)
    weight: Any = module.get_submodule(name).weight
    change = UniformQuantizer(3, symmetric=True, granularity=PerAxis(0)).fit(weight)(weight) - weight
    module.get_submodule(name).register_forward_hook(lambda _, args, y: y + (args[0] - places) @ change.T)
    images = pixels(noise)
    expected = kl_between(reference(images), module(images))
    assert probe.costs([trial], progress=False)[trial].kl == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("run", [4, 8])
def test_means_of_positions_are_apart_at_the_bits_that_have_them(
    run: int, reference: Model, noise: CalibrationSet
) -> None:
    """Whatever the bits of the run: a trial costs what it would in a model made with its bits."""
    layer, base = "blocks.1.mlp.fc1", load_recipe("paper")
    few, many = (((f"{layer}.input", bits), (f"{layer}.weight", bits)) for bits in (4, 6))

    def costs(run: int, rank: int) -> dict[Trial, Cost]:
        inputs = {f"{layer}.input": {"dynamic_up_to": 5, "position_rank": rank}}
        recipe = replace(base, sites=base.sites | inputs)
        probe = Probe(reference, parse_bits(f"w{run}a{run}"), recipe, noise, batch_size=8)
        return probe.costs([few, many], progress=False)

    found, without, other = costs(run, 8), costs(run, 0), costs(12 - run, 8)
    assert found[few].kl < 0.9 * without[few].kl
    assert found[many].kl == pytest.approx(without[many].kl, rel=1e-3)
    for trial in (few, many):
        assert found[trial].kl == pytest.approx(other[trial].kl, rel=1e-3)


def test_ranges_per_channel_are_moved_first(reference: Model, noise: CalibrationSet) -> None:
    base = load_recipe("paper")
    recipe = replace(base, reparametrize="searched", sites=base.sites | {"*.fc1.input": {"granularity": "channel"}})
    probe = Probe(reference, parse_bits("w4a4"), recipe, noise, batch_size=8)
    trial = (("blocks.0.mlp.fc1.input", 4),)
    moved = probe.costs([trial], progress=False)[trial]
    plain = Probe(reference, parse_bits("w4a4"), base, noise, batch_size=8).costs([trial], progress=False)[trial]
    assert 0 < moved.kl < plain.kl
    scale = probe.quantizer(*trial[0]).tensors()["scale"]
    assert scale.shape == (1,)
    images = pixels(noise)
    assert torch.allclose(probe.module(images), reference(images), atol=1e-4)


def test_a_swin(tiny_swin: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    model = tiny_swin()
    grid = torch.ones(5, 8, 8, dtype=torch.bool)
    result = sensitivity(model, "w4a4", calibration=images_for(mask=grid), progress=False)
    names = [site.name for site in result.sites]
    assert "layers.1.downsample.reduction.weight" in names
    assert "layers.1.blocks.1.attn.softmax" in names
    assert all(site.cost.kl > 0 for site in result.sites)


def test_more_bits_cost_less(reference: Model, noise: CalibrationSet) -> None:
    probe = Probe(reference, parse_bits("w4a4"), load_recipe(DEFAULT_RECIPE), noise, batch_size=8)
    trials = [(("blocks.0.attn.qkv.weight", bits), ("blocks.0.attn.qkv.input", bits)) for bits in (2, 4, 8)]
    two, four, eight = (cost.kl for cost in probe.costs(trials, progress=False).values())
    assert two > 4 * four > 16 * eight > 0


def test_only_what_follows_is_run_again(reference: Model, noise: CalibrationSet) -> None:
    probe = Probe(reference, parse_bits("w4a4"), load_recipe(DEFAULT_RECIPE), noise, batch_size=8)
    runs: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            runs[name] = runs.get(name, 0) + 1

        return add

    for name in ("patch_embed", "blocks.0", "blocks.2", "head"):
        probe.module.get_submodule(name).register_forward_hook(count(name))
    probe.costs([((f"blocks.2.{part}.weight", 4),) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")], progress=False)
    assert runs == {"patch_embed": 1, "blocks.0": 1, "blocks.2": 4, "head": 4}


# --- what is told


def test_every_site_in_order(found: Sensitivity) -> None:
    names = [site.name for site in found.sites]
    assert len(names) == len(set(names)) == 52  # 4 blocks of 4 layers and 4 attention operands; patch embedding, head
    assert names[0] == "patch_embed.proj.input"
    assert names[-1] == "head.weight"
    assert {site.name: site.kind for site in found.sites if site.name.startswith("blocks.0.attn")} == {
        "blocks.0.attn.q": "attention",
        "blocks.0.attn.k": "attention",
        "blocks.0.attn.v": "attention",
        "blocks.0.attn.softmax": "attention",
        "blocks.0.attn.qkv.input": "input",
        "blocks.0.attn.qkv.weight": "weight",
        "blocks.0.attn.proj.input": "input",
        "blocks.0.attn.proj.weight": "weight",
    }
    assert {site.bits for site in found.sites if site.name.startswith("blocks.")} == {4}
    assert {site.bits for site in found.sites if not site.name.startswith("blocks.")} == {8}
    assert all(site.cost.kl > 0 for site in found.sites)
    assert SiteCost("pos_embed", 8, found.together).kind == SiteCost("blocks.0.residual_mlp", 8, found.together).kind


def test_the_first_images_of_a_set(found: Sensitivity, reference: Model, noise: CalibrationSet) -> None:
    assert (found.num_images, found.method) == (4, "gaussian")
    four = replace(noise, images=noise.images[:4], mask=noise.mask[:4], labels=None, confidence=None)
    assert sensitivity(reference, "w4a4", calibration=four, progress=False).sites == found.sites


def test_plain_values(found: Sensitivity) -> None:
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (plain["model"], plain["bits"], plain["recipe"], plain["num_images"]) == (
        "reference",
        "w4a4",
        DEFAULT_RECIPE,
        4,
    )
    first = found.sites[0]
    assert plain["sites"][0] == {
        "name": "patch_embed.proj.input",
        "kind": "input",
        "bits": 8,
        "kl": first.cost.kl,
        "sqnr_db": first.cost.sqnr_db,
        "changed": first.cost.changed,
    }
    assert plain["kl_sum"] == pytest.approx(np.sum([site["kl"] for site in plain["sites"]]))
    assert plain["together"]["kl"] == found.together.kl
    assert Sensitivity.from_dict(plain) == found


def test_the_table() -> None:
    sites = (
        SiteCost("blocks.0.attn.q", 4, Cost(0.5, 10.0, 25.0)),
        SiteCost("head.input", 8, Cost(0.0, math.inf, 0.0)),
        SiteCost("head.weight", 8, Cost(0.002, 31.26, 0.0)),
    )
    told = Sensitivity("tiny", "w4a4", "default", 4, "smi", sites, Cost(0.6, 9.0, 25.0))
    assert told.table(limit=2).splitlines() == [
        "tiny  w4a4  recipe default  4 images (smi)",
        "  site, alone                     bits  KL, nats  SQNR, dB",
        "  blocks.0.attn.q                    4  5.00e-01      10.0",
        "  head.weight                        8  2.00e-03      31.3",
        "  and 1 that cost less",
        "",
        "  weights (1)                           2.00e-03",
        "  inputs of layers (1)                  0.00e+00",
        "  q, k, v and attention maps (1)        5.00e-01",
        "  sum                                   5.02e-01",
        "  all at once, measured                 6.00e-01       9.0",
    ]
    assert "identical" in told.table()
    assert told.to_dict()["sites"][1]["sqnr_db"] is None
    assert Sensitivity.from_dict(told.to_dict()) == told


# --- what cannot be


def test_wrong_arguments(reference: Model, noise: CalibrationSet, images_for: Callable[..., CalibrationSet]) -> None:
    with pytest.raises(UsageError, match="w9a4"):
        sensitivity(reference, "w9a4", calibration=noise, progress=False)
    with pytest.raises(UsageError, match="number of images is 0"):
        sensitivity(reference, calibration=noise, num_images=0, progress=False)
    with pytest.raises(DfqError, match="unknown recipe 'defalt'"):
        sensitivity(reference, calibration=noise, recipe="defalt", progress=False)
    with pytest.raises(DfqError, match="patches"):
        sensitivity(reference, calibration=images_for(mask=torch.ones(5, 2, 2, dtype=torch.bool)), progress=False)


def test_activations_that_are_not_finite(tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    model = tiny()
    norm: Any = model.module.get_submodule("blocks.1.norm2")
    assert isinstance(norm, nn.LayerNorm)
    norm.bias.fill_(math.inf)  # Part of the bias of fc1 by the time anything passes.
    with pytest.raises(DfqError, match=r"cannot find a range for blocks\.1\.mlp\.fc2\.input: .* NaN or infinity"):
        sensitivity(model, calibration=images_for(), progress=False)


@pytest.mark.parametrize(("recipe", "filled"), [("fast", True), ("paper", False)])
def test_sparse_images(
    recipe: str, filled: bool, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[:2, :2] = False
    images = images_for(mask=mask)
    result = sensitivity(tiny(), calibration=images, recipe=recipe, progress=False)
    assert result.num_images == 5
    assert result.together.kl > 0
    other = sensitivity(tiny(), calibration=with_leaves(images), recipe=recipe, progress=False)
    assert (other.together == result.together) is filled
