"""Confidence intervals (95 %) of means and of paired differences between two models, with exact p-values.

Shares of correct answers have Wilson's interval (1927), and Newcombe's for the paired difference ("Improved confidence
intervals for the difference between binomial proportions based on paired data", Statistics in Medicine 17, 1998, method
10): neither has zero width where every answer is correct. Other scores have the normal interval; weighted means, such
as the loss per token over passages of different lengths, that of a ratio of sums (Cochran, Sampling Techniques,
chapter 6).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a two-sided 95 % interval of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN where there is no data."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Second minus first over the same units: the mean, on how many units it is better or worse, and the p-value of
    that split (McNemar's exact test for shares, the sign test for other scores)."""

    mean: Estimate
    better: int
    worse: int
    p: float


def mean_of(values: Sequence[float], weights: Sequence[float] = ()) -> Estimate:
    """The mean of values, weighted if `weights` are given, and its interval."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    if len(weights):
        return _ratio(array, np.asarray(weights, dtype=np.float64))
    if is_binary(array):
        mean = float(array.mean())
        return Estimate(mean, *_wilson(mean, n))
    return _normal(array)


def difference_of(first: Sequence[float], second: Sequence[float], weights: Sequence[float] = ()) -> Difference:
    """The difference of paired values. ValueError if their numbers differ."""
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(one) != len(two):
        raise ValueError(f"{len(one)} values and {len(two)}; a paired difference needs the same units")
    better, worse = int((two > one).sum()), int((two < one).sum())
    mean = mean_of((two - one).tolist(), weights) if len(weights) else _mean_difference(one, two)
    return Difference(mean, better, worse, _sign_test(better, worse))


def is_binary(values: "np.ndarray") -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _mean_difference(one: "np.ndarray", two: "np.ndarray") -> Estimate:
    n = len(one)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    if not (is_binary(one) and is_binary(two)):
        return _normal(two - one)
    p1, p2 = float(one.mean()), float(two.mean())
    (low1, high1), (low2, high2) = _wilson(p1, n), _wilson(p2, n)
    both, neither = float((one * two).sum()), float(((1 - one) * (1 - two)).sum())
    only1, only2 = float((one * (1 - two)).sum()), float(((1 - one) * two).sum())
    spread = math.sqrt((both + only1) * (only2 + neither) * (both + only2) * (only1 + neither))
    product = both * neither - only1 * only2
    if product > 0:
        product = max(product - n / 2, 0.0)  # the continuity correction of method 10
    phi = product / spread if spread else 0.0
    delta, below1, above1, below2, above2 = p2 - p1, p1 - low1, high1 - p1, p2 - low2, high2 - p2
    down = math.sqrt(max(0.0, below2**2 - 2 * phi * below2 * above1 + above1**2))
    up = math.sqrt(max(0.0, above2**2 - 2 * phi * above2 * below1 + below1**2))
    return Estimate(delta, delta - down, delta + up)


def _normal(values: "np.ndarray") -> Estimate:
    mean = float(values.mean())
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def _ratio(values: "np.ndarray", weights: "np.ndarray") -> Estimate:
    n, total = len(values), float(weights.sum())
    mean = float(values @ weights) / total
    spread = float((weights * (values - mean)) @ (weights * (values - mean)))
    half = Z * math.sqrt(spread * n / (n - 1)) / total if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def _sign_test(better: int, worse: int) -> float:
    n, fewer = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    # in logarithms: 2^n overflows a float at n = 1024
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)
