"""The options of a `ViTClassifier` in plain values, as checkpoints, YAML and loggers hold them."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, fields
from typing import Any

from gmarpp.network.files.weights import Weights
from gmarpp.options import Range, require_ranges
from gmarpp.training.execution import Execution
from gmarpp.training.mixing import Mixing
from gmarpp.training.optim import Optimization
from gmarpp.training.task import Task

# Options of a `ViTClassifier` that are groups, with their classes.
GROUPS: dict[str, type[Any]] = {"optimizer": Optimization, "mixing": Mixing, "execution": Execution}
RANGES = {"image_size": Range(1), "drop_path": Range(0, 1, high_open=True)}
# The group of each option in one.
GROUP_OF = {option.name: group for group, kind in GROUPS.items() for option in fields(kind)}


def plain(**groups: Any) -> dict[str, dict[str, Any]]:
    """Return groups as dicts of plain values, as checkpoints and YAML hold them.

    Raises:
        TypeError: a group is no instance of its class.
    """
    for name, group in groups.items():
        if not isinstance(group, GROUPS[name]):
            raise TypeError(f"{name}: expected an instance of {GROUPS[name].__name__}, got {group!r:.80}")
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(group).items()}
        for name, group in groups.items()
    }


def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `ViTClassifier` whose options are given in plain values.

    Raises:
        TypeError: a group has no such option.
        ValueError: an option is out of range.
    """
    return {
        name: GROUPS[name](**value) if name in GROUPS and isinstance(value, Mapping) else value
        for name, value in options.items()
    }


def in_groups(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a checkpoint holds; the first ones were written before there were groups."""
    if GROUPS.keys() & options.keys():
        return dict(options)
    grouped: dict[str, Any] = {}
    for name, value in options.items():
        holder = grouped.setdefault(GROUP_OF[name], {}) if name in GROUP_OF else grouped
        holder[name] = value
    return grouped


def moved_options(message: str) -> str:
    """Return where the options that an error's message names were moved to, or nothing where it names no such one."""
    names = [name for name in re.findall(r"\bmodel\.(\w+)", message) if name in GROUP_OF]
    return ", ".join(f"--model.{name} is --model.{GROUP_OF[name]}.{name} now" for name in dict.fromkeys(names))


def classifier_options(weights: Weights) -> dict[str, Any]:
    """Return the options of a `ViTClassifier` that weights fit, in plain values.

    Those of groups, such as the optimizer's, are there only where the file has them.

    Raises:
        ValueError: they are another network's than timm's.
    """
    weights.require_timm()
    return in_groups(weights.training) or {
        "architecture": weights.architecture,
        "task": weights.task,
        "num_classes": weights.num_classes,
        "image_size": None if weights.image_size is None else list(weights.image_size),
        "pretrained": False,
        "model_args": weights.model_args,
        "preprocessing": weights.preprocessing,
    }


def resolve_options(options: MutableMapping[str, Any], task: Task, mixing: Mixing) -> None:
    """Set `num_classes` where it is not given, and check the options of a `ViTClassifier` that no group checks.

    Raises:
        ValueError: an option is out of range, or cannot be used with the task; naming it.
    """
    require_ranges(options, RANGES, "--model.")
    if options["num_classes"] is None:
        options["num_classes"] = task.default_outputs
    size, outputs, name = options["image_size"], options["num_classes"], options["task"]
    if isinstance(size, list) and len(size) != 2:
        raise ValueError(f"--model.image_size: expected a side or [height, width], got {size}")
    if outputs is None or outputs not in task.outputs:
        lowest = f"{task.outputs.low:.0f}"
        expected = lowest if task.outputs.low == task.outputs.high else f"at least {lowest}"
        raise ValueError(f"--model.num_classes: expected {expected} for --model.task {name}, got {outputs}")
    mixing.require_task(name, task)
    if options["class_weights"] is not None and not task.has_classes:
        raise ValueError(f"--model.class_weights: --model.task {name} has no classes: leave it out")
