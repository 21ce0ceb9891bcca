"""Base of the metrics that are means over images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE


class MeanOverImages(Metric):
    """Mean over images of one value per image; NaN marks an image without a value, which does not count.

    States are a sum and a count, summed over ranks. Without any value the metric is NaN.

    Args:
        options: what distinguishes this metric from others of its class.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update: bool = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, *options: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection merges metrics whose states have the same names and are equal after the first batch, which
        # two sums may be by chance.
        name = "_".join(map(str, (type(self).__name__, *options)))
        self._sum, self._count = f"{name}_sum", f"{name}_count"
        self.add_state(self._sum, default=torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state(self._count, default=torch.tensor(0), dist_reduce_fx="sum")

    def accumulate(self, values: Tensor) -> None:
        """Add values per image, (B,); for `update` of subclasses."""
        setattr(self, self._sum, getattr(self, self._sum) + values.nansum())
        setattr(self, self._count, getattr(self, self._count) + (~values.isnan()).sum())

    def compute(self) -> Tensor:
        """Return the mean over the images seen."""
        mean: Tensor = getattr(self, self._sum) / getattr(self, self._count)
        return mean

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value or several.

        Args:
            val: results of `forward` or `compute`; None computes and plots the current value.
            ax: axes to draw on.

        Returns:
            The figure and its axes.

        Examples:
            >>> import torch
            >>> from gmarpp.metrics import AverageDrop
            >>> metric = AverageDrop()
            >>> values = [metric(torch.rand(4), torch.rand(4)) for _ in range(3)]
            >>> figure, axes = metric.plot(values)
        """
        return self._plot(val, ax)
