"""Bits of each layer: the integer program, the choice on a real model, and the recipe it ends in."""

from __future__ import annotations

import itertools
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.cli import main
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.ptq.layer_costs import LayerCosts, layer_costs
from dfq.ptq.mixed_precision import (
    POINTS_PER_NAT,
    MixedPrecision,
    assign,
    choose_bits,
    mixed_precision,
    recipe_to_toml,
    with_bits,
    write_recipe,
)
from dfq.ptq.modules import PositionMean
from dfq.recipe import DEFAULT_RECIPE, Recipe, load_recipe, preset_names, recipe_from_dict

Table = NDArray[np.float64]
Sizes = NDArray[np.int64]


def total(table: NDArray[np.float64] | NDArray[np.int64], picked: tuple[int, ...] | NDArray[np.intp]) -> float:
    return float(sum(row[option] for row, option in zip(table, picked, strict=True)))


def chosen(costs: Table, sizes: Sizes, **limit: float) -> list[int] | None:
    picked = assign(costs, sizes, **limit)
    return None if picked is None else [int(option) for option in picked]


def every_choice(costs: Table) -> list[tuple[int, ...]]:
    return list(itertools.product(range(costs.shape[1]), repeat=len(costs)))


def random_tables(seed: int) -> tuple[Table, Sizes]:
    """Seven items of three options; costs over eight decades, as they are measured, some larger at more bits."""
    generator = np.random.default_rng(seed)
    costs = 10 ** generator.uniform(-8, 0, (7, 3))
    if seed % 3:
        costs = -np.sort(-costs, axis=1)
    weights = generator.integers(1_000, 2_000_000, (7, 1))
    return costs, weights * np.array([4, 6, 8]) // 8


@pytest.fixture(scope="module")
def costs(reference: Model, noise: CalibrationSet) -> LayerCosts:
    return layer_costs(reference, "w4a4", calibration=noise, num_images=4, progress=False)


@pytest.fixture(scope="module")
def mixed(costs: LayerCosts) -> MixedPrecision:
    return choose_bits(costs, target_size=0.85)


def everything_fixed() -> Recipe:
    base = load_recipe(DEFAULT_RECIPE)
    return replace(base, sites=base.sites | {"*.weight": {"bits": 5}})


# --- the integer program


def test_by_hand() -> None:
    costs = np.array([[1.0, 0.5, 0.0], [9.0, 2.0, 1.0]])
    sizes = np.array([[4, 6, 8], [4, 6, 8]])
    # 12 bytes: (4, 8) costs 2, (6, 6) costs 2.5, (8, 4) costs 9.
    assert chosen(costs, sizes, max_size=12) == [0, 2]
    # A cost of 3: (4, 6) takes 10 bytes and costs 3; anything smaller costs 10.
    assert chosen(costs, sizes, max_cost=3.0) == [0, 1]


@pytest.mark.parametrize("seed", range(12))
def test_the_best_within_a_size_is_that_of_trying_all(seed: int) -> None:
    costs, sizes = random_tables(seed)
    limit = int(sizes.min(1).sum() * 1.05 + seed / 12 * (sizes.max(1).sum() - sizes.min(1).sum()))
    picked = assign(costs, sizes, max_size=limit)
    assert picked is not None
    assert total(sizes, picked) <= limit
    best = min(total(costs, choice) for choice in every_choice(costs) if total(sizes, choice) <= limit)
    assert total(costs, picked) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_within_a_cost_is_that_of_trying_all(seed: int) -> None:
    costs, sizes = random_tables(seed)
    limit = float(costs.min(1).sum() * 1.5 + 10.0 ** (seed / 2 - 6))
    picked = assign(costs, sizes, max_cost=limit)
    assert picked is not None
    assert total(costs, picked) <= limit * (1 + 1e-6)
    within = [choice for choice in every_choice(costs) if total(costs, choice) <= limit]
    smallest = min(total(sizes, choice) for choice in within)
    assert total(sizes, picked) == smallest
    best = min(total(costs, choice) for choice in within if total(sizes, choice) == smallest)
    assert total(costs, picked) == pytest.approx(best, rel=1e-6)


def test_of_choices_of_one_size_the_cheapest() -> None:
    costs = np.array([[5e-9, 1e-9], [7e-9, 1e-9], [9e-9, 1e-9]])
    sizes = np.array([[4, 8], [4, 8], [4, 8]])
    # 16 bytes are the least that cost 16e-9 at most: raising the first leaves 17e-9, the second 15e-9, the third 13e-9.
    assert chosen(costs, sizes, max_cost=16e-9) == [0, 0, 1]


def test_costs_of_zero_and_limits_out_of_reach() -> None:
    sizes = np.array([[4, 8], [4, 8]])
    assert chosen(np.zeros((2, 2)), sizes, max_cost=0.0) == [0, 0]
    assert chosen(np.ones((2, 2)), sizes, max_size=8) == [0, 0]
    assert assign(np.ones((2, 2)), sizes, max_size=7) is None
    assert assign(np.ones((2, 2)), sizes, max_cost=1.9) is None
    with pytest.raises(ValueError, match="max_size or max_cost"):
        assign(np.ones((2, 2)), sizes)


# --- the choice


def test_within_a_size(mixed: MixedPrecision, reference: Model, noise: CalibrationSet) -> None:
    assert mixed.weight_bytes <= 0.85 * mixed.costs.largest_bytes
    assert len(mixed.costs.layers) == len(mixed.bits) == 16
    assert len(set(mixed.bits.values())) > 1
    table = np.array([list(layer.costs.values()) for layer in mixed.costs.layers])
    # 4 bits in half of the layers, whichever, and 8 in the others would cost more on the average.
    assert mixed.kl - mixed.costs.other_kl < (table[:, 0].sum() + table[:, 2].sum()) / 2
    quantized = dfq.quantize(reference, "w4a4", calibration=noise, recipe=mixed.recipe, progress=False)
    for layer, bits in mixed.bits.items():
        assert quantized.sites[f"{layer}.weight"].bits == quantized.sites[f"{layer}.input"].bits == bits
    assert {quantized.sites[f"{layer}.weight"].bits for layer in ("head", "patch_embed.proj")} == {8}
    assert quantized.sites["blocks.0.attn.q"].bits == 4
    assert mixed.weight_bytes == pytest.approx(quantized.weight_bytes, rel=0.01)


def test_sizes_are_those_of_packed_integers_and_of_means_of_positions(costs: LayerCosts) -> None:
    qkv, proj = costs.layers[:2]
    assert (qkv.name, qkv.sites) == ("blocks.0.attn.qkv", ("blocks.0.attn.qkv.input", "blocks.0.attn.qkv.weight"))
    count, mean = 64 * 192, costs.probe.module.get_submodule("blocks.0.attn.qkv").position_mean
    assert isinstance(mean, PositionMean)
    rank = mean.positions.shape[1]
    # Two bytes for each of 65 positions, 64 inputs and 192 outputs; none where ranges are not per token.
    means = 2 * rank * (65 + 64 + 192)
    assert qkv.sizes == {4: count // 2 + means, 6: count * 3 // 4 + means, 8: count}
    assert proj.sizes == {4: 64 * 64 // 2, 6: 64 * 64 * 3 // 4, 8: 64 * 64}


def test_means_of_positions_count_where_only_fewer_bits_than_the_run_has_have_them(
    reference: Model, noise: CalibrationSet
) -> None:
    base = load_recipe(DEFAULT_RECIPE)
    sites = {
        name: changes | ({"dynamic_up_to": 5} if "dynamic_up_to" in changes else {})
        for name, changes in base.sites.items()
    }
    recipe = replace(base, sites=sites)
    costs = layer_costs(reference, "w4a6", calibration=noise, recipe=recipe, num_images=8, progress=False)
    chosen = {layer.name: 4 if layer.name == "blocks.0.attn.qkv" else 6 for layer in costs.layers}
    few, *others = costs.layers
    assert few.sizes[4] > 64 * 192 // 2
    assert (few.sizes[6], few.sizes[8]) == (64 * 192 * 3 // 4, 64 * 192)
    mixed = with_bits(recipe, {site: chosen[layer.name] for layer in costs.layers for site in layer.sites})
    quantized = dfq.quantize(reference, "w4a6", calibration=noise, recipe=mixed, progress=False)
    assert any(name.startswith("blocks.0.attn.qkv.position_mean") for name in quantized.tensors())
    expected = costs.other_bytes + few.sizes[4] + sum(layer.sizes[6] for layer in others)
    assert quantized.weight_bytes == pytest.approx(expected, rel=0.005)


def test_a_size_in_bytes(mixed: MixedPrecision) -> None:
    again = choose_bits(mixed.costs, target_size=mixed.weight_bytes)
    assert (again.bits, again.kl, again.measured) == (mixed.bits, mixed.kl, mixed.measured)


def test_bits_of_every_layer_alike(costs: LayerCosts) -> None:
    everywhere_8 = choose_bits(costs, target_size=1.0)
    smallest = costs.other_bytes + sum(layer.sizes[4] for layer in costs.layers)
    everywhere_4 = choose_bits(costs, target_size=smallest)
    assert set(everywhere_4.bits.values()) == {4}
    # That is the run itself, all at once.
    assert everywhere_4.measured.kl == pytest.approx(costs.sensitivity.together.kl)
    assert everywhere_8.measured.kl < everywhere_4.measured.kl


def test_within_a_drop(costs: LayerCosts) -> None:
    best = POINTS_PER_NAT * (costs.other_kl + sum(min(layer.costs.values()) for layer in costs.layers))
    tight, loose = (choose_bits(costs, target_drop=best * factor) for factor in (1.01, 1.3))
    assert tight.drop == POINTS_PER_NAT * tight.kl
    assert best <= tight.drop <= best * 1.01
    assert tight.drop < loose.drop <= best * 1.3
    assert tight.weight_bytes > loose.weight_bytes


def test_where_activations_have_8_bits_only_weights_are_chosen(reference: Model, noise: CalibrationSet) -> None:
    found = layer_costs(reference, "w4a8", calibration=noise, num_images=2, progress=False)
    assert all(layer.sites == (f"{layer.name}.weight",) for layer in found.layers)
    alone = {site.name: site.cost.kl for site in found.sensitivity.sites}
    assert all(layer.costs[4] == alone[f"{layer.name}.weight"] for layer in found.layers)
    assert found.other_kl == pytest.approx(sum(alone.values()) - sum(layer.costs[4] for layer in found.layers))


def test_what_a_recipe_fixes_is_not_chosen(reference: Model, noise: CalibrationSet) -> None:
    base = load_recipe(DEFAULT_RECIPE)
    recipe = replace(base, first_last_bits=None, sites=base.sites | {"blocks.[123].*.weight": {"bits": 4}})
    found = layer_costs(reference, "w4a8", calibration=noise, recipe=recipe, num_images=1, progress=False)
    block = [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [layer.name for layer in found.layers] == ["patch_embed.proj", *block, "head"]


def test_what_is_not_quantized_counts_in_full(reference: Model, noise: CalibrationSet) -> None:
    base = load_recipe(DEFAULT_RECIPE)
    recipe = replace(base, sites=base.sites | {"head.*": {"quantize": False}, "blocks.2.*": {"quantize": False}})
    found = mixed_precision(
        reference, "w4a16", target_size=0.9, calibration=noise, recipe=recipe, num_images=1, progress=False
    )
    quantized = dfq.quantize(reference, "w4a16", calibration=noise, recipe=found.recipe, progress=False)
    assert found.weight_bytes == pytest.approx(quantized.weight_bytes, rel=0.01)


def test_targets_that_make_no_sense(reference: Model, noise: CalibrationSet, costs: LayerCosts) -> None:
    def refused(kind: type[DfqError], said: str, **target: float) -> None:
        with pytest.raises(kind, match=said):
            choose_bits(costs, **target)

    refused(UsageError, "either a target size or a target drop")
    refused(UsageError, "either a target size or a target drop", target_size=0.5, target_drop=1.0)
    refused(UsageError, "target size must be a positive number, not 0", target_size=0.0)
    refused(UsageError, "target drop must be a positive number, not nan", target_drop=float("nan"))
    refused(DfqError, r"the target is 0\.01 MB, and at its smallest the model still takes", target_size=1e4)
    refused(DfqError, r"points at least, .* and the target is 1e-09", target_drop=1e-9)
    with pytest.raises(UsageError, match="fixes the bits of every layer"):
        mixed_precision(reference, target_size=0.5, calibration=noise, recipe=everything_fixed())
    with pytest.raises(UsageError, match="either a target size or a target drop"):
        mixed_precision(reference, calibration=noise)


def test_the_table_and_plain_values(mixed: MixedPrecision) -> None:
    lines = mixed.table().splitlines()
    assert lines[1].split() == ["layer", "bits", "kB", "KL,", "nats"]
    first = mixed.costs.layers[0]
    bits = mixed.bits[first.name]
    assert lines[2].split() == [first.name, str(bits), f"{first.sizes[bits] / 1000:.1f}", f"{first.costs[bits]:.2e}"]
    assert f"about {mixed.drop:.1f} points" in mixed.table()
    plain = json.loads(json.dumps(mixed.to_dict(), allow_nan=False))
    assert plain["weight_bytes"] == mixed.weight_bytes
    assert {layer["name"]: layer["bits"] for layer in plain["layers"]} == mixed.bits
    assert plain["layers"][0]["options"][1] == {"bits": 6, "kl": first.costs[6], "bytes": first.sizes[6]}
    assert len(plain["sensitivity"]["sites"]) == 52


# --- the recipe


@pytest.mark.parametrize("name", preset_names())
def test_a_recipe_is_the_same_after_a_file(name: str, tmp_path: Path) -> None:
    recipe = with_bits(load_recipe(name), {"blocks.0.attn.qkv.weight": 6, "head.weight": 4})
    write_recipe(recipe, tmp_path / "mine.toml")
    assert load_recipe(tmp_path / "mine.toml") == recipe


def test_bits_come_on_top_of_what_a_site_has(tmp_path: Path) -> None:
    base = load_recipe(DEFAULT_RECIPE)
    base = replace(base, sites=base.sites | {"blocks.0.attn.qkv.weight": {"range": "minmax"}})
    settings = with_bits(base, {"blocks.0.attn.qkv.weight": 6}).settings("blocks.0.attn.qkv.weight", is_weight=True)
    assert (settings.range, settings.bits) == ("minmax", 6)
    assert base.sites["blocks.0.attn.qkv.weight"] == {"range": "minmax"}


def test_text_that_toml_has_to_escape() -> None:
    summary = 'quotes " and \\ and \n and \x7f and é and 😀'
    recipe = replace(load_recipe("paper"), name="a = [b]", summary=summary, first_last_bits=6)
    content = tomllib.loads(recipe_to_toml(recipe))
    assert content["summary"] == summary
    assert recipe_from_dict(content, name="other", where="here") == recipe


def test_no_sites_at_all() -> None:
    recipe = replace(load_recipe("paper"), sites={})
    assert recipe_from_dict(tomllib.loads(recipe_to_toml(recipe)), name="x", where="here") == recipe


# --- the command


def status(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


COMMAND = ("sensitivity", "reference", "--method", "gaussian", "-n", 2, "--device", "cpu", "--quiet")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, chart = tmp_path / "costs.json", tmp_path / "costs.svg"
    assert status(*COMMAND, "--bits", "w4a8", "--json", numbers, "--chart", chart) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"reference  w4a8  recipe {DEFAULT_RECIPE}  2 images (gaussian)\n")
    plain = json.loads(numbers.read_text())
    assert (len(plain["sites"]), plain["num_images"]) == (52, 2)
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")


def test_the_command_chooses_bits_that_quantize_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, recipe, out = tmp_path / "set", tmp_path / "mixed.toml", tmp_path / "quantized"
    assert status("generate", "reference", "--method", "gaussian", "-n", 3, "--out", made, "--quiet") == 0
    chart, numbers = tmp_path / "costs.svg", tmp_path / "costs.json"
    options = ("--calibration", made, "--target-size", "70%", "--out", recipe, "--chart", chart, "--json", numbers)
    assert status(*COMMAND, "--bits", "w4a8", *options) == 0
    said = capsys.readouterr().out
    assert f"dfq quantize reference --bits w4a8 --recipe {recipe} --calibration {made} --out DIR" in said
    bits = {layer["name"]: layer["bits"] for layer in json.loads(numbers.read_text())["layers"]}
    assert chart.exists()
    quantize = ("quantize", "reference", "--bits", "w4a8", "--recipe", recipe, "--calibration", made, "--out", out)
    assert status(*quantize, "--device", "cpu", "--quiet") == 0
    sites = dfq.load(out).sites
    assert {name: sites[f"{name}.weight"].bits for name in bits} == bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target-size", "0"), "must be a size such as 3.5MB"),
        (("--target-size", "3..5MB"), "must be a size such as 3.5MB"),
        (("--target-size", "3 furlongs"), "must be a size such as 3.5MB"),
        (("--target-drop", "-1"), "must be above 0"),
        (("--target-size", "0.7", "--target-drop", "1"), "not allowed with"),
        (("--out", "mixed.toml"), "give --target-size or --target-drop too"),
        (("--target-size", "0.7", "--out", "mixed.json"), "the name must end in .toml"),
        (("--chart", "costs.png"), "the name must end in .svg"),
        (("--chart", "nowhere/costs.svg"), "there is no folder nowhere"),
        (("--bits", "w4"), "bits 'w4' are not to be had"),
    ],
)
def test_wrong_usage(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(dfq, "load_model", load_model)
    assert status(*COMMAND, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("3.5MB", 3.5e6), ("70%", 0.7), ("0.7", 0.7), ("1.5 MiB", 1.5 * 2**20), ("512000", 512000.0)]
)
def test_sizes_as_people_write_them(text: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def fake(*_args: object, target_size: float, **_kwargs: object) -> None:
        given.append(target_size)
        raise DfqError("enough")

    monkeypatch.setattr(dfq, "mixed_precision", fake)
    assert status(*COMMAND, "--target-size", text) == 1
    assert given == [pytest.approx(value)]
