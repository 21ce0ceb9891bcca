"""Faithfulness and localization metrics: accumulators over scores and maps, which never hold the network.

All of them fit into one `MetricCollection`, updated once per batch by keyword::

    collection.update(full=..., kept=..., fractions=..., insertion=..., deletion=..., most_relevant_first=...,
                      least_relevant_first=..., maps=..., masks=...)

Each metric takes what it needs, and is a mean over images; an image for which a value is undefined does not count.
Functional twins, with values per image, are in `gmarpp.metrics.functional`.
"""

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.curves import ROAD, DeletionAUC, InsertionAUC, InsertionDeletionGap
from gmarpp.metrics.kept_region import AverageDrop, AverageGain, AverageIncrease
from gmarpp.metrics.localization import AveragePrecision, EnergyInside, IoU, PixelAccuracy, PointingGame
from gmarpp.metrics.sparseness import Sparseness

METRICS: dict[str, type[MeanOverImages]] = {
    "average_drop": AverageDrop,
    "average_increase": AverageIncrease,
    "average_gain": AverageGain,
    "insertion_auc": InsertionAUC,
    "deletion_auc": DeletionAUC,
    "insertion_deletion_gap": InsertionDeletionGap,
    "road": ROAD,
    "pointing_game": PointingGame,
    "energy_inside": EnergyInside,
    "iou": IoU,
    "average_precision": AveragePrecision,
    "pixel_accuracy": PixelAccuracy,
    "sparseness": Sparseness,
}
"""Metric classes by the name used in configurations, tags and files; functional twins have the same names."""

__all__ = [
    "METRICS",
    "ROAD",
    "AverageDrop",
    "AverageGain",
    "AverageIncrease",
    "AveragePrecision",
    "DeletionAUC",
    "EnergyInside",
    "InsertionAUC",
    "InsertionDeletionGap",
    "IoU",
    "MeanOverImages",
    "PixelAccuracy",
    "PointingGame",
    "Sparseness",
]
