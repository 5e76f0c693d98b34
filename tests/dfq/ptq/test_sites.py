"""Which tensors are sites, and what a recipe makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dfq.errors import RecipeError
from dfq.models import Model
from dfq.ptq.modules import adapt
from dfq.ptq.sites import PlannedSite, list_sites, plan_sites
from dfq.recipe import Bits, load_recipe, preset_names, recipe_from_dict

BLOCK_GEMM = {
    "attn.qkv.input",
    "attn.qkv.weight",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.softmax",
    "attn.proj.input",
    "attn.proj.weight",
    "mlp.fc1.input",
    "mlp.fc1.weight",
    "mlp.fc2.input",
    "mlp.fc2.weight",
}
BLOCK_FULL = BLOCK_GEMM | {
    "attn.scores",
    "attn.qkv.output",
    "attn.proj.output",
    "mlp.fc1.output",
    "mlp.fc2.output",
    "residual_attn",
    "residual_mlp",
}
ENDS_GEMM = {"patch_embed.proj.input", "patch_embed.proj.weight", "head.input", "head.weight"}
ENDS_FULL = ENDS_GEMM | {
    "patch_embed.proj.output",
    "patch_embed.norm.output",
    "pos_embed",
    "pos_drop.output",
    "head.output",
}


def in_blocks(names: set[str]) -> set[str]:
    return {f"blocks.{index}.{name}" for index in range(2) for name in names}


W4A6 = Bits(4, 6)


def planned(model: Model, recipe: dict[str, Any] | str, bits: Bits = W4A6) -> dict[str, PlannedSite]:
    made = load_recipe(recipe) if isinstance(recipe, str) else recipe_from_dict(recipe, name="mine", where="mine.toml")
    return {p.site.name: p for p in plan_sites(adapt(model.module), made, bits)}


def test_sites_of_both_scopes(tiny: Callable[..., Model]) -> None:
    module = adapt(tiny().module)
    gemm = [site.name for site in list_sites(module, "gemm")]
    full = [site.name for site in list_sites(module, "full")]
    assert set(gemm) == in_blocks(BLOCK_GEMM) | ENDS_GEMM
    assert set(full) == in_blocks(BLOCK_FULL) | ENDS_FULL
    assert len(gemm) == len(set(gemm))
    assert len(full) == len(set(full))


def test_every_site_but_the_position_embedding_is_an_attribute_of_its_owner(tiny: Callable[..., Model]) -> None:
    module = adapt(tiny().module)
    for site in list_sites(module, "full"):
        assert hasattr(module.get_submodule(site.owner), site.slot)


def test_a_model_without_position_embedding_has_no_sites_for_it(tiny: Callable[..., Model]) -> None:
    module = adapt(tiny(pos_embed="none", class_token=False, global_pool="avg").module)
    names = {site.name for site in list_sites(module, "full")}
    assert names == in_blocks(BLOCK_FULL) | ENDS_FULL - {"pos_embed", "pos_drop.output"}


def test_fast_keeps_first_and_last_at_8_bits(tiny: Callable[..., Model]) -> None:
    plan = planned(tiny("deit_tiny_distilled_patch16_224"), "fast")
    ends = ENDS_GEMM | {"head_dist.input", "head_dist.weight"}
    assert {name for name, p in plan.items() if p.bits == 8} == ends
    inner = set(plan) - ends
    assert {plan[name].bits for name in inner if name.endswith("weight")} == {4}
    assert {plan[name].bits for name in inner if not name.endswith("weight")} == {6}


def test_paper_quantizes_everything_but_softmax_at_the_nominal_bits(tiny: Callable[..., Model]) -> None:
    plan = planned(tiny(), "paper")
    left_out = {"attn.softmax", "attn.q", "attn.k", "attn.v", "mlp.fc1.output"}
    assert set(plan) == in_blocks(BLOCK_FULL - left_out) | ENDS_FULL
    for name, p in plan.items():
        assert p.bits == (4 if name.endswith("weight") else 6), name
        assert (p.settings.range, p.settings.quantizer) == ("minmax", "uniform"), name


def test_16_bit_activations_leave_only_weights(tiny: Callable[..., Model]) -> None:
    for preset in preset_names():
        plan = planned(tiny(), preset, Bits(4, None))
        assert plan
        assert all(p.site.is_weight for p in plan.values())


def test_overrides_by_glob_later_ones_win(tiny: Callable[..., Model]) -> None:
    recipe = {
        "scope": "gemm",
        "sites": {
            "blocks.*.mlp.*.weight": {"bits": 3},
            "blocks.1.mlp.fc2.weight": {"bits": 7, "granularity": "channel", "symmetric": True},
            "blocks.0.attn.softmax": {"quantize": False},
            "head.*": {"quantize": False},
        },
    }
    plan = planned(tiny(), recipe)
    assert plan["blocks.0.mlp.fc1.weight"].bits == 3
    assert plan["blocks.0.mlp.fc2.weight"].bits == 3
    assert plan["blocks.1.mlp.fc2.weight"].bits == 7
    assert plan["blocks.1.mlp.fc2.weight"].settings.granularity == "channel"
    assert plan["blocks.0.attn.qkv.weight"].bits == 4
    assert "blocks.0.attn.softmax" not in plan
    assert "blocks.1.attn.softmax" in plan
    assert not any(name.startswith("head.") for name in plan)


def test_bits_of_a_site_win_over_those_of_first_and_last_and_over_floating_point(tiny: Callable[..., Model]) -> None:
    recipe = {"first_last_bits": 8, "sites": {"head.weight": {"bits": 5}, "blocks.0.attn.q": {"bits": 6}}}
    plan = planned(tiny(), recipe, Bits(4, None))
    assert plan["head.weight"].bits == 5
    assert plan["patch_embed.proj.weight"].bits == 8
    assert plan["blocks.0.attn.q"].bits == 6
    assert {name for name, p in plan.items() if not p.site.is_weight} == {"blocks.0.attn.q"}


def test_a_pattern_without_a_site_is_refused_with_the_nearest(tiny: Callable[..., Model]) -> None:
    with pytest.raises(RecipeError, match=r"'blocks\.\*\.atn\.q' matches no site of this model; .*blocks\.0\.attn\.q$"):
        planned(tiny(), {"sites": {"blocks.*.atn.q": {"bits": 8}}})
    # Of another scope is not there either.
    with pytest.raises(RecipeError, match="matches no site"):
        planned(tiny(), {"scope": "gemm", "sites": {"blocks.*.attn.scores": {"bits": 8}}})


@pytest.mark.parametrize(
    ("pattern", "settings", "reason"),
    [
        ("head.weight", {"granularity": "head"}, "granularity 'head' is not for weights"),
        ("blocks.0.attn.softmax", {"quantizer": "twin_uniform"}, "needs split"),
        ("blocks.0.attn.softmax", {"split": "sign"}, "split belongs to the quantizers twin_uniform, log and"),
        ("blocks.0.attn.softmax", {"base": "2"}, "base belongs to the log quantizer"),
        ("blocks.0.attn.q", {"outliers": 20, "granularity": "head"}, "one range for all, not with granularity 'head'"),
        ("head.input", {"outliers": 20, "granularity": "channel"}, "one range for all, not with granularity 'channel'"),
        (
            "blocks.0.attn.softmax",
            {"quantizer": "log", "split": "magnitude", "granularity": "head"},
            "uniform quantizer",
        ),
        ("blocks.0.mlp.fc1.weight", {"outliers": 20}, "outliers are kept apart in activations, not in weights"),
        ("blocks.0.mlp.fc1.weight", {"range": "token_mse"}, "range 'token_mse' is not for weights"),
        ("blocks.0.mlp.fc1.input", {"range": "output_mse"}, "range 'output_mse' is not for activations"),
        ("blocks.0.attn.v", {"range": "probability_mse"}, "range 'probability_mse' is only for softmax"),
        ("head.input", {"percent": 99.0}, "percent"),
        ("head.input", {"granularity": "head"}, "granularity 'head' is only for q, k, v"),
        ("blocks.0.attn.softmax", {"granularity": "channel"}, "granularity 'channel' is not for attention maps"),
        ("patch_embed.proj.input", {"granularity": "channel"}, "not for attention maps and images"),
        ("patch_embed.proj.input", {"dynamic_up_to": 8}, "dynamic_up_to is only for inputs of linears, q and k"),
        ("blocks.0.attn.q", {"dynamic_up_to": 8, "position_rank": 8}, "position_rank is only for inputs of linears"),
        ("blocks.0.attn.v", {"dynamic_up_to": 8}, "dynamic_up_to is only for inputs of linears, q and k"),
        ("blocks.0.mlp.fc2.input", {"dynamic_up_to": 7, "quantizer": "log", "split": "sign"}, "for the uniform quant"),
    ],
)
def test_settings_that_contradict_each_other_name_the_site(
    pattern: str, settings: dict[str, Any], reason: str, tiny: Callable[..., Model]
) -> None:
    with pytest.raises(RecipeError, match=rf"recipe mine, site {pattern}: .*{reason}"):
        planned(tiny(), {"sites": {pattern: settings}})
