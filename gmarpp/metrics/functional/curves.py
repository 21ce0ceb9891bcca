"""Areas under insertion and deletion curves, and ROAD."""

from typing import Literal, get_args

import torch
from torch import Tensor

from gmarpp.metrics.functional.reduction import Reduction, reduce_images

RoadOrder = Literal["combined", "most_relevant_first", "least_relevant_first"]


def _area(fractions: Tensor, scores: Tensor) -> Tensor:
    if fractions.ndim != 1 or len(fractions) < 2 or scores.ndim != 2 or scores.shape[1] != len(fractions):
        raise ValueError(
            f"expected fractions of shape (S + 1,), S at least 1, and scores of shape (B, S + 1), got "
            f"{tuple(fractions.shape)} and {tuple(scores.shape)}"
        )
    return torch.trapezoid(scores.float(), fractions.float(), dim=1)


def insertion_auc(fractions: Tensor, insertion: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the area under the insertion curve by the trapezoid rule (Petsiuk et al. 2018). Higher is better.

    Args:
        fractions: (S + 1,), share of the patches inserted, from 0 to 1; they need not be evenly spaced.
        insertion: (B, S + 1), scores. The area of a curve with NaN is NaN, left out of the mean.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> insertion_auc(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.0, 0.8, 1.0]]))
        tensor(0.6500)
    """
    return reduce_images(_area(fractions, insertion), reduction)


def deletion_auc(fractions: Tensor, deletion: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the area under the deletion curve by the trapezoid rule (Petsiuk et al. 2018). Lower is better.

    Args:
        fractions: (S + 1,), share of the patches deleted, from 0 to 1; they need not be evenly spaced.
        deletion: (B, S + 1), scores. The area of a curve with NaN is NaN, left out of the mean.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> deletion_auc(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[1.0, 0.2, 0.0]]))
        tensor(0.3500)
    """
    return reduce_images(_area(fractions, deletion), reduction)


def insertion_deletion_gap(
    fractions: Tensor, insertion: Tensor, deletion: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the area under the insertion curve minus that under the deletion curve. Higher is better, 0 is chance.

    Args:
        fractions: (S + 1,), share of the patches inserted or deleted, from 0 to 1.
        insertion: (B, S + 1), scores.
        deletion: (B, S + 1), scores.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> curve = torch.tensor([[0.0, 0.8, 1.0]])
        >>> insertion_deletion_gap(torch.tensor([0.0, 0.5, 1.0]), curve, curve.flip(1) / 2)
        tensor(0.3250)
    """
    return reduce_images(_area(fractions, insertion) - _area(fractions, deletion), reduction)


def road(
    most_relevant_first: Tensor,
    least_relevant_first: Tensor,
    order: RoadOrder = "combined",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute ROAD, the mean score after removed patches were imputed (Rong et al. 2022).

    Args:
        most_relevant_first: (B, F), scores after removing growing shares of the most relevant patches.
        least_relevant_first: (B, F), scores after removing the least relevant ones.
        order: one order alone, or `combined`: (least relevant first - most relevant first) / 2, higher is better.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown order or reduction.

    Examples:
        >>> road(torch.tensor([[0.4, 0.2]]), torch.tensor([[0.9, 0.7]]))
        tensor(0.2500)
    """
    if order not in get_args(RoadOrder):
        raise ValueError(f"unknown order {order!r}: choose from {', '.join(get_args(RoadOrder))}")
    if most_relevant_first.ndim != 2 or most_relevant_first.shape != least_relevant_first.shape:
        raise ValueError(
            f"expected most_relevant_first and least_relevant_first of one shape (B, F), got "
            f"{tuple(most_relevant_first.shape)} and {tuple(least_relevant_first.shape)}"
        )
    most, least = most_relevant_first.float().mean(1), least_relevant_first.float().mean(1)
    values = {"most_relevant_first": most, "least_relevant_first": least, "combined": (least - most) / 2}
    return reduce_images(values[order], reduction)
