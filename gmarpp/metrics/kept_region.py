"""Average Drop, Increase and Gain."""

from torch import Tensor

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.functional.kept_region import average_drop, average_gain, average_increase


class AverageDrop(MeanOverImages):
    """Average Drop in percent; see `gmarpp.metrics.functional.average_drop`. Lower is better.

    As input to `forward` and `update`: `full` and `kept`, scores (B,) on the image and on the kept region.
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> AverageDrop()(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(25.)
    """

    is_differentiable: bool = True
    higher_is_better: bool = False
    plot_upper_bound: float | None = 100.0

    def update(self, full: Tensor, kept: Tensor) -> None:
        """Add a batch."""
        self.accumulate(average_drop(full, kept, reduction="none"))


class AverageIncrease(MeanOverImages):
    """Average Increase in percent; see `gmarpp.metrics.functional.average_increase`. Higher is better.

    As input to `forward` and `update`: `full` and `kept`, scores (B,) on the image and on the kept region.
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> AverageIncrease()(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(50.)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    plot_upper_bound: float | None = 100.0

    def update(self, full: Tensor, kept: Tensor) -> None:
        """Add a batch."""
        self.accumulate(average_increase(full, kept, reduction="none"))


class AverageGain(MeanOverImages):
    """Average Gain in percent; see `gmarpp.metrics.functional.average_gain`. Higher is better.

    As input to `forward` and `update`: `full` and `kept`, scores (B,) on the image and on the kept region.
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> AverageGain()(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(10.0000)
    """

    is_differentiable: bool = True
    higher_is_better: bool = True
    plot_upper_bound: float | None = 100.0

    def update(self, full: Tensor, kept: Tensor) -> None:
        """Add a batch."""
        self.accumulate(average_gain(full, kept, reduction="none"))
