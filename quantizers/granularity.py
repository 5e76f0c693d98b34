"""Which elements of a tensor share one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F


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


@dataclass(frozen=True)
class PerGroup:
    """One scale for each `size` weights in a row of an output channel (Q-BERT, AAAI 2020; GPTQ, ICLR 2023, section 4).

    Weights `[out, in]`, those of a convolution as `[out, in * kh * kw]`, -> groups `[out * G, size]`, parameters
    `[out * G]`, G the number of groups of a channel. The last one of a channel may be shorter: zeros fill it up, which
    every grid holds. A channel that is shorter than `size` is one group of its own length.

    Raises ValueError unless `size` is an integer of at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"the size of PerGroup must be an integer of at least 1, not {self.size!r}; 64 is usual")

    def per_channel(self, x: Tensor) -> int:
        """How many groups a channel of weights like `x` has. Raises ValueError for a tensor of less than two axes."""
        if x.dim() < 2:
            raise ValueError(f"{self} groups weights [out, in], not a tensor of shape {list(x.shape)}")
        return -(-x[0].numel() // self.size)

    def to_groups(self, x: Tensor) -> Tensor:
        """`x` as `[out * G, size]`."""
        missing = self.per_channel(x) * self._width(x) - x[0].numel()
        return F.pad(x.flatten(1), (0, missing)).reshape(-1, self._width(x))

    def from_groups(self, groups: Tensor, x: Tensor) -> Tensor:
        """What `to_groups` made of a tensor like `x`, in the shape of `x`."""
        return groups.reshape(len(x), -1)[:, : x[0].numel()].reshape(x.shape)

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """The parameter `[out * G]` of each weight, in the shape of `x`. Raises ValueError for another number of it."""
        groups = len(x) * self.per_channel(x)
        if parameter.shape[0] != groups:
            raise ValueError(
                f"{self} was fitted on {parameter.shape[0]} groups, but a tensor of shape {list(x.shape)} has "
                f"{groups}; fit a quantizer on tensors like this one"
            )
        return self.from_groups(parameter[:, None].expand(-1, self._width(x)), x)

    def _width(self, x: Tensor) -> int:
        return min(self.size, x[0].numel())

    def to_dict(self) -> dict[str, Any]:
        """What `granularity_from_dict` takes."""
        return {"type": "per_group", "size": self.size}


Granularity = PerTensor | PerAxis | PerGroup


def granularity_from_dict(description: Mapping[str, Any]) -> Granularity:
    """The granularity whose `to_dict()` this is. Raises ValueError for an unknown type or other keys."""
    kinds = {"per_tensor": PerTensor, "per_axis": PerAxis, "per_group": PerGroup}
    kind = description.get("type") if isinstance(description, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"no granularity is described by {description!r}; its type is one of {', '.join(kinds)}")
    parameters = {key: value for key, value in description.items() if key != "type"}
    granularity: Granularity
    try:
        granularity = kinds[kind](**parameters)
    except TypeError:
        raise ValueError(
            f"no granularity is described by {dict(description)!r}; per_tensor has no parameters, per_axis has 'axis', "
            "per_group has 'size'"
        ) from None
    return granularity
