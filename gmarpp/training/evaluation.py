"""On which images a validation or a test measures."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


def known_labels(labels: Tensor) -> Tensor:
    """Return which images have a label: (B,) bool.

    Args:
        labels: (B,) or (B, C): integers, -1 where unknown, of which one known label is enough; or values, NaN where
            unknown, which all have to be known.
    """
    if labels.is_floating_point():
        return ~labels.flatten(1).isnan().any(1) if labels.dim() > 1 else ~labels.isnan()
    return (labels >= 0).flatten(1).any(1) if labels.dim() > 1 else labels >= 0


def counted_images(batch: Mapping[str, Any], batch_idx: int, loaders: Any, dataloader_idx: int = 0) -> Tensor:
    """Return which of a rank's evaluation images belong in a metric.

    An image without a label does not, nor does one with which a DistributedSampler filled up the last round so that
    every rank gets as many: another rank has it, too.

    Args:
        batch: with `label`, as `known_labels` takes it.
        batch_idx: of the batch among the rank's own.
        loaders: one data loader or several.
        dataloader_idx: which of them.

    Returns:
        (B,) bool, on the labels' device.
    """
    known = known_labels(batch["label"])
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return known
    first = batch_idx * loader.batch_size
    drawn = torch.arange(first, first + len(known), device=known.device) * sampler.num_replicas + sampler.rank
    images: Any = sampler.dataset
    return known & (drawn < len(images))
