"""Faithfulness and localization metrics: accumulators over scores and maps, which never hold the network.

All of them fit into one `MetricCollection`, updated once per batch by keyword::

    collection.update(full=..., kept=..., fractions=..., insertion=..., deletion=..., most_relevant_first=...,
                      least_relevant_first=..., map_changes=..., removed_relevance=..., score_drops=..., maps=...,
                      masks=...)

Each metric takes what it needs, and is a mean over images; an image for which a value is undefined does not count.
Functional twins, with values per image, are in `gmarpp.metrics.functional`.
"""

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.curves import ROAD, DeletionAUC, InsertionAUC, InsertionDeletionGap
from gmarpp.metrics.kept_region import AverageDrop, AverageGain, AverageIncrease
from gmarpp.metrics.localization import AveragePrecision, EnergyInside, IoU, PixelAccuracy, PointingGame
from gmarpp.metrics.registry import METRICS, register_metric
from gmarpp.metrics.sparseness import Sparseness
from gmarpp.metrics.stability import Infidelity, MaxSensitivity

__all__ = [
    "METRICS",
    "ROAD",
    "AverageDrop",
    "AverageGain",
    "AverageIncrease",
    "AveragePrecision",
    "DeletionAUC",
    "EnergyInside",
    "Infidelity",
    "InsertionAUC",
    "InsertionDeletionGap",
    "IoU",
    "MaxSensitivity",
    "MeanOverImages",
    "PixelAccuracy",
    "PointingGame",
    "Sparseness",
    "register_metric",
]
