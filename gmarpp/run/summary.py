"""Means with bootstrap intervals, and differences between methods that intervals can tell apart from none."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gmarpp.maps import Array
from gmarpp.metrics import METRICS

FEWEST_IMAGES = 30
"""Fewer images than these cannot tell methods apart: their intervals are far too narrow."""


_CELLS = 1 << 20


def higher_is_better(metric: str) -> bool | None:
    """Return whether more of a metric is better; None for a metric that only describes maps.

    Examples:
        >>> higher_is_better("average_drop"), higher_is_better("insertion_auc"), higher_is_better("sparseness")
        (False, True, None)
    """
    return METRICS[metric]().higher_is_better if metric in METRICS else None


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval, and how many images defined it; NaN where none did."""

    mean: float
    low: float
    high: float
    n: int


def _resample_counts(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each of n images is drawn in each resample, shape (chunk, n), a bounded chunk at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CELLS // max(n, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        draws = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(draws.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def bootstrap(values: Array, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> list[Interval]:
    """Return the mean of each column with its percentile bootstrap interval over images.

    All columns share the same resamples, so that intervals of differences between columns are paired.

    Args:
        values: one row per image, shape (n, columns); NaN where a value is undefined for an image.
        resamples: number of resamples.
        confidence: level of the interval, 0 to 1.
        seed: seed of the resampling.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    values = np.asarray(values, dtype=np.float64)
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0)
    counts = defined.sum(axis=0)
    if not counts.any():
        return [Interval(np.nan, np.nan, np.nan, 0) for _ in counts]
    with np.errstate(invalid="ignore"):
        means = filled.sum(axis=0) / counts
        drawn = np.concatenate(
            [(weights @ filled) / (weights @ defined) for weights in _resample_counts(len(values), resamples, seed)]
        )
    # A resample of few images may miss all those that define a column: it says nothing about that column.
    drawn = np.where(np.isfinite(drawn), drawn, means)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    bounds = zip(means, low, high, counts, strict=True)
    return [Interval(float(mean), float(lower), float(upper), int(n)) for mean, lower, upper, n in bounds]


def paired_difference(
    first: Array, second: Array, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of ``first - second`` over images with its bootstrap interval.

    Args:
        first: one value per image, shape (n,).
        second: values of the same images in the same order.
        resamples: number of resamples.
        confidence: level of the interval, 0 to 1.
        seed: seed of the resampling.

    Returns:
        The interval; where it excludes 0 the two differ. Images with an undefined value on either side are left out.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap(difference[:, None], resamples, confidence, seed)[0]


def leaders(values: Mapping[str, Array], higher: bool) -> list[str]:
    """Name the methods that no other one beats on the same images: the best, or those tied for it.

    Args:
        values: for each method, one value per image, all in the same order.
        higher: whether more is better.

    Returns:
        The method with the best mean, and every other whose paired difference to it has an interval that includes 0.
        One name alone is a clear best. No names where nothing is defined, or fewer than `FEWEST_IMAGES` images define
        the best method's values together with another one's.
    """
    sign = 1 if higher else -1
    means = {method: sign * _mean(column) for method, column in values.items()}
    means = {method: mean for method, mean in means.items() if np.isfinite(mean)}
    if not means:
        return []
    best = max(means, key=lambda method: means[method])
    columns = np.stack([sign * (np.asarray(values[best]) - np.asarray(values[method])) for method in means], axis=1)
    gaps = bootstrap(columns)
    if min(gap.n for gap in gaps) < FEWEST_IMAGES:
        return []
    return [method for method, gap in zip(means, gaps, strict=True) if method == best or not gap.low > 0]


def _mean(values: Array) -> float:
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[np.isfinite(defined)]
    return float(defined.mean()) if len(defined) else np.nan


@dataclass(frozen=True)
class MeanCurve:
    """Mean of a perturbation curve over images.

    Attributes:
        fractions: true fractions of patches inserted or deleted, shape (S+1,).
        mean: mean score at each fraction.
        low: lower bound of the mean's 95 % interval (normal approximation).
        high: its upper bound.
    """

    fractions: Array
    mean: Array
    low: Array
    high: Array

    @property
    def auc(self) -> float:
        """Area under the mean curve, by the trapezoid rule."""
        return float(((self.mean[1:] + self.mean[:-1]) / 2 * np.diff(self.fractions)).sum())


class CurveSum:
    """Running sums from which the mean curve of any number of images comes, in the memory of one."""

    def __init__(self, fractions: Array) -> None:
        self.fractions = np.asarray(fractions, dtype=np.float64)
        self.n = 0
        self.total = np.zeros_like(self.fractions)
        self.squares = np.zeros_like(self.fractions)

    def add(self, curves: Array) -> None:
        """Add curves of some images, shape (n, S+1); one that is not defined, as of no span to rescale, is left out."""
        curves = np.asarray(curves, dtype=np.float64)
        curves = curves[np.isfinite(curves).all(axis=1)]
        self.n += len(curves)
        self.total += curves.sum(axis=0)
        self.squares += (curves**2).sum(axis=0)

    def mean(self) -> MeanCurve:
        """Return the mean of all curves added; NaN without any."""
        count = self.n or math.nan
        mean = self.total / count
        variance = np.maximum(self.squares / count - mean**2, 0) / max(count - 1, 1)
        half = 1.96 * np.sqrt(variance)
        return MeanCurve(self.fractions, mean, mean - half, mean + half)
