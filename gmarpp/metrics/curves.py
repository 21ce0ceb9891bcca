"""Areas under insertion and deletion curves, and ROAD."""

from typing import Any

from torch import Tensor

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.functional.curves import RoadOrder, deletion_auc, insertion_auc, insertion_deletion_gap, road


class _MeanScore(MeanOverImages):
    """Mean over images in the unit of the scores, which may be logits: no fixed bounds."""

    is_differentiable: bool = True
    plot_lower_bound: float | None = None
    plot_upper_bound: float | None = None


class InsertionAUC(_MeanScore):
    """Area under the insertion curve; see `gmarpp.metrics.functional.insertion_auc`. Higher is better.

    As input to `forward` and `update`: `fractions` (S + 1,) and `insertion`, scores (B, S + 1).
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> InsertionAUC()(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.0, 0.8, 1.0]]))
        tensor(0.6500)
    """

    higher_is_better: bool = True

    def update(self, fractions: Tensor, insertion: Tensor) -> None:
        """Add a batch."""
        self.accumulate(insertion_auc(fractions, insertion, reduction="none"))


class DeletionAUC(_MeanScore):
    """Area under the deletion curve; see `gmarpp.metrics.functional.deletion_auc`. Lower is better.

    As input to `forward` and `update`: `fractions` (S + 1,) and `deletion`, scores (B, S + 1).
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> DeletionAUC()(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[1.0, 0.2, 0.0]]))
        tensor(0.3500)
    """

    higher_is_better: bool = False

    def update(self, fractions: Tensor, deletion: Tensor) -> None:
        """Add a batch."""
        self.accumulate(deletion_auc(fractions, deletion, reduction="none"))


class InsertionDeletionGap(_MeanScore):
    """Insertion AUC minus deletion AUC; see `gmarpp.metrics.functional.insertion_deletion_gap`. Higher is better.

    As input to `forward` and `update`: `fractions` (S + 1,), `insertion` and `deletion`, scores (B, S + 1).
    As output of `forward` and `compute`: a scalar.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> curve = torch.tensor([[0.0, 0.8, 1.0]])
        >>> InsertionDeletionGap()(torch.tensor([0.0, 0.5, 1.0]), curve, curve.flip(1) / 2)
        tensor(0.3250)
    """

    higher_is_better: bool = True

    def update(self, fractions: Tensor, insertion: Tensor, deletion: Tensor) -> None:
        """Add a batch."""
        self.accumulate(insertion_deletion_gap(fractions, insertion, deletion, reduction="none"))


class ROAD(_MeanScore):
    """Score after removing and imputing patches; see `gmarpp.metrics.functional.road`.

    As input to `forward` and `update`: `most_relevant_first` and `least_relevant_first`, scores (B, F), as
    `gmarpp.perturbation.road_scores` returns them.
    As output of `forward` and `compute`: a scalar. Higher is better, except in the order `most_relevant_first`.

    Args:
        order: `most_relevant_first`, `least_relevant_first`, or `combined`, half the difference of the two.
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> ROAD()(torch.tensor([[0.4, 0.2]]), torch.tensor([[0.9, 0.7]]))
        tensor(0.2500)
    """

    def __init__(self, order: RoadOrder = "combined", **kwargs: Any) -> None:
        super().__init__(order, **kwargs)
        self.order = order

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a faithful map scores high in this order."""
        return self.order != "most_relevant_first"

    def update(self, most_relevant_first: Tensor, least_relevant_first: Tensor) -> None:
        """Add a batch."""
        self.accumulate(road(most_relevant_first, least_relevant_first, self.order, reduction="none"))
