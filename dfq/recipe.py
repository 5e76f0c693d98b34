"""Recipes: which tensors are quantized, to how many bits, by which quantizer, with ranges found how.

A recipe is a short TOML file; the presets are such files in `dfq/recipes`, to be copied and edited. Bits are not part
of a recipe: the same one serves W8A8 and W4A8.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from dfq.errors import RecipeError, UsageError
from quantizers import (
    Granularity,
    PerAxis,
    PerTensor,
    Quantizer,
    RangeSearch,
    TwinUniformQuantizer,
    UniformQuantizer,
    range_search,
)

PRESETS = Path(__file__).parent / "recipes"
FLOAT_BITS = 16
"""As activation bits: left in floating point."""

# The axis along which ranges differ: weights are [out, ...], activations [B, ..., C], q, k and v [B, heads, N, D].
_WEIGHT_AXES = {"channel": 0}
_ACTIVATION_AXES = {"channel": -1, "head": 1}


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations, as in W4A8; `activations` is None where they stay in floating point."""

    weights: int
    activations: int | None

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations or FLOAT_BITS}"


def parse_bits(text: str) -> Bits:
    """`w4a8` -> Bits(4, 8). Raises UsageError for anything but w2..w8 with a2..a8 or a16."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
    if match:
        weights, activations = int(match[1]), int(match[2])
        if 2 <= weights <= 8 and (2 <= activations <= 8 or activations == FLOAT_BITS):
            return Bits(weights, None if activations == FLOAT_BITS else activations)
    raise UsageError(
        f"bits {text!r} are not to be had: give wXaY with X from 2 to 8 and Y from 2 to 8 (or 16, which leaves "
        "activations in floating point), such as w4a8"
    )


@dataclass(frozen=True)
class SiteSettings:
    """How one tensor is quantized.

    bits: None for those of the run; granularity: tensor, channel or head; range: minmax, percentile or mse; for
    activations also token_mse, which counts the squared error of each token the less the larger the token is, and for
    weights output_mse, which counts that of each weight by the mean square of its input, tokens likewise; percent: of
    the percentile range; split: of a twin-uniform quantizer, magnitude (softmax) or sign (GELU).
    """

    quantize: bool = True
    bits: int | None = None
    quantizer: Literal["uniform", "twin_uniform"] = "uniform"
    symmetric: bool = False
    granularity: Literal["tensor", "channel", "head"] = "tensor"
    range: Literal["minmax", "percentile", "mse", "token_mse", "output_mse"] = "minmax"
    percent: float | None = None
    split: Literal["magnitude", "sign"] | None = None

    @property
    def needs_values(self) -> bool:
        """Whether finding the range takes the values, not only their extremes."""
        return self.quantizer != "uniform" or self.range != "minmax"

    @property
    def needs_importance(self) -> bool:
        """Whether finding the range of a weight takes the mean square of the layer's input."""
        return self.range == "output_mse"

    def build(self, bits: int, *, is_weight: bool) -> Quantizer:
        """An unfitted quantizer. Raises ValueError where the settings contradict each other."""
        if self.quantizer == "twin_uniform":
            if self.split is None:
                raise ValueError("a twin_uniform quantizer needs split = 'magnitude' or 'sign'")
            return TwinUniformQuantizer(bits, split=self.split)
        if self.split is not None:
            raise ValueError("split belongs to the twin_uniform quantizer")
        axes = _WEIGHT_AXES if is_weight else _ACTIVATION_AXES
        granularity: Granularity = PerTensor()
        if self.granularity != "tensor":
            if self.granularity not in axes:
                raise ValueError(
                    f"granularity {self.granularity!r} is not for {'weights' if is_weight else 'activations'}"
                )
            granularity = PerAxis(axes[self.granularity])
        parameters = {} if self.percent is None else {"percent": self.percent}
        if self.range == ("token_mse" if is_weight else "output_mse"):
            raise ValueError(f"range {self.range!r} is not for {'weights' if is_weight else 'activations'}")
        # Both weighted searches are the plain one, told how much each error counts.
        search: RangeSearch = range_search(self.range.removeprefix("token_").removeprefix("output_"), **parameters)
        return UniformQuantizer(bits, symmetric=self.symmetric, granularity=granularity, search=search)


@dataclass(frozen=True)
class Recipe:
    """Settings for weights, for activations, and for sites picked by glob (later ones win).

    scope: `gemm`, the inputs of matrix products, or `full`, also everything between them that a fully
    quantized ViT puts on integers; first_last_bits: of the patch embedding and the classifier, None for those of
    the run.
    """

    name: str
    summary: str
    scope: Literal["gemm", "full"]
    first_last_bits: int | None
    weights: SiteSettings
    activations: SiteSettings
    sites: dict[str, dict[str, Any]]

    def settings(self, site: str, *, is_weight: bool) -> SiteSettings:
        """What applies to the site of this name."""
        settings = self.weights if is_weight else self.activations
        for pattern, changes in self.sites.items():
            if fnmatchcase(site, pattern):
                settings = replace(settings, **changes)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The content of the TOML file that says the same, plus the name."""
        value: dict[str, Any] = {"name": self.name, "summary": self.summary, "scope": self.scope}
        if self.first_last_bits is not None:
            value["first_last_bits"] = self.first_last_bits
        for part in ("weights", "activations"):
            settings: SiteSettings = getattr(self, part)
            value[part] = {
                f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) is not None
            }
        return value | {"sites": self.sites}


def preset_names() -> list[str]:
    """Recipes that come with dfq."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_recipe(name: str | Path) -> Recipe:
    """A preset by name, or a TOML file by path. Raises RecipeError."""
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in preset_names():
            raise RecipeError(
                f"unknown recipe {str(name)!r}{_near(str(name), preset_names())}: the presets are "
                f"{', '.join(preset_names())}; a recipe of your own is a file that ends in .toml"
            )
        path = PRESETS / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    return recipe_from_dict(content, name=path.stem, where=str(path))


def recipe_from_dict(content: dict[str, Any], *, name: str, where: str) -> Recipe:
    """The recipe that `content` spells; `where` names its source in errors. Raises RecipeError."""
    known = ("name", "summary", "scope", "first_last_bits", "weights", "activations", "sites")
    _check_keys(content, known, where)
    scope = content.get("scope", "gemm")
    if scope not in ("gemm", "full"):
        raise RecipeError(f"{where}: scope must be 'gemm' or 'full', not {scope!r}")
    first_last = content.get("first_last_bits")
    if first_last is not None:
        _check_value("first_last_bits", first_last, where)
    for part in ("weights", "activations", "sites"):
        if not isinstance(content.get(part, {}), dict):
            raise RecipeError(f"{where}: {part} must be a table")
    sites = content.get("sites", {})
    for pattern, changes in sites.items():
        if not isinstance(changes, dict):
            raise RecipeError(f"{where}: sites.{pattern!r} must be a table")
        _check_settings(changes, f"{where}, sites.{pattern!r}")
    parts = {}
    for part in ("weights", "activations"):
        _check_settings(content.get(part, {}), f"{where}, {part}")
        parts[part] = SiteSettings(**content.get(part, {}))
        try:
            parts[part].build(8, is_weight=part == "weights")
        except ValueError as error:
            raise RecipeError(f"{where}, {part}: {error}") from error
    return Recipe(
        name=str(content.get("name", name)),
        summary=str(content.get("summary", "")),
        scope=scope,
        first_last_bits=first_last,
        weights=parts["weights"],
        activations=parts["activations"],
        sites=sites,
    )


_CHOICES: dict[str, tuple[Any, ...]] = {
    "quantize": (True, False),
    "quantizer": ("uniform", "twin_uniform"),
    "symmetric": (True, False),
    "granularity": ("tensor", "channel", "head"),
    "range": ("minmax", "percentile", "mse", "token_mse", "output_mse"),
    "split": ("magnitude", "sign"),
    "bits": tuple(range(2, 9)),
    "first_last_bits": tuple(range(2, 9)),
}


def _check_settings(table: dict[str, Any], where: str) -> None:
    _check_keys(table, tuple(f.name for f in fields(SiteSettings)), where)
    for key, value in table.items():
        _check_value(key, value, where)


def _check_value(key: str, value: Any, where: str) -> None:
    if key == "percent":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 50.0 < value <= 100.0:
            raise RecipeError(f"{where}: percent must lie above 50 and at most at 100, not {value!r}")
        return
    # 1 == True in Python, and bits = true is a mistake.
    if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[key]):
        raise RecipeError(f"{where}: {key} must be one of {', '.join(map(repr, _CHOICES[key]))}, not {value!r}")


def _check_keys(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{_near(key, known)}; known are {', '.join(known)}")


def _near(word: str, known: tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
