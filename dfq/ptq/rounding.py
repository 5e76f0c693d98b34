"""AdaRound (ICML 2020): whether each weight is rounded up or down, learned by gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantizers import UniformQuantizer

# Of the rectified sigmoid (equation 23): the ends are reached, where a plain one has no gradient left.
_ZETA, _GAMMA = 1.1, -0.1
# The exponent of the regulariser falls evenly from the first to the second once this share of the steps is over. High,
# it moves only weights that have all but made up their minds.
_BETAS = (20.0, 2.0)
_WARM_UP = 0.2
_STRENGTH = 100.0


class AdaptiveRounding:
    """The weights of a layer on their way to one of the two integers around each: s * clip(floor(w / s) + h(V)).

    Equation 22. weight: where it starts, h(V) being the part of w / s above the floor; quantizer: its scales stay.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer) -> None:
        assert quantizer.scale is not None
        assert quantizer.zero_point is not None
        self._scale = quantizer.granularity.broadcast(quantizer.scale, weight)
        zero_point = quantizer.granularity.broadcast(quantizer.zero_point.float(), weight)
        self._lowest, self._highest = quantizer.qmin - zero_point, quantizer.qmax - zero_point
        steps = weight / self._scale
        self._floor = steps.floor()
        # The V of the paper.
        self.parameter = nn.Parameter(torch.logit((steps - self._floor - _GAMMA) / (_ZETA - _GAMMA)))

    def share(self) -> Tensor:
        """h(V), of the weights' shape: 0 where rounded down, 1 where rounded up."""
        return (self.parameter.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        """The weights as they are now, with a gradient."""
        return self._clipped(self._floor + self.share())

    def hard(self) -> Tensor:
        """The weights on their grid: each at the end that it is nearer to."""
        return self._clipped(self._floor + (self.parameter.detach() >= 0).float())

    def _clipped(self, steps: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(steps, self._lowest), self._highest) * self._scale


def regulariser(roundings: Sequence[AdaptiveRounding], progress: float) -> Tensor | None:
    """What brings h(V) to 0 or 1: 1 - |2 h(V) - 1|^beta (equation 24), so many times; None while warming up.

    progress: share of the steps that are over. The paper adds a hundredth of the sum over all weights to the squared
    error as it is. Here the error is in units of what it is with every weight rounded, and hangs on each the less the
    more of them there are: beside it stands the mean, so that the balance is the same in layers of any size.
    """
    since = (progress - _WARM_UP) / (1.0 - _WARM_UP)
    if since < 0 or not roundings:
        return None
    beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * since
    shares = torch.cat([rounding.share().flatten() for rounding in roundings])
    return _STRENGTH * (1.0 - (2.0 * shares - 1.0).abs().pow(beta)).mean()
