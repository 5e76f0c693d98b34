"""What two models say of the same images, compared: intervals and tests for accuracies, distances of their logits."""

from __future__ import annotations

import math

from scipy.stats import binomtest, norm
from torch import Tensor
from torch.nn import functional as F

CONFIDENCE = 0.95
"""Coverage of every interval given here."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, both ends in [0, 1], at 95 %."""
    found = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def paired_drop(lost: int, gained: int, pairs: int) -> tuple[float, tuple[float, float]]:
    """Difference of two shares measured on the same images, and its interval at 95 %; all in [-1, 1].

    lost: images that only the first (the baseline) gets right. gained: those that only the second gets right. pairs:
    all images.

    The interval is the adjusted Wald interval of A. Agresti and Y. Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 24 (2005), 729-740: 1/2 is added to each cell of the 2x2
    table first.
    """
    first, second, total = lost + 0.5, gained + 0.5, pairs + 2
    centre = (first - second) / total
    error = math.sqrt(first + second - (first - second) ** 2 / total) / total
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    return (lost - gained) / pairs, (max(-1.0, centre - half), min(1.0, centre + half))


def mcnemar_p(lost: int, gained: int) -> float:
    """p of the exact two-sided McNemar test: the binomial test of lost against gained. 1 when both are 0."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def sqnr_db(signal: float, noise: float) -> float:
    """Ratio of two powers (sums of squares) in dB; infinite when there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def divergence(found: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(wanted || found) of the predictions, in nats, times the temperature squared: [B].

    found, wanted: logits [B, C], both divided by the temperature first (Hinton et al., 2015).
    """
    expected, given = (F.log_softmax(logits / temperature, dim=-1) for logits in (wanted, found))
    return temperature**2 * F.kl_div(given, expected, reduction="none", log_target=True).sum(-1)
