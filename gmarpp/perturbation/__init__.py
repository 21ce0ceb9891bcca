"""Perturbation: the only place that runs the network for metrics.

Patches are ranked once per map, removed or revealed in that order, and the network scores what is left. See
`score_perturbations` (several maps at once), `perturbation_curves` (one map) and `road_scores`; `map_changes` and
`square_removals` are for max-sensitivity and infidelity.
"""

from gmarpp.maps import rank_patches
from gmarpp.perturbation.baselines import BASELINES, Baseline, baseline_images, gaussian_blur
from gmarpp.perturbation.curves import Curves, KeptMask, PerturbationScores, perturbation_curves, score_perturbations
from gmarpp.perturbation.imputation import noisy_linear_imputation
from gmarpp.perturbation.masks import step_counts
from gmarpp.perturbation.objective import SCORES, Score, class_scores
from gmarpp.perturbation.road import RoadScores, road_scores
from gmarpp.perturbation.stability import SquareRemovals, map_changes, square_removals

__all__ = [
    "BASELINES",
    "SCORES",
    "Baseline",
    "Curves",
    "KeptMask",
    "PerturbationScores",
    "RoadScores",
    "Score",
    "SquareRemovals",
    "baseline_images",
    "class_scores",
    "gaussian_blur",
    "map_changes",
    "noisy_linear_imputation",
    "perturbation_curves",
    "rank_patches",
    "road_scores",
    "score_perturbations",
    "square_removals",
    "step_counts",
]
