"""Recipes: what the presets say, what a file may say, and what is said of mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfq.errors import RecipeError, UsageError
from dfq.recipe import (
    DEFAULT_RECIPE,
    PRESETS,
    Bits,
    Compensation,
    OutputSearch,
    Reconstruction,
    SiteSettings,
    load_recipe,
    parse_bits,
    preset_names,
    recipe_from_dict,
)


def made(content: dict[str, Any]) -> Any:
    return recipe_from_dict(content, name="mine", where="mine.toml")


@pytest.mark.parametrize(
    ("text", "bits"),
    [("w4a8", Bits(4, 8)), ("W8A8", Bits(8, 8)), ("w2a2", Bits(2, 2)), ("w4a16", Bits(4, None)), ("w3a5", Bits(3, 5))],
)
def test_bits(text: str, bits: Bits) -> None:
    assert parse_bits(text) == bits
    assert str(bits) == text.lower()


@pytest.mark.parametrize(
    "text", ["w1a0", "w4", "foo", "w9a8", "w16a8", "w4a9", "w4a15", "w4a1", "", "a8w4", "w4a8 ", "w-4a8", "w4.5a8"]
)
def test_bits_that_are_not_to_be_had(text: str) -> None:
    with pytest.raises(UsageError, match=r"are not to be had: give wXaY .* such as w4a8") as caught:
        parse_bits(text)
    assert repr(text) in str(caught.value)


def test_the_presets_load_under_their_names() -> None:
    assert {"fast", "paper"} <= set(preset_names())
    assert DEFAULT_RECIPE in preset_names()
    for name in preset_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert len(recipe.summary) > 10
        assert load_recipe(PRESETS / f"{name}.toml") == recipe


def test_the_scopes_of_the_presets() -> None:
    fast, paper = load_recipe("fast"), load_recipe("paper")
    assert (fast.scope, fast.first_last_bits) == ("gemm", 8)
    assert (paper.scope, paper.first_last_bits) == ("full", None)
    # FIELD 1.4: symmetric per channel for weights, asymmetric per tensor for activations, min-max for both.
    assert paper.weights == SiteSettings(symmetric=True, granularity="channel", range="minmax")
    assert paper.activations == SiteSettings(symmetric=False, granularity="tensor", range="minmax")
    assert not paper.settings("blocks.3.attn.softmax", is_weight=False).quantize
    for block in ("blocks.3", "layers.1.blocks.0"):
        softmax = fast.settings(f"{block}.attn.softmax", is_weight=False)
        gelu = fast.settings(f"{block}.mlp.fc2.input", is_weight=False)
        assert (softmax.quantizer, softmax.split) == ("least_error", "magnitude")
        assert (gelu.quantizer, gelu.split) == ("least_error", "sign")


@pytest.mark.parametrize("name", preset_names())
def test_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    content = json.loads(json.dumps(recipe.to_dict()))
    assert recipe_from_dict(content, name="other", where="config.json") == recipe


def test_round_trip_of_everything_a_recipe_can_say() -> None:
    recipe = made(
        {
            "name": "all of it",
            "summary": "s",
            "scope": "full",
            "first_last_bits": 6,
            "weights": {"symmetric": True, "granularity": "channel", "range": "percentile", "percent": 99.5, "bits": 3},
            "activations": {"quantize": False},
            "sites": {"a.*": {"quantizer": "twin_uniform", "split": "sign"}, "a.b": {"bits": 5}},
        }
    )
    assert recipe.to_dict()["weights"]["percent"] == 99.5
    assert recipe_from_dict(recipe.to_dict(), name="x", where="y") == recipe


def test_a_preset_with_weights_in_groups() -> None:
    plain, grouped = load_recipe("fast"), load_recipe("fast-g32")
    assert grouped.name == "fast-g32"
    within = grouped.settings("blocks.3.mlp.fc1.weight", is_weight=True)
    assert within == replace(plain.weights, granularity="group", group_size=32)
    for layer in ("patch_embed.proj", "head", "head.fc"):
        (quantizer,) = grouped.settings(f"{layer}.weight", is_weight=True).build(8, is_weight=True)
        assert quantizer.describe()["granularity"] == {"type": "per_axis", "axis": 0}
    (quantizer,) = within.build(4, is_weight=True)
    assert quantizer.describe()["granularity"] == {"type": "per_group", "size": 32}
    for site in ("blocks.3.mlp.fc2.input", "head.input"):
        assert grouped.settings(site, is_weight=False) == plain.settings(site, is_weight=False)
    # Where patch embedding and classifier have the bits of the rest, they have its groups too.
    assert load_recipe("paper-g64").settings("head.weight", is_weight=True).group_size == 64
    # What a recipe says of these layers stays.
    assert load_recipe("deploy-g64").settings("head.weight", is_weight=True).bits == 7
    assert recipe_from_dict(json.loads(json.dumps(grouped.to_dict())), name="x", where="y") == grouped


def test_groups_are_of_64_if_nothing_is_said() -> None:
    (quantizer,) = made({"weights": {"granularity": "group"}}).weights.build(4, is_weight=True)
    assert quantizer.describe()["granularity"] == {"type": "per_group", "size": 64}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('summary = "a"\n[activations]\nrange = "percentile"\npercent = 99.9\n[sites."*.q"]\nbits = 6\n')
    for given in (file, str(file)):
        recipe = load_recipe(given)
        assert recipe.name == "mine"
        assert recipe.activations.percent == 99.9
        assert recipe.settings("blocks.0.attn.q", is_weight=False).bits == 6
        assert recipe.settings("blocks.0.attn.k", is_weight=False).bits is None


def test_later_patterns_win() -> None:
    recipe = made({"sites": {"*.q": {"bits": 4, "symmetric": True}, "blocks.1.*": {"bits": 6}}})
    assert recipe.settings("blocks.1.attn.q", is_weight=False) == SiteSettings(bits=6, symmetric=True)
    assert recipe.settings("blocks.0.attn.q", is_weight=False) == SiteSettings(bits=4, symmetric=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weigths": {}}, r"mine\.toml: unknown key 'weigths' \(did you mean 'weights'\?\); known are name"),
        ({"zzz": 1}, r"mine\.toml: unknown key 'zzz'; known are"),
        (
            {"weights": {"symetric": True}},
            r"mine\.toml, weights: unknown key 'symetric' \(did you mean 'symmetric'\?\)",
        ),
        ({"sites": {"*.q": {"bit": 4}}}, r"mine\.toml, sites\.'\*\.q': unknown key 'bit' \(did you mean 'bits'\?\)"),
        ({"scope": "all"}, "scope must be one of 'gemm', 'full', not 'all'"),
        ({"first_last_bits": 9}, "first_last_bits must be one of 2, 3, 4, 5, 6, 7, 8, not 9"),
        ({"first_last_bits": True}, "first_last_bits must be one of .* not True"),
        ({"weights": {"bits": 1}}, "bits must be one of .* not 1"),
        ({"weights": {"bits": 4.0}}, "bits must be one of .* not 4.0"),
        ({"weights": {"symmetric": 1}}, "symmetric must be one of True, False, not 1"),
        ({"weights": {"range": "kl"}}, "range must be one of 'minmax', .* not 'kl'"),
        ({"weights": {"quantizer": ["uniform"]}}, "quantizer must be one of"),
        ({"activations": {"granularity": "group"}}, "activations: granularity 'group' is not for activations"),
        (
            {"weights": {"granularity": "group", "group_size": 4}},
            "group_size must be a whole number from 8 to 65536, not 4",
        ),
        ({"weights": {"granularity": "head"}}, r"mine\.toml, weights: granularity 'head' is not for weights"),
        (
            {"activations": {"range": "percentile", "percent": 20}},
            "percent must lie above 50 and at most at 100, not 20",
        ),
        ({"activations": {"range": "percentile", "percent": "99"}}, "percent must lie above 50 .* not '99'"),
        ({"activations": {"range": "minmax", "percent": 99.0}}, r"mine\.toml, activations: .*percent"),
        ({"activations": {"quantizer": "twin_uniform"}}, "needs split = 'magnitude' or 'sign'"),
        ({"activations": {"split": "sign"}}, "split belongs to the quantizers twin_uniform, log and least_error"),
        ({"weights": 4}, "weights must be a table"),
        ({"sites": [1]}, "sites must be a table"),
        ({"sites": {"*.q": 4}}, r"sites\.'\*\.q' must be a table"),
    ],
)
def test_mistakes(content: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        made(content)
    assert str(caught.value).startswith("mine.toml")


def test_a_name_that_is_no_preset() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'papre' \(did you mean 'paper'\?\): .* ends in \.toml"):
        load_recipe("papre")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*missing\.toml"):
        load_recipe(tmp_path / "missing.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*folder\.toml"):
        load_recipe(tmp_path / "folder.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*binary\.toml"):
        load_recipe(tmp_path / "binary.toml")
    (tmp_path / "broken.toml").write_text("[weights\nbits = 4\n")
    with pytest.raises(RecipeError, match=r"broken\.toml is not TOML: .*line 1"):
        load_recipe(tmp_path / "broken.toml")


def test_a_recipe_error_is_wrong_usage() -> None:
    assert issubclass(RecipeError, UsageError)


ALGORITHMS = {
    "num_images": 48,
    "softmax": "deferred",
    "rotate": "heads",
    "reparametrize": "full",
    "background": "leaves",
    "range_search": {"error": "output", "operands": "activations", "rounds": 2, "images": 7},
    "compensation": {"evenness": 0.25, "damping": [0.01, 1.0]},
    "reconstruction": {"rounding": "adaround", "iterations": 5, "batch_size": 3, "weight_rate": 1e-4, "drop": 0.0},
}


def test_algorithms_and_their_settings() -> None:
    recipe = made(ALGORITHMS)
    assert (recipe.num_images, recipe.softmax, recipe.rotate, recipe.reparametrize) == (48, "deferred", "heads", "full")
    assert recipe.background == "leaves"
    assert recipe.range_search == OutputSearch(error="output", operands="activations", rounds=2, images=7)
    assert recipe.compensation == Compensation(evenness=0.25, damping=(0.01, 1.0))
    tuned = Reconstruction(rounding="adaround", iterations=5, batch_size=3, weight_rate=1e-4, drop=0.0)
    assert recipe.reconstruction == tuned
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), name="x", where="y") == recipe


def test_without_a_table_there_is_no_algorithm_and_an_empty_one_has_the_usual_settings() -> None:
    recipe = made({})
    algorithms = ("rotate", "reparametrize", "range_search", "compensation", "reconstruction")
    assert [getattr(recipe, name) for name in algorithms] == [None] * 5
    assert not set(algorithms) & recipe.to_dict().keys()
    assert (recipe.softmax, recipe.background) == ("normalized", "none")
    recipe = made({"range_search": {}, "compensation": {}, "reconstruction": {}})
    assert (recipe.range_search, recipe.compensation, recipe.reconstruction) == (
        OutputSearch(),
        Compensation(),
        Reconstruction(),
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"reparametrize": True},
            r"mine\.toml: reparametrize must be one of 'full', 'searched', 'unrotated', not True",
        ),
        ({"rotate": "residual"}, r"mine\.toml: rotate must be one of 'heads', 'full', not 'residual'"),
        ({"softmax": "late"}, r"mine\.toml: softmax must be one of 'normalized', 'deferred', not 'late'"),
        ({"background": "blank"}, r"mine\.toml: background must be one of 'none', 'leaves', not 'blank'"),
        ({"range_search": {"operands": "weights"}}, "operands must be one of 'both', 'activations', not 'weights'"),
        ({"weights": {"range": "probability_mse"}}, "range 'probability_mse' is not for weights"),
        ({"num_images": 0}, "num_images must be a whole number from 1 to 1048576, not 0"),
        ({"num_images": 32.0}, r"num_images must be a whole number from .* not 32\.0"),
        ({"range_search": True}, "range_search must be a table"),
        (
            {"range_search": {"error": "hessian"}},
            "range_search: error must be one of 'output', 'fisher', not 'hessian'",
        ),
        ({"range_search": {"rounds": 0}}, "range_search: rounds must be a whole number from 1 to 10, not 0"),
        ({"range_search": {"round": 1}}, r"unknown key 'round' \(did you mean 'rounds'\?\)"),
        ({"range_search": {"images": True}}, "images must be a whole number from 1 to 1024, not True"),
        ({"compensation": {"evenness": 1.5}}, r"compensation: evenness must be a number from 0\.0 to 1\.0, not 1\.5"),
        ({"compensation": {"damping": []}}, r"damping must be a list of candidates, .* not \[\]"),
        (
            {"compensation": {"damping": 0.1}},
            r"damping must be a list of candidates, \[0\.1\] for a single one, not 0\.1",
        ),
        ({"compensation": {"damping": [0.1, "a"]}}, r"damping must be a number from .* not \[0\.1, 'a'\]"),
        (
            {"reconstruction": {"rounding": "nearest"}},
            "reconstruction: rounding must be one of 'ste', 'adaround', not 'nearest'",
        ),
        ({"reconstruction": {"rounding": True}}, "rounding must be one of 'ste', 'adaround', not True"),
        ({"reconstruction": {"rounding_rate": "fast"}}, r"rounding_rate must be a number from .* not 'fast'"),
        ({"reconstruction": {"drop": [0.5]}}, r"drop must be a number from .* not \[0\.5\]"),
        ({"activations": {"outliers": 0.5}}, "outliers must be a number from .* not 0.5"),
        ({"weights": {"outliers": 20}}, "weights: outliers are kept apart in activations, not in weights"),
        ({"weights": {"gradient": 0.5}}, "weights: gradient is for activations, not for weights"),
        ({"activations": {"gradient": 2}}, "gradient must be a number from 0.0 to 1.0, not 2"),
        ({"activations": {"dynamic_up_to": 9}}, "dynamic_up_to must be one of 2, 3, .* 8, not 9"),
        ({"activations": {"position_rank": 65}}, "position_rank must be a whole number from 0 to 64, not 65"),
        ({"activations": {"position_rank": 8}}, "position_rank is for ranges per token: it needs dynamic_up_to"),
        ({"activations": {"dynamic_up_to": True}}, "dynamic_up_to must be one of .* not True"),
        ({"weights": {"dynamic_up_to": 4}}, "weights: dynamic_up_to is for activations, not for weights"),
        (
            {"activations": {"dynamic_up_to": 7, "outliers": 20}},
            "dynamic_up_to is for the uniform quantizer, with no out",
        ),
        (
            {"activations": {"dynamic_up_to": 7, "range": "percentile"}},
            "with dynamic_up_to the range is minmax, mse or token_mse, not percentile",
        ),
        ({"stretch": -1}, "stretch must be a number from 0.0 to 10.0, not -1"),
        ({"stretch": "far"}, "stretch must be a number from 0.0 to 10.0, not 'far'"),
        ({"reconstruction": {"stretch": 11}}, "reconstruction: stretch must be a number from 0.0 to 10.0, not 11"),
        ({"activations": {"base": "2"}}, "base belongs to the log quantizer"),
        ({"activations": {"quantizer": "log", "base": "2"}}, "'log' needs split = 'magnitude' or 'sign'"),
    ],
)
def test_mistakes_in_algorithms_and_grids(content: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        made(content)
    assert str(caught.value).startswith("mine.toml")


@pytest.mark.parametrize("block", ["blocks.3", "layers.1.blocks.0"])
def test_the_published_methods(block: str) -> None:
    """PTQ4ViT (ECCV 2022) and RepQ-ViT (ICCV 2023): nominal bits everywhere."""
    ptq4vit, repq = load_recipe("ptq4vit"), load_recipe("repq")
    assert ptq4vit.scope == repq.scope == "gemm"
    assert ptq4vit.first_last_bits is repq.first_last_bits is None

    assert ptq4vit.range_search == OutputSearch(error="fisher", rounds=3, images=32)
    assert ptq4vit.weights == SiteSettings(symmetric=True, granularity="tensor")
    assert not ptq4vit.settings("patch_embed.proj.input", is_weight=False).quantize
    assert ptq4vit.settings("patch_embed.proj.weight", is_weight=True).granularity == "channel"
    for name, split in ((f"{block}.attn.softmax", "magnitude"), (f"{block}.mlp.fc2.input", "sign")):
        settings = ptq4vit.settings(name, is_weight=False)
        assert (settings.quantizer, settings.split) == ("twin_uniform", split)

    assert (repq.reparametrize, repq.range_search, repq.compensation) == ("full", None, None)
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "reduction")
    by_channel = {n for n in names if repq.settings(f"{block}.{n}.input", is_weight=False).granularity == "channel"}
    assert by_channel == {"attn.qkv", "mlp.fc1", "reduction"}
    assert {repq.settings(f"{block}.{n}.weight", is_weight=True).granularity for n in names} == {"channel"}
    softmax = repq.settings(f"{block}.attn.softmax", is_weight=False)
    assert (softmax.quantizer, softmax.base) == ("log", "sqrt2")
