"""Max-sensitivity and infidelity (Yeh et al. 2019)."""

from torch import Tensor

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.functional.stability import infidelity, max_sensitivity


class MaxSensitivity(MeanOverImages):
    """Largest relative change of maps under noise; see `gmarpp.metrics.functional.max_sensitivity`. Lower is better.

    As input to `forward` and `update`: `map_changes` (B, S), as `gmarpp.perturbation.map_changes` returns them.
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> MaxSensitivity()(torch.tensor([[0.1, 0.3], [0.2, 0.1]]))
        tensor(0.2500)
    """

    is_differentiable: bool = True
    higher_is_better: bool = False
    plot_upper_bound: float | None = None

    def update(self, map_changes: Tensor) -> None:
        """Add a batch."""
        self.accumulate(max_sensitivity(map_changes, reduction="none"))


class Infidelity(MeanOverImages):
    """Squared error of maps as forecasts of drops; see `gmarpp.metrics.functional.infidelity`. Lower is better.

    As input to `forward` and `update`: `removed_relevance` and `score_drops` (B, S), as
    `gmarpp.perturbation.square_removals` returns them.
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> Infidelity()(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
        tensor(0.1000)
    """

    is_differentiable: bool = True
    higher_is_better: bool = False
    plot_upper_bound: float | None = None

    def update(self, removed_relevance: Tensor, score_drops: Tensor) -> None:
        """Add a batch."""
        self.accumulate(infidelity(removed_relevance, score_drops, reduction="none"))
