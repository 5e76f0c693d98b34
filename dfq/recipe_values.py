"""What the keys of a recipe may be, and errors that say so."""

from __future__ import annotations

import reprlib
from typing import Any, Literal, get_args

from calibration.errors import did_you_mean
from dfq.errors import RecipeError

Scope = Literal["gemm", "full"]
QuantizerName = Literal["uniform", "twin_uniform", "log", "least_error"]
GranularityName = Literal["tensor", "channel", "head", "group"]
RangeName = Literal["minmax", "percentile", "mse", "token_mse", "probability_mse", "output_mse"]
Split = Literal["magnitude", "sign"]
Base = Literal["2", "sqrt2", "search"]
Rotation = Literal["heads", "full"]
Softmax = Literal["normalized", "deferred"]
Reparametrization = Literal["full", "searched", "unrotated"]
Background = Literal["none", "leaves"]
OutputError = Literal["output", "fisher"]
Operands = Literal["both", "activations"]
Rounding = Literal["ste", "adaround"]

# What a number may be: the lowest and the highest; whole numbers where both are.
_RANGES: dict[str, tuple[float, float]] = {
    "outliers": (1.0, 1e6),
    "position_rank": (0, 64),
    "group_size": (8, 2**16),
    "num_images": (1, 2**20),
    "rounds": (1, 10),
    "images": (1, 1024),
    "evenness": (0.0, 1.0),
    "gradient": (0.0, 1.0),
    "iterations": (1, 10**6),
    "batch_size": (1, 4096),
    "weight_rate": (0.0, 1.0),
    "rounding_rate": (0.0, 1.0),
    "scale_rate": (0.0, 1.0),
    "bias_rate": (0.0, 1.0),
    "drop": (0.0, 1.0),
    "feature": (0.0, 1e3),
    "stretch": (0.0, 10.0),
    "damping": (0.0, 1e3),
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "scope": get_args(Scope),
    "quantize": (True, False),
    "quantizer": get_args(QuantizerName),
    "base": get_args(Base),
    "softmax": get_args(Softmax),
    "rotate": get_args(Rotation),
    "reparametrize": get_args(Reparametrization),
    "background": get_args(Background),
    "error": get_args(OutputError),
    "operands": get_args(Operands),
    "rounding": get_args(Rounding),
    "symmetric": (True, False),
    "granularity": get_args(GranularityName),
    "range": get_args(RangeName),
    "split": get_args(Split),
    "bits": tuple(range(2, 9)),
    "first_last_bits": tuple(range(2, 9)),
    "dynamic_up_to": tuple(range(2, 9)),
}


def check_value(key: str, value: Any, where: str) -> None:
    """Raise RecipeError where `value` is not for `key`; `where` names the place in errors."""
    if key == "percent":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 50.0 < value <= 100.0:
            raise RecipeError(f"{where}: percent must lie above 50 and at most at 100, not {said(value)}")
        return
    if key in _RANGES:
        low, high = _RANGES[key]
        whole = isinstance(low, int)
        if key == "damping" and not (isinstance(value, list) and value):
            raise RecipeError(
                f"{where}: damping must be a list of candidates, [0.1] for a single one, not {said(value)}"
            )
        for number in value if key == "damping" else [value]:
            right_kind = type(number) is int or (type(number) is float and not whole)
            if not right_kind or not low <= number <= high:
                raise RecipeError(
                    f"{where}: {key} must be a{' whole' if whole else ''} number from {low} to {high}, "
                    f"not {said(value)}"
                )
        return
    # 1 == True in Python, and bits = true is a mistake.
    if not any(type(value) is type(choice) and value == choice for choice in _CHOICES[key]):
        raise RecipeError(f"{where}: {key} must be one of {', '.join(map(repr, _CHOICES[key]))}, not {said(value)}")


def check_keys(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise RecipeError for a key that is not among the known ones."""
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}")


def said(value: Any) -> str:
    """`value` as an error shows it, however long or deep it is."""
    try:
        return reprlib.repr(value)
    # Of an integer in base 16, which may have more digits than Python writes in base 10.
    except ValueError:
        return "a huge number"
