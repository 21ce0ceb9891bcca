"""Agreement of two maps."""

import math

import torch
from torch import Tensor


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Compute Spearman's rank correlation of maps, pair by pair; equal values share their mean rank.

    Negative relevance ranks below zero: maps that are each other's negative correlate by -1.

    Args:
        first: maps (n, h, w).
        second: maps (n, h, w).

    Returns:
        (n,) in [-1, 1]; 0 where one of the two is constant, NaN where one holds NaN.

    Raises:
        ValueError: shapes that differ.

    Examples:
        >>> rank_correlation(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[5.0, 7.0, 6.0]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    if first.shape != second.shape:
        raise ValueError(f"expected maps of one shape (n, h, w), got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = _centered_ranks(first), _centered_ranks(second)
    norms = a.norm(dim=1) * b.norm(dim=1)
    unordered = first.flatten(1).isnan().any(dim=1) | second.flatten(1).isnan().any(dim=1)
    correlation = torch.where(norms > 0, (a * b).sum(dim=1) / norms.clamp(min=1e-12), 0.0)
    return torch.where(unordered, math.nan, correlation)


def _centered_ranks(maps: Tensor) -> Tensor:
    values = maps.flatten(1).nan_to_num().contiguous()
    ordered = values.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to).double() / 2 - values.shape[1] / 2
