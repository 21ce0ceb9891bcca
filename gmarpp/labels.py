"""Names, colors and line styles of methods and metrics for people."""

import zlib
from collections.abc import Sequence

METHOD_LABELS = {
    "gmarpp_l1": "GMAR++ (L1)",
    "gmarpp_l2": "GMAR++ (L2)",
    "gmarpp_sum": "GMAR++ (sum)",
    "gmarpp_balanced": "GMAR++ (balanced)",
    "token_relevance": "Token relevance",
    "gmar_l1": "GMAR (L1)",
    "gmar_l2": "GMAR (L2)",
    "rollout": "Rollout",
    "legrad": "LeGrad",
    "chefer": "Chefer",
    "attention": "Attention",
    "random": "Random",
}
"""Label for people of each method, as the method itself has it; registered ones join."""

METRIC_LABELS = {
    "average_drop": "Average Drop",
    "average_increase": "Average Increase",
    "average_gain": "Average Gain",
    "insertion_auc": "Insertion AUC",
    "deletion_auc": "Deletion AUC",
    "insertion_deletion_gap": "Insertion-Deletion Gap",
    "road": "ROAD",
    "infidelity": "Infidelity",
    "max_sensitivity": "Max-Sensitivity",
    "pointing_game": "Pointing Game",
    "energy_inside": "Energy Inside",
    "iou": "IoU",
    "average_precision": "Average Precision",
    "pixel_accuracy": "Pixel Accuracy",
    "sparseness": "Sparseness",
}
"""Label for people of each metric; registered ones join."""


def name_metric(metric: str, label: str) -> None:
    """Give a metric of one's own a label."""
    METRIC_LABELS[metric] = label


def metric_label(metric: str) -> str:
    """Return the name of a metric for people."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


_METHOD_COLORS = {
    "gmarpp_l1": "#d7263d",
    "gmarpp_l2": "#f0851f",
    "gmarpp_sum": "#8c1c13",
    "gmarpp_balanced": "#087691",
    "token_relevance": "#1b1b1e",
    "gmar_l1": "#2a62c9",
    "gmar_l2": "#4fa8e0",
    "rollout": "#239160",
    "legrad": "#8a56cf",
    "chefer": "#a87434",
    "attention": "#dd6fb0",
    "random": "#8a8f98",
}


_SPARE_COLORS = ("#17a2a2", "#7a8b1f", "#b0413e", "#5b6ee1", "#c99a00")


def name_method(method: str, label: str, color: str = "") -> None:
    """Give a method of one's own a label and a color, `#rrggbb`; without one, a spare color that no method has yet."""
    METHOD_LABELS[method] = label
    _METHOD_COLORS.pop(method, None)
    taken = {*_METHOD_COLORS.values()}
    free = [each for each in _SPARE_COLORS if each not in taken]
    _METHOD_COLORS[method] = color or _choose(free or _SPARE_COLORS, method)


def _choose(colors: Sequence[str], method: str) -> str:
    return colors[zlib.crc32(method.encode()) % len(colors)]


def method_label(method: str) -> str:
    """Return the name of a method for people; one that is not known keeps its name."""
    return METHOD_LABELS.get(method, method)


def method_color(method: str) -> str:
    """Return the color of a method, the same in every figure and report, as `#rrggbb`."""
    return _METHOD_COLORS.get(method) or _choose(_SPARE_COLORS, method)


def method_dashes(method: str) -> str:
    """Return the line style of a method (`solid`, `dashed` or `dotted`), so that color is not the only difference."""
    return "dotted" if method == "random" else "dashed" if method.endswith("_l2") else "solid"
