"""Recipes: what the presets say, what a file may say, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfq.errors import RecipeError, UsageError
from dfq.recipe import PRESETS, Bits, SiteSettings, load_recipe, parse_bits, preset_names, recipe_from_dict


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
    assert {"default", "paper"} <= set(preset_names())
    for name in preset_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert len(recipe.summary) > 10
        assert load_recipe(PRESETS / f"{name}.toml") == recipe


def test_the_scopes_of_the_presets() -> None:
    default, paper = load_recipe("default"), load_recipe("paper")
    assert (default.scope, default.first_last_bits) == ("gemm", 8)
    assert (paper.scope, paper.first_last_bits) == ("full", None)
    # FIELD 1.4: symmetric per channel for weights, asymmetric per tensor for activations, min-max for both.
    assert paper.weights == SiteSettings(symmetric=True, granularity="channel", range="minmax")
    assert paper.activations == SiteSettings(symmetric=False, granularity="tensor", range="minmax")
    assert not paper.settings("blocks.3.attn.softmax", is_weight=False).quantize
    softmax = default.settings("blocks.3.attn.softmax", is_weight=False)
    gelu = default.settings("blocks.3.mlp.fc2.input", is_weight=False)
    assert (softmax.quantizer, softmax.split) == ("twin_uniform", "magnitude")
    assert (gelu.quantizer, gelu.split) == ("twin_uniform", "sign")


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
        ({"scope": "all"}, "scope must be 'gemm' or 'full', not 'all'"),
        ({"first_last_bits": 9}, "first_last_bits must be one of 2, 3, 4, 5, 6, 7, 8, not 9"),
        ({"first_last_bits": True}, "first_last_bits must be one of .* not True"),
        ({"weights": {"bits": 1}}, "bits must be one of .* not 1"),
        ({"weights": {"bits": 4.0}}, "bits must be one of .* not 4.0"),
        ({"weights": {"symmetric": 1}}, "symmetric must be one of True, False, not 1"),
        ({"weights": {"range": "kl"}}, "range must be one of 'minmax', .* not 'kl'"),
        ({"weights": {"quantizer": ["uniform"]}}, "quantizer must be one of"),
        ({"weights": {"granularity": "head"}}, r"mine\.toml, weights: granularity 'head' is not for weights"),
        (
            {"activations": {"range": "percentile", "percent": 20}},
            "percent must lie above 50 and at most at 100, not 20",
        ),
        ({"activations": {"range": "percentile", "percent": "99"}}, "percent must lie above 50 .* not '99'"),
        ({"activations": {"range": "minmax", "percent": 99.0}}, r"mine\.toml, activations: .*percent"),
        ({"activations": {"quantizer": "twin_uniform"}}, "needs split = 'magnitude' or 'sign'"),
        ({"activations": {"split": "sign"}}, "split belongs to the twin_uniform quantizer"),
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
    with pytest.raises(RecipeError, match=r"unknown recipe 'defalt' \(did you mean 'default'\?\): .* ends in \.toml"):
        load_recipe("defalt")


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
