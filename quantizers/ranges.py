"""How a range is found: from groups of values to the interval each group's integers shall cover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class RangeSearch(Protocol):
    """Finds the clipping range of each group; a frozen dataclass that is called."""

    def __call__(
        self, groups: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The range of each group.

        Args:
            groups: `[G, n]`, fp32, finite; each row shares one scale.
            bits: width of the integers the range is for.
            symmetric: signed integers with zero point 0, otherwise affine unsigned ones.
            importance: `[G, n]`, the weight of each value's squared error; for searches that look at errors.

        Returns:
            `low, high`: `[G]` each, `low <= 0 <= high`; symmetric: `low == -high`.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, `{"type": name, **parameters}`; `range_search_from_dict` takes it back."""
        ...


def integer_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """`qmin, qmax` of the uniform grid: `[-2^(b-1), 2^(b-1) - 1]` if symmetric, else `[0, 2^b - 1]`."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_and_zero_point(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid that covers a range, widened to hold zero so that zero is exact.

    Symmetric: `s = max(-low, high) / (2^(b-1) - 1)`, `z = 0`.
    Affine: `s = (high - low) / (2^b - 1)`, `z = round(-low / s)`.
    An empty range (`low == high == 0`) gets scale 1: all it was found on is zero and stays zero.

    Args:
        low, high: fp32, of one shape.

    Returns:
        `scale` fp32 and `zero_point` int32, of that shape.
    """
    qmin, qmax = integer_bounds(bits, symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Each end is divided by itself: `high - low` overflows for ranges near the largest float.
    scale = torch.maximum(-low, high) / qmax if symmetric else high / qmax - low / qmax
    # Below the smallest normal number x / scale would lose its precision, or divide by zero.
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    scale = torch.where(low == high, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, (-low / scale).round_().clamp_(qmin, qmax).to(torch.int32)


@dataclass(frozen=True)
class MinMax:
    """Everything is inside: the smallest and the largest value (symmetric: the largest magnitude)."""

    def __call__(
        self, groups: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `RangeSearch.__call__`."""
        low, high = groups.aminmax(dim=1)
        if symmetric:
            high = torch.maximum(-low, high)
            return -high, high
        return low.clamp(max=0), high.clamp(min=0)

    def to_dict(self) -> dict[str, Any]:
        """`{"type": "minmax"}`."""
        return {"type": "minmax"}


@dataclass(frozen=True)
class Percentile:
    """Rare extremes are clipped: p = 99.99 leaves about one value in 10,000 outside, at each end.

    Affine: `low` is the (100 - p)-th and `high` the p-th percentile of x, so each end clips (100 - p) % by itself, as
    RepQ-ViT (ICCV 2023) does. Symmetric: `high` is the p-th percentile of |x|. Percentiles are interpolated
    linearly (numpy's default) and exact for any number of values. A group that is almost all zeros, whose percentiles
    are zero though it is not, gets its min-max range.

    Raises ValueError unless `50 < percent <= 100`.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not _is_real(self.percent) or not 50 < self.percent <= 100:
            raise ValueError(f"percent must be above 50 and at most 100, not {self.percent!r}; 99.99 is usual")

    def __call__(
        self, groups: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `RangeSearch.__call__`."""
        if symmetric:
            high = _upper_percentile(groups.abs(), self.percent)
            low = -high
        else:
            low = -_upper_percentile(-groups, self.percent).clamp_(min=0)
            high = _upper_percentile(groups, self.percent).clamp_(min=0)
        full_low, full_high = MinMax()(groups, bits, symmetric)
        empty = low == high
        return torch.where(empty, full_low, low), torch.where(empty, full_high, high)

    def to_dict(self) -> dict[str, Any]:
        """`{"type": "percentile", "percent": ...}`."""
        return {"type": "percentile", **asdict(self)}


@dataclass(frozen=True)
class MSE:
    """The range with the least squared error of quantize-dequantize, per group, weighted by importance where given.

    Candidates are the min-max range times `candidates` factors spaced evenly from 1 down to `shrink_to`. Symmetric:
    that is all. Affine: both ends shrink together first; then the low end is searched by itself with the best high end,
    and the high end with the new low end. Min-max is itself a candidate: the error is never larger than with `MinMax`.

    The default `shrink_to` lets go of outliers up to 50 times the useful range. On Gaussian and Laplace data it finds
    what 0.2 finds; with outliers of 20 or 60 sigma, at 2 to 4 bits, it can leave a tenth of the squared error of 0.2.

    Raises ValueError unless `candidates >= 2` and `0 < shrink_to < 1`.
    """

    candidates: int = 100
    shrink_to: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, int) or isinstance(self.candidates, bool) or self.candidates < 2:
            raise ValueError(f"candidates must be an integer of at least 2, not {self.candidates!r}; 100 is usual")
        if not _is_real(self.shrink_to) or not 0 < self.shrink_to < 1:
            raise ValueError(f"shrink_to must lie between 0 and 1, not {self.shrink_to!r}; 0.02 is usual")

    def __call__(
        self, groups: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `RangeSearch.__call__`."""
        full_low, full_high = MinMax()(groups, bits, symmetric)
        factors = torch.linspace(1.0, self.shrink_to, self.candidates, dtype=groups.dtype, device=groups.device)
        lows, highs = full_low[:, None] * factors, full_high[:, None] * factors
        least_error = partial(_least_error, groups, importance, bits=bits, symmetric=symmetric)
        low, high = least_error(lows, highs)
        if not symmetric:
            low, high = least_error(lows, high[:, None].expand_as(lows))
            low, high = least_error(low[:, None].expand_as(highs), highs)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """`{"type": "mse", "candidates": ..., "shrink_to": ...}`."""
        return {"type": "mse", **asdict(self)}


def range_search(name: str, **parameters: Any) -> RangeSearch:
    """A range search by its name in recipes: `range_search("percentile", percent=99.9)`.

    Raises ValueError for an unknown name, a parameter it does not have, or a value the search refuses.
    """
    kinds: dict[str, type[MinMax | Percentile | MSE]] = {"minmax": MinMax, "percentile": Percentile, "mse": MSE}
    if name not in kinds:
        raise ValueError(f"there is no range search {name!r}; the known ones are {', '.join(kinds)}")
    kind = kinds[name]
    known = list(kind.__dataclass_fields__)
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"range search {name!r} has no parameter {parameter!r}; its parameters: {', '.join(known) or 'none'}"
            )
    return kind(**parameters)


def range_search_from_dict(description: Mapping[str, Any]) -> RangeSearch:
    """The range search whose `to_dict()` this is. Raises ValueError as `range_search` does."""
    if not isinstance(description, Mapping) or not isinstance(description.get("type"), str):
        raise ValueError(f"no range search is described by {description!r}; it needs a 'type', such as 'minmax'")
    return range_search(description["type"], **{key: value for key, value in description.items() if key != "type"})


def chunk_elements(device: torch.device) -> int:
    """How many elements a temporary of a search may have: what a CPU's cache holds, or what keeps a GPU busy."""
    return 2**17 if device.type == "cpu" else 2**25


def _least_error(
    groups: Tensor, importance: Tensor | None, lows: Tensor, highs: Tensor, *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Of candidate ranges `lows, highs: [G, C]` each group's best: `[G], [G]`."""
    scales, zero_points = scale_and_zero_point(lows, highs, bits, symmetric)
    best = _relative_errors(groups, importance, scales, zero_points, bits, symmetric).argmin(dim=1, keepdim=True)
    return lows.gather(1, best).squeeze(1), highs.gather(1, best).squeeze(1)


def _relative_errors(
    groups: Tensor, importance: Tensor | None, scales: Tensor, zero_points: Tensor, bits: int, symmetric: bool
) -> Tensor:
    """Sum of squared errors of every candidate grid `[G, C]`, in units of each group's largest candidate scale squared.

    Groups, candidates and values are all walked in chunks: a temporary never has more than `chunk_elements`.
    """
    qmin, qmax = integer_bounds(bits, symmetric)
    lowest, highest = qmin - zero_points.to(scales.dtype), qmax - zero_points.to(scales.dtype)
    budget = chunk_elements(groups.device)
    width = min(groups.shape[1], budget)
    candidates = min(scales.shape[1], max(1, budget // width))
    rows = max(1, budget // (width * candidates))
    errors = torch.zeros_like(scales)
    for row in range(0, scales.shape[0], rows):
        for first in range(0, scales.shape[1], candidates):
            part = slice(row, row + rows), slice(first, first + candidates)
            scale, low, high = scales[part][..., None], lowest[part][..., None], highest[part][..., None]
            for column in range(0, groups.shape[1], width):
                exact = groups[row : row + rows, None, column : column + width] / scale
                code = exact.round()
                if symmetric:
                    code.clamp_(qmin, qmax)
                else:
                    # Not clamp_(low, high): with tensor bounds that broadcast it is not vectorised on CPU, 7x slower.
                    torch.minimum(torch.maximum(code, low, out=code), high, out=code)
                squares = code.sub_(exact).square_()
                if importance is not None:
                    squares *= importance[row : row + rows, None, column : column + width]
                errors[part] += squares.sum(dim=-1)
    # In units of a scale nothing overflows or underflows, however large or small the values are.
    return errors.mul_((scales / scales.amax(dim=1, keepdim=True)).square_())


def _upper_percentile(groups: Tensor, percent: float) -> Tensor:
    """Linearly interpolated percentile of each row, `[G, n]` -> `[G]`."""
    # Not torch.quantile, which refuses more than 2^24 values and sorts all of them.
    position = (groups.shape[1] - 1) * percent / 100
    below = math.floor(position)
    tail = groups.topk(groups.shape[1] - below, dim=1).values  # descending: ends with the value at `below`
    return torch.lerp(tail[:, -1], tail[:, -2], position - below) if position > below else tail[:, -1]


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
