"""Weights of classes in the training loss: given, or counted so that rare classes weigh as much as frequent ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gmarpp.data.probe import labels_of
from gmarpp.options import Range, require_ranges
from gmarpp.training.task import Task


def class_weights(task: Task, options: Mapping[str, Any], loader: Any, device: torch.device) -> Tensor | None:
    """Return the weights (C,) that a `ViTClassifier`'s options ask for, None where they ask for none.

    Args:
        task: whose classes are weighted.
        options: with `class_weights` and `num_classes`.
        loader: of the training data, whose labels are counted for `balanced`.
        device: of the weights.

    Raises:
        ValueError: there are too many or too few, one is not above 0, or the data does not tell labels to count.
    """
    asked, outputs = options["class_weights"], options["num_classes"]
    if asked is None:
        return None
    if asked == "balanced":
        labels = torch.as_tensor(training_labels(getattr(loader, "dataset", None)))
        return task.balance(task.labels(labels, outputs), outputs).to(device)
    require_ranges({"class_weights": asked}, {"class_weights": Range(0, low_open=True)}, "--model.")
    if len(asked) != outputs:
        raise ValueError(f"--model.class_weights: expected a weight for each of {outputs} classes, got {len(asked)}")
    return torch.tensor(asked, device=device)


def training_labels(dataset: Any) -> Any:
    """Return the labels (n,) or (n, C) that a data set tells without reading images.

    Raises:
        ValueError: it tells none.
    """
    classes = labels_of(dataset)
    # Labels that do not exclude each other are no classes.
    labels = getattr(dataset, "labels", None) if classes is None else classes
    if labels is None:
        raise ValueError(
            "--model.class_weights balanced: the training data has no labels or targets to count: give a weight for "
            "each class"
        )
    return labels
