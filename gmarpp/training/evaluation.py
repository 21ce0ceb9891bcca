"""What a validation or a test measures, and on which images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def classification_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Return accuracy, top-5 accuracy and calibration error, named `<prefix>accuracy` and so on."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "accuracy_top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "calibration_error": MulticlassCalibrationError(num_classes),
        },
        prefix=prefix,
    )


def counted_images(batch: Mapping[str, Any], batch_idx: int, loaders: Any, dataloader_idx: int = 0) -> Tensor:
    """Return which of a rank's evaluation images belong in a metric.

    An image without a label does not, nor does one with which a DistributedSampler filled up the last round so that
    every rank gets as many: another rank has it, too.

    Args:
        batch: with `label`, (B,) long, -1 where unknown.
        batch_idx: of the batch among the rank's own.
        loaders: one data loader or several.
        dataloader_idx: which of them.

    Returns:
        (B,) bool, on the labels' device.
    """
    labels: Tensor = batch["label"]
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return labels >= 0
    first = batch_idx * loader.batch_size
    drawn = torch.arange(first, first + len(labels), device=labels.device) * sampler.num_replicas + sampler.rank
    images: Any = sampler.dataset
    return (labels >= 0) & (drawn < len(images))
