"""Recipes: which tensors are quantized, to how many bits, by which quantizer, with ranges found how.

A recipe is a short TOML file; the presets are such files in `dfq/recipes`, to be copied and edited. Bits are not part
of a recipe: the same one serves W8A8 and W4A8.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from calibration.errors import did_you_mean
from calibration.files import read_text
from dfq.errors import RecipeError, UsageError
from dfq.recipe_values import (
    Background,
    Base,
    GranularityName,
    Operands,
    OutputError,
    QuantizerName,
    RangeName,
    Reparametrization,
    Rotation,
    Rounding,
    Scope,
    Softmax,
    Split,
    check_keys,
    check_value,
    said,
)
from quantizers import (
    GELU_MINIMUM,
    DynamicQuantizer,
    Granularity,
    LogQuantizer,
    PerAxis,
    PerGroup,
    PerTensor,
    Quantizer,
    RangeSearch,
    TwinUniformQuantizer,
    UniformQuantizer,
    range_search,
)

PRESETS = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "fast"
_MAX_LENGTH, _MAX_DOTS = 2**20, 200
FLOAT_BITS = 16
"""As activation bits: left in floating point."""

# The axis along which ranges differ: weights are [out, ...], activations [B, ..., C], q, k and v [B, heads, N, D].
_WEIGHT_AXES = {"channel": 0}
_ACTIVATION_AXES = {"channel": -1, "head": 1}
_GROUP_SIZE = 64
_GROUPED = re.compile(r"(\w+)-g([0-9]{1,6})")
_END_WEIGHTS = ("patch_embed.proj.weight", "head*.weight")


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

    bits: None for those of the run; granularity: tensor, channel, head or, of weights, group: so many of an output
    channel in a row as group_size says, None: 64; range: minmax, percentile or mse; for
    activations also token_mse, which counts the squared error of each token the less the larger the token is, and
    probability_mse, that of exponentials as that of the probabilities they become (softmax = deferred), and for weights
    output_mse, which counts that of each weight by the mean square of its input, tokens likewise; percent: of
    the percentile range; quantizer: least_error is the best, by squared error, of uniform, twin_uniform and log; split:
    where a twin_uniform or log quantizer stands, magnitude after softmax or sign after GELU; base: of a log quantizer;
    outliers: channels whose largest magnitude is more than so many times the median channel's stay apart, at 8 bits;
    gradient: where a linear's input has its range searched by squared error, each token also counts by the layer's
    squared output gradient to this power, 0: gradients are not looked at; dynamic_up_to: of so many bits and fewer, a
    uniform activation that keeps no range per channel has one of each token's own, found when the model runs;
    position_rank: of the mean over images at each position, a part of this rank at most is kept from rounding there
    (`dfq.ptq.positions`), 0: none.
    """

    quantize: bool = True
    bits: int | None = None
    quantizer: QuantizerName = "uniform"
    symmetric: bool = False
    granularity: GranularityName = "tensor"
    group_size: int | None = None
    range: RangeName = "minmax"
    percent: float | None = None
    split: Split | None = None
    base: Base | None = None
    outliers: float | None = None
    gradient: float = 0.0
    dynamic_up_to: int | None = None
    position_rank: int = 0

    @property
    def needs_values(self) -> bool:
        """Whether finding the range takes the values, not only their extremes."""
        return self.quantizer != "uniform" or self.range != "minmax" or self.outliers is not None

    @property
    def needs_importance(self) -> bool:
        """Whether finding the range of a weight takes the mean square of the layer's input."""
        return self.range == "output_mse"

    def is_dynamic(self, bits: int) -> bool:
        """Whether at so many bits each token is to have a range of its own."""
        return self.granularity != "channel" and self.dynamic_up_to is not None and bits <= self.dynamic_up_to

    def build(self, bits: int, *, is_weight: bool) -> list[Quantizer]:
        """Unfitted quantizers, of which the one with the least error is to be taken.

        Raises ValueError where the settings contradict each other.
        """
        if self.outliers is not None and is_weight:
            raise ValueError("outliers are kept apart in activations, not in weights")
        if self.outliers is not None and self.granularity != "tensor":
            raise ValueError(
                f"outliers are kept apart from one range for all, not with granularity {self.granularity!r}"
            )
        if self.quantizer != "uniform" and self.granularity != "tensor":
            raise ValueError(
                f"granularity {self.granularity!r} belongs to the uniform quantizer: {self.quantizer} has 'tensor'"
            )
        if self.gradient and is_weight:
            raise ValueError("gradient is for activations, not for weights")
        if self.position_rank and self.dynamic_up_to is None:
            raise ValueError("position_rank is for ranges per token: it needs dynamic_up_to")
        if self.dynamic_up_to is not None:
            self._check_dynamic(is_weight=is_weight)
        if self.base is not None and self.quantizer != "log":
            raise ValueError("base belongs to the log quantizer")
        if self.quantizer != "uniform" and self.split is None:
            raise ValueError(f"quantizer {self.quantizer!r} needs split = 'magnitude' or 'sign'")
        if self.quantizer == "uniform" and self.split is not None:
            raise ValueError("split belongs to the quantizers twin_uniform, log and least_error")
        kinds = ("twin_uniform", "log", "uniform") if self.quantizer == "least_error" else (self.quantizer,)
        return [self._build(kind, bits, is_weight=is_weight) for kind in kinds]

    def _check_dynamic(self, *, is_weight: bool) -> None:
        if is_weight:
            raise ValueError("dynamic_up_to is for activations, not for weights")
        if self.quantizer != "uniform" or self.outliers is not None:
            raise ValueError("dynamic_up_to is for the uniform quantizer, with no outliers kept apart")
        if self.range not in ("minmax", "mse", "token_mse"):
            raise ValueError(f"with dynamic_up_to the range is minmax, mse or token_mse, not {self.range}")

    def _build(self, kind: str, bits: int, *, is_weight: bool) -> Quantizer:
        if kind == "twin_uniform" and self.split is not None:
            return TwinUniformQuantizer(bits, split=self.split)
        if kind == "log":
            shift = GELU_MINIMUM if self.split == "sign" else 0.0
            return LogQuantizer(bits, base=self.base or "search", shift=shift)
        axes = _WEIGHT_AXES if is_weight else _ACTIVATION_AXES
        granularity: Granularity = PerTensor()
        if self.granularity == "group" and is_weight:
            granularity = PerGroup(self.group_size or _GROUP_SIZE)
        elif self.granularity != "tensor":
            if self.granularity not in axes:
                raise ValueError(
                    f"granularity {self.granularity!r} is not for {'weights' if is_weight else 'activations'}"
                )
            granularity = PerAxis(axes[self.granularity])
        parameters = {} if self.percent is None else {"percent": self.percent}
        if self.range in (("token_mse", "probability_mse") if is_weight else ("output_mse",)):
            raise ValueError(f"range {self.range!r} is not for {'weights' if is_weight else 'activations'}")
        if self.is_dynamic(bits):
            return DynamicQuantizer(bits, symmetric=self.symmetric, searched=self.range != "minmax")
        # The weighted searches are the plain one, told how much each error counts.
        plain = "mse" if self.range.endswith("_mse") else self.range
        search: RangeSearch = range_search(plain, **parameters)
        return UniformQuantizer(bits, symmetric=self.symmetric, granularity=granularity, search=search)


@dataclass(frozen=True)
class OutputSearch:
    """Ranges of both operands of every matrix product searched in turn by the error of the product (PTQ4ViT, 3.3).

    error: output, the squared error, or fisher, each output's by its squared gradient; operands: both, or only the
    activations, where weights are rounded with `Compensation`, whose ranges a search for rounding to nearest does no
    good; rounds: how often each operand is searched; images: how many the products are looked at on.
    """

    error: OutputError = "fisher"
    operands: Operands = "both"
    rounds: int = 1
    images: int = 4


@dataclass(frozen=True)
class Compensation:
    """Weights rounded column by column, each error made up for by the columns still to come (GPTQ).

    evenness: 0 counts the squared error of every token, 1 its relative error, see `SecondMoment`; gradient: each token
    also counts by its squared output gradient to this power, 0: gradients are not looked at; damping: candidates, of
    which held-out images choose.
    """

    evenness: float = 0.5
    gradient: float = 0.5
    damping: tuple[float, ...] = (0.1,)


@dataclass(frozen=True)
class Reconstruction:
    """Weights, scales, biases and norms tuned by gradients.

    rounding: ste, weights and their scales are tuned straight through the rounding to nearest; adaround, it is learned
    of each weight whether it is rounded up or down, and their scales stay; iterations: steps per block; batch_size:
    images per step; rates: Adam's learning rate of weights, in units of the layer's mean step, of what AdaRound learns
    in place of them, of the logarithm of scales, of biases and norms; drop: share of activations that enter a block in
    full precision (QDrop); gradient: each token counts by its squared output gradient to this power; feature: weight of
    the error at the end of the network beside that of the block, 0: only the block is looked at; stretch: what enters
    a block is moved away from its mean over images, by a share of its distance drawn from 0 to this for each image.
    """

    rounding: Rounding = "ste"
    iterations: int = 60
    batch_size: int = 16
    weight_rate: float = 1e-2
    rounding_rate: float = 3e-2
    scale_rate: float = 5e-3
    bias_rate: float = 5e-4
    drop: float = 0.5
    gradient: float = 0.0
    feature: float = 0.0
    stretch: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Settings for weights, for activations, and for sites picked by glob (later ones win), and the algorithms run.

    scope: `gemm`, the inputs of matrix products, or `full`, also everything between them that a fully
    quantized ViT puts on integers; first_last_bits: of the patch embedding and the classifier, None for those of
    the run; num_images: how many are generated where none are given; softmax: its probabilities are quantized, or,
    deferred, exponentials that are normalized after the product with the values; rotate: channels are mixed by
    rotations that cancel, those of each attention head or, full, of the residual stream too; reparametrize: ranges per
    channel are moved into the layers before and after where that is exact, and become ranges per tensor: full
    (RepQ-ViT), searched, as far as the product they enter gains by it, or unrotated, as searched but where the channels
    are rotated, which have one range as they are; stretch: the ranges of activations are looked for with what
    enters a block moved away from its mean over images, by a share of its distance drawn from 0 to this for each image;
    background: of sparse images, whose kept patches are run alone (none) or stand in front of dead leaves.
    The tables range_search, compensation and reconstruction say how these are done. Of those, rotate and reparametrize,
    None: not at all.
    """

    name: str
    summary: str
    weights: SiteSettings
    activations: SiteSettings
    sites: dict[str, dict[str, Any]]
    scope: Scope = "gemm"
    first_last_bits: int | None = None
    num_images: int = 32
    softmax: Softmax = "normalized"
    rotate: Rotation | None = None
    reparametrize: Reparametrization | None = None
    stretch: float = 0.0
    background: Background = "none"
    range_search: OutputSearch | None = None
    compensation: Compensation | None = None
    reconstruction: Reconstruction | None = None

    def settings(self, site: str, *, is_weight: bool) -> SiteSettings:
        """What applies to the site of this name."""
        settings = self.weights if is_weight else self.activations
        for pattern, changes in self.sites.items():
            if fnmatchcase(site, pattern):
                settings = replace(settings, **changes)
        return settings

    def grouped(self, size: int) -> Recipe:
        """The same with a range for every `size` weights in a row (granularity group), called NAME-gSIZE.

        Patch embedding and classifier stay as they are where they have bits of their own. Raises RecipeError for a size
        that is none.
        """
        name = f"{self.name}-g{size}"
        check_value("group_size", size, f"recipe {name}")
        sites = self.sites
        if self.first_last_bits is not None:
            ends = {"granularity": self.weights.granularity}
            sites = sites | {pattern: sites.get(pattern, {}) | ends for pattern in _END_WEIGHTS}
        return replace(
            self, name=name, weights=replace(self.weights, granularity="group", group_size=size), sites=sites
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of the TOML file that says the same, plus the name."""
        value: dict[str, Any] = {"name": self.name, "summary": self.summary}
        value |= {key: getattr(self, key) for key in _head_keys() if getattr(self, key) is not None}
        for part in ("weights", "activations"):
            settings: SiteSettings = getattr(self, part)
            value[part] = {
                f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) is not None
            }
        for table in _ALGORITHMS:
            settings = getattr(self, table)
            if settings is not None:
                value[table] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
        return value | {"sites": self.sites}


def preset_names() -> list[str]:
    """Recipes that come with dfq."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def find_preset(name: str) -> Recipe | None:
    """A recipe that comes with dfq, or one of them `grouped`, `fast-g64`; None if it is neither.

    Raises RecipeError for groups of a size that is none.
    """
    grouped = _GROUPED.fullmatch(name)
    preset = grouped[1] if grouped else name
    if preset not in preset_names():
        return None
    recipe = _read(PRESETS / f"{preset}.toml")
    return recipe.grouped(int(grouped[2])) if grouped else recipe


def load_recipe(name: str | Path) -> Recipe:
    """A preset by name (`find_preset`), or a TOML file by path. Raises RecipeError."""
    path = Path(name)
    if path.suffix == ".toml":
        return _read(path)
    preset = find_preset(str(name))
    if preset is None:
        raise RecipeError(
            f"unknown recipe {str(name)!r}{did_you_mean(str(name), preset_names())}: the presets are "
            f"{', '.join(preset_names())}, each also with weights in groups, {DEFAULT_RECIPE}-g{_GROUP_SIZE}; a recipe "
            "of your own is a file that ends in .toml"
        )
    return preset


def _read(path: Path) -> Recipe:
    try:
        text = read_text(path)
        # Python's parser takes the square of the parts of a key, hours for a megabyte of them.
        if len(text) > _MAX_LENGTH or any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a recipe has at most {_MAX_LENGTH} characters, and {_MAX_DOTS} dots in a line")
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    except FileNotFoundError as error:
        raise RecipeError(f"cannot read the recipe {path}: there is no such file") from error
    # ValueError: not UTF-8, or an integer of more digits than Python reads.
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    return recipe_from_dict(content, name=path.stem, where=str(path))


def recipe_from_dict(content: dict[str, Any], *, name: str, where: str) -> Recipe:
    """The recipe that `content` spells; `where` names its source in errors. Raises RecipeError."""
    check_keys(content, tuple(f.name for f in fields(Recipe)), where)
    for key in ("name", "summary"):
        if not isinstance(content.get(key, ""), str):
            raise RecipeError(f"{where}: {key} must be a text, not {said(content[key])}")
    head = {key: content[key] for key in _head_keys() if key in content}
    for key, value in head.items():
        check_value(key, value, where)
    for part in ("weights", "activations", "sites", *_ALGORITHMS):
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
        weights=parts["weights"],
        activations=parts["activations"],
        sites=sites,
        **head,
        **{table: _algorithm(kind, content.get(table), f"{where}, {table}") for table, kind in _ALGORITHMS.items()},
    )


_ALGORITHMS: dict[str, type[OutputSearch | Compensation | Reconstruction]] = {
    "range_search": OutputSearch,
    "compensation": Compensation,
    "reconstruction": Reconstruction,
}


def _head_keys() -> list[str]:
    """What stands at the head of the file, all of which may be left out."""
    return [f.name for f in fields(Recipe) if f.default is not MISSING and f.name not in _ALGORITHMS]


def _algorithm(kind: type[Any], table: dict[str, Any] | None, where: str) -> Any:
    if table is None:
        return None
    check_keys(table, tuple(f.name for f in fields(kind)), where)
    for key, value in table.items():
        check_value(key, value, where)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def _check_settings(table: dict[str, Any], where: str) -> None:
    check_keys(table, tuple(f.name for f in fields(SiteSettings)), where)
    for key, value in table.items():
        check_value(key, value, where)
