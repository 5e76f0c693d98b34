"""A quantizer from its description: the way back from `Quantizer.describe()` and `Quantizer.tensors()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from quantizers.base import Quantizer
from quantizers.dynamic import DynamicQuantizer
from quantizers.granularity import granularity_from_dict
from quantizers.logarithmic import LogQuantizer
from quantizers.outliers import OutlierQuantizer
from quantizers.ranges import range_search_from_dict
from quantizers.twin_uniform import TwinUniformQuantizer
from quantizers.uniform import UniformQuantizer


def build(description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Quantizer:
    """The quantizer that `description` describes, fitted if `tensors` are given.

    Args:
        description: what `describe()` gave, perhaps by way of JSON.
        tensors: what `tensors()` gave.

    Raises:
        ValueError: for an unknown type, missing or unknown keys, values a quantizer refuses, or tensors that cannot be
            right (see the `load_tensors` of the quantizer).
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"a quantizer's description is a dictionary, not {type(description).__name__}")
    kind = description.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"there is no quantizer type {kind!r}; the known ones are {', '.join(_KINDS)}")
    keys, make = _KINDS[kind]
    given = set(description) - {"type"}
    if given != keys:
        missing, unknown = (
            ", ".join(sorted(keys - given)) or "none",
            ", ".join(sorted(map(str, given - keys))) or "none",
        )
        raise ValueError(
            f"the description of a {kind!r} quantizer has wrong keys; missing: {missing}, unknown: {unknown}"
        )
    quantizer = make(description)
    return quantizer if tensors is None else quantizer.load_tensors(tensors)


def _uniform(description: Mapping[str, Any]) -> Quantizer:
    return UniformQuantizer(
        description["bits"],
        symmetric=description["symmetric"],
        granularity=granularity_from_dict(description["granularity"]),
        search=range_search_from_dict(description["search"]),
    )


def _dynamic(description: Mapping[str, Any]) -> Quantizer:
    return DynamicQuantizer(description["bits"], symmetric=description["symmetric"], searched=description["searched"])


def _twin_uniform(description: Mapping[str, Any]) -> Quantizer:
    return TwinUniformQuantizer(description["bits"], split=description["split"])


def _log(description: Mapping[str, Any]) -> Quantizer:
    return LogQuantizer(description["bits"], base=description["base"], shift=description["shift"])


def _outliers(description: Mapping[str, Any]) -> Quantizer:
    main = description["main"]
    if isinstance(main, Mapping) and main.get("type") == "outliers":
        raise ValueError("channels are kept apart from a quantizer that keeps none apart itself")
    return OutlierQuantizer(build(main))


_KINDS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Quantizer]]] = {
    "uniform": ({"bits", "symmetric", "granularity", "search"}, _uniform),
    "twin_uniform": ({"bits", "split"}, _twin_uniform),
    "log": ({"bits", "base", "shift"}, _log),
    "dynamic": ({"bits", "symmetric", "searched"}, _dynamic),
    "outliers": ({"main"}, _outliers),
}
