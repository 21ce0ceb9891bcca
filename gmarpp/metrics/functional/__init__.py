"""Metrics as functions of scores and maps; `reduction="none"` gives a value per image, NaN where it is undefined."""

from gmarpp.metrics.functional.curves import deletion_auc, insertion_auc, insertion_deletion_gap, road
from gmarpp.metrics.functional.kept_region import average_drop, average_gain, average_increase
from gmarpp.metrics.functional.localization import (
    average_precision,
    boxes_to_masks,
    energy_inside,
    iou,
    pixel_accuracy,
    pointing_game,
)
from gmarpp.metrics.functional.rank_correlation import rank_correlation
from gmarpp.metrics.functional.sparseness import sparseness
from gmarpp.metrics.functional.stability import infidelity, max_sensitivity

__all__ = [
    "average_drop",
    "average_gain",
    "average_increase",
    "average_precision",
    "boxes_to_masks",
    "deletion_auc",
    "energy_inside",
    "infidelity",
    "insertion_auc",
    "insertion_deletion_gap",
    "iou",
    "max_sensitivity",
    "pixel_accuracy",
    "pointing_game",
    "rank_correlation",
    "road",
    "sparseness",
]
