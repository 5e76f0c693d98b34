"""Which elements of a tensor share one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    `[B, N, C]` -> groups `[1, B * N * C]`, parameters `[1]`.
    """

    def to_groups(self, x: Tensor) -> Tensor:
        """`x` of any shape as `[1, n]`."""
        return x.reshape(1, -1)

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """The parameter `[1]` as a scalar `[]`, which broadcasts against any `x`."""
        return parameter.reshape(())

    def to_dict(self) -> dict[str, Any]:
        """What `granularity_from_dict` takes."""
        return {"type": "per_tensor"}


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index along `axis`; negative axes count from the end.

    - per output channel of a weight: `PerAxis(0)`, `[out, in]` -> groups `[out, in]`, parameters `[out]`
    - per head: `PerAxis(1)`, `[B, H, N, D]` -> groups `[H, B * N * D]`, parameters `[H]`
    - per channel of an activation: `PerAxis(-1)`, `[B, N, C]` -> groups `[C, B * N]`, parameters `[C]`

    Parameters are stored one-dimensional, so what was fitted on `[B, N, C]` with axis -1 also serves `[N, C]`.

    Raises ValueError if `axis` is not an integer.
    """

    axis: int

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise ValueError(
                f"the axis of PerAxis must be an integer, not {self.axis!r}; 0 is a weight's output channel"
            )

    def to_groups(self, x: Tensor) -> Tensor:
        """`x` as `[G, n]`, G the size of its axis. Raises ValueError if `x` has no such axis."""
        self._require_axis(x)
        moved = x.movedim(self.axis, 0)
        return moved.reshape(moved.shape[0], -1)

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """The parameter `[G]` shaped to broadcast against `x`, e.g. `[1, G, 1, 1]` for axis 1 of four.

        Raises ValueError if `x` has no such axis or its size is not G.
        """
        self._require_axis(x)
        groups = parameter.shape[0]
        if x.shape[self.axis] != groups:
            raise ValueError(
                f"{self} was fitted on {groups} groups, but axis {self.axis} of a tensor of shape {list(x.shape)} has "
                f"{x.shape[self.axis]}; fit a quantizer on tensors like this one"
            )
        shape = [1] * x.dim()
        shape[self.axis] = groups
        return parameter.reshape(shape)

    def to_dict(self) -> dict[str, Any]:
        """What `granularity_from_dict` takes."""
        return {"type": "per_axis", "axis": self.axis}

    def _require_axis(self, x: Tensor) -> None:
        if not -x.dim() <= self.axis < x.dim():
            raise ValueError(f"{self} cannot group a tensor of shape {list(x.shape)}, which has no axis {self.axis}")


Granularity = PerTensor | PerAxis


def granularity_from_dict(description: Mapping[str, Any]) -> Granularity:
    """The granularity whose `to_dict()` this is. Raises ValueError for an unknown type or other keys."""
    kinds = {"per_tensor": PerTensor, "per_axis": PerAxis}
    kind = description.get("type") if isinstance(description, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"no granularity is described by {description!r}; its type is one of {', '.join(kinds)}")
    parameters = {key: value for key, value in description.items() if key != "type"}
    granularity: Granularity
    try:
        granularity = kinds[kind](**parameters)
    except TypeError:
        raise ValueError(
            f"no granularity is described by {dict(description)!r}; per_tensor has no parameters, per_axis has 'axis'"
        ) from None
    return granularity
