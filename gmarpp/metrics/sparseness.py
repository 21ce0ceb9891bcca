"""Sparseness of maps."""

from torch import Tensor

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.functional.sparseness import sparseness


class Sparseness(MeanOverImages):
    """Gini index of the patches' absolute relevance; see `gmarpp.metrics.functional.sparseness`.

    As input to `forward` and `update`: `maps` (B, h, w), raw.
    As output of `forward` and `compute`: a scalar; higher is sparser, which makes a map easier to read but not more
    faithful, so neither direction is better.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> Sparseness()(torch.tensor([[[0.0, 0.0], [0.0, 5.0]]]))
        tensor(0.7500)
    """

    is_differentiable: bool = True
    higher_is_better: bool | None = None

    def update(self, maps: Tensor) -> None:
        """Add a batch."""
        self.accumulate(sparseness(maps, reduction="none"))
