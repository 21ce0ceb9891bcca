"""What is known of a run when each of its shards has passed by once."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gmarpp.maps import Array
from gmarpp.metrics.functional import rank_correlation
from gmarpp.run.shards import Shard
from gmarpp.run.summary import CurveSum, MeanCurve, bootstrap

_CONTROL = "random"
_CURVES = ("insertion", "deletion")


class RunTotals:
    """Rows, metric values and sums of curves of the shards added so far, in their order; no maps.

    Args:
        methods: names of the methods.
        metrics: names of the metrics.

    Attributes:
        rows: one dictionary per image.
    """

    def __init__(self, methods: Sequence[str], metrics: Sequence[str]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._values: dict[str, dict[str, list[Array]]] = {
            method: {metric: [] for metric in metrics} for method in methods
        }
        self._curves: dict[str, dict[str, CurveSum]] = {curve: {} for curve in _CURVES}

    def add(self, shard: Shard) -> None:
        """Add the images of the next shard."""
        self.rows += [dict(row) for row in shard.rows]
        for method, metrics in self._values.items():
            for metric, parts in metrics.items():
                # A copy, because a view would keep the file open.
                parts.append(shard.tensors[f"{method}/{metric}"].numpy().copy())
            if shard.fractions is not None:
                for curve, sums in self._curves.items():
                    sums.setdefault(method, CurveSum(shard.fractions.numpy())).add(
                        shard.tensors[f"{method}/{curve}"].numpy()
                    )

    def values(self) -> dict[str, dict[str, Array]]:
        """Return the metric values by method and metric, one per image (n,), float32; NaN where undefined."""
        return {
            method: {metric: np.concatenate(parts) for metric, parts in metrics.items()}
            for method, metrics in self._values.items()
        }

    def mean_curves(self) -> tuple[dict[str, MeanCurve], dict[str, MeanCurve]]:
        """Return the mean insertion and the mean deletion curve of each method; empty where there are no curves."""
        insertion, deletion = (
            {method: total.mean() for method, total in self._curves[curve].items()} for curve in _CURVES
        )
        return insertion, deletion


def summary(values: dict[str, dict[str, Array]]) -> list[dict[str, Any]]:
    """Return one dictionary per method and metric: mean over images, its 95 % bootstrap interval, number of images."""
    keys = [(method, metric) for method, metrics in values.items() for metric in metrics]
    if not keys:
        return []
    columns = np.stack([values[method][metric] for method, metric in keys], axis=1)
    return [
        {"method": method, "metric": metric, "mean": i.mean, "low": i.low, "high": i.high, "n": i.n}
        for (method, metric), i in zip(keys, bootstrap(columns), strict=True)
    ]


class Agreement:
    """How much the methods' maps agree in rank, over the shards added so far.

    The random control takes no part in `weakest`, or it would always be one of the two.

    Args:
        methods: names of the methods.

    Attributes:
        weakest: for each image the lowest rank correlation of two methods.
        weakest_pair: for each image the positions of these two methods.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods
        self._pairs = list(combinations(range(len(methods)), 2))
        self._compared = [
            position
            for position, (first, second) in enumerate(self._pairs)
            if _CONTROL not in (methods[first], methods[second])
        ]
        self._total, self._images = np.zeros(len(self._pairs)), 0
        self.weakest: list[float] = []
        self.weakest_pair: list[tuple[int, int]] = []

    def add(self, shard: Shard) -> None:
        """Add the images of the next shard."""
        if not self._pairs:
            return
        maps = [shard.tensors[method] for method in self._methods]
        correlations = np.stack(
            [rank_correlation(maps[first], maps[second]).numpy() for first, second in self._pairs], axis=1
        )
        self._total += correlations.sum(axis=0)
        self._images += len(correlations)
        if self._compared:
            among = correlations[:, self._compared]
            self.weakest += among.min(axis=1).tolist()
            self.weakest_pair += [self._pairs[self._compared[choice]] for choice in among.argmin(axis=1)]

    def matrix(self) -> Array | None:
        """Return the mean rank correlation of each pair of methods (methods, methods), or None for a single method."""
        if not self._pairs:
            return None
        matrix = np.eye(len(self._methods))
        for (first, second), mean in zip(self._pairs, self._total / self._images, strict=True):
            matrix[first, second] = matrix[second, first] = mean
        return matrix
