"""Metrics by name: this package's, and those of one's own."""

import inspect
import re
from collections.abc import Callable

from torch import Tensor
from torchmetrics import Metric

from gmarpp.entry_points import announced, import_announced
from gmarpp.labels import METRIC_LABELS, name_metric
from gmarpp.metrics import functional
from gmarpp.metrics.curves import ROAD, DeletionAUC, InsertionAUC, InsertionDeletionGap
from gmarpp.metrics.kept_region import AverageDrop, AverageGain, AverageIncrease
from gmarpp.metrics.localization import AveragePrecision, EnergyInside, IoU, PixelAccuracy, PointingGame
from gmarpp.metrics.sparseness import Sparseness
from gmarpp.metrics.stability import Infidelity, MaxSensitivity

METRICS: dict[str, type[Metric]] = {
    "average_drop": AverageDrop,
    "average_increase": AverageIncrease,
    "average_gain": AverageGain,
    "insertion_auc": InsertionAUC,
    "deletion_auc": DeletionAUC,
    "insertion_deletion_gap": InsertionDeletionGap,
    "road": ROAD,
    "infidelity": Infidelity,
    "max_sensitivity": MaxSensitivity,
    "pointing_game": PointingGame,
    "energy_inside": EnergyInside,
    "iou": IoU,
    "average_precision": AveragePrecision,
    "pixel_accuracy": PixelAccuracy,
    "sparseness": Sparseness,
}
"""Metric classes by the name used in configurations, tags and files; registered ones join."""

INPUTS = (
    "full",
    "kept",
    "fractions",
    "insertion",
    "deletion",
    "most_relevant_first",
    "least_relevant_first",
    "map_changes",
    "removed_relevance",
    "score_drops",
    "maps",
    "masks",
)
"""What metrics can take: names of arguments of `update`."""

_GROUP = "gmarpp.metrics"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")
_BUILT_IN = frozenset(METRICS)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: getattr(functional, name) for name in METRICS}
# Columns of tables and tensors in files of maps that are no metric.
_RESERVED = (
    *("insertion", "deletion", "index", "path", "method", "label", "target", "predicted"),
    *("target_probability", "predicted_probability"),
)


def register_metric(
    name: str,
    metric: type[Metric],
    function: Callable[..., Tensor],
    *,
    label: str | None = None,
    replace: bool = False,
) -> None:
    """Make a metric known by its name everywhere: on command lines, in the monitor, in tables and reports.

    A package announces its metrics by entry points of the group `gmarpp.metrics`: each has the metric's name, and names
    a module that registers it when imported.

    Args:
        name: used in configurations, tags and files.
        metric: class whose `update` takes some of `INPUTS`, each by its name; its objects are made without arguments.
            Its `higher_is_better` says which direction is good, if any.
        function: its functional twin, which takes the same and `reduction="none"`, and returns a value per image, (B,);
            NaN where it is undefined.
        label: name for people; by default the name with spaces.
        replace: take the place of another metric of one's own with the same name, as when a notebook's cell runs again.

    Raises:
        ValueError: for a name or label that cannot be used or is taken, or a class or function with other arguments.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            "name of a metric: expected a small letter, then up to 59 small letters, digits or _, and none of "
            f"{', '.join(_RESERVED)}, got {name!r:.80}"
        )
    label = name.replace("_", " ") if label is None else label
    if not label.strip() or not label.isprintable() or len(label) > 60:
        raise ValueError(f"{name}: label: expected up to 60 printable characters, got {label!r:.80}")
    _check_arguments(name, metric, function)
    if name in METRICS:
        if METRICS[name] is metric and _FUNCTIONS[name] is function:
            return
        if name in _BUILT_IN or not replace:
            remedy = "" if name in _BUILT_IN else ", or replace=True to replace it"
            raise ValueError(f"{name!r} is the name of another metric: give the metric a name of its own{remedy}")
    same = [other for other, its in METRIC_LABELS.items() if its == label and other != name]
    if same:
        raise ValueError(f"{name}: {label!r} is the label of {same[0]}: give the metric a label of its own")
    METRICS[name], _FUNCTIONS[name] = metric, function
    name_metric(name, label)


def _check_arguments(name: str, metric: type[Metric], function: Callable[..., Tensor]) -> None:
    if not (isinstance(metric, type) and issubclass(metric, Metric)):
        raise ValueError(f"{name}: expected a subclass of torchmetrics.Metric, got {metric!r:.80}")
    try:
        inspect.signature(metric).bind()
    except TypeError as error:
        raise ValueError(f"{name}: expected that {metric.__name__}() needs no arguments: {error}") from error
    taken = tuple(inspect.signature(metric.update).parameters)[1:]
    if not taken or not {*taken} <= {*INPUTS}:
        raise ValueError(
            f"{name}: {metric.__name__}.update: expected some of {', '.join(INPUTS)}, got {', '.join(taken) or 'none'}"
        )
    try:
        inspect.signature(function).bind(**dict.fromkeys((*taken, "reduction")))
    except TypeError as error:
        arguments = ", ".join((*taken, "reduction"))
        raise ValueError(f"{name}: expected a function that takes {arguments}: {error}") from error


def require_metric(name: str) -> None:
    """Import a metric that an installed package announces, unless the name is known.

    Raises:
        ValueError: if there is no such metric; the message lists the names.
    """
    if name in METRICS:
        return
    entry = import_announced(_GROUP, name)
    if entry is None:
        choices = dict.fromkeys((*METRICS, *announced(_GROUP)))
        raise ValueError(f"unknown metric {name!r}: choose from {', '.join(choices)}")
    if name not in METRICS:
        raise ValueError(
            f"a package announces the metric {name!r}, but {entry.value} does not register it: expected a call of "
            "gmarpp.metrics.register_metric where the module is imported"
        )


def is_own_metric(name: str) -> bool:
    """Return whether a metric is none of this package's."""
    return name not in _BUILT_IN


def metric_function(name: str) -> Callable[..., Tensor]:
    """Return a metric's functional twin."""
    return _FUNCTIONS[name]


def metric_inputs(name: str) -> tuple[str, ...]:
    """Return the names of the inputs that a metric takes, such as `full` and `kept`."""
    return tuple(inspect.signature(METRICS[name].update).parameters)[1:]
