"""Average Drop, Increase and Gain: the score on the image against the score on its most relevant part."""

import math

import torch
from torch import Tensor

from gmarpp.metrics.functional.reduction import Reduction, reduce_images


def _check(full: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    if full.ndim != 1 or full.shape != kept.shape:
        raise ValueError(f"expected full and kept of one shape (B,), got {tuple(full.shape)} and {tuple(kept.shape)}")
    return full.float(), kept.float()


def average_drop(full: Tensor, kept: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute Average Drop in percent: `100 * mean(ReLU(Y - O) / Y)`.

    Source: Chattopadhyay et al. 2018. Lower is better. A score of 0 cannot drop: its drop is 0.
    Relative to a negative score (a logit) the drop is undefined: NaN, left out of the mean.

    Args:
        full: (B,), Y, score on the image.
        kept: (B,), O, score on the kept region.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> average_drop(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(25.)
    """
    full, kept = _check(full, kept)
    drop = torch.where(full == 0, 0.0, 100 * (full - kept).relu() / full.where(full != 0, 1.0))
    return reduce_images(torch.where((full < 0) | kept.isnan(), math.nan, drop), reduction)


def average_increase(full: Tensor, kept: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute Average Increase in percent: `100 * mean(O > Y)`.

    Source: Chattopadhyay et al. 2018. Higher is better. NaN where a score is NaN.

    Args:
        full: (B,), Y, score on the image.
        kept: (B,), O, score on the kept region.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> average_increase(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(50.)
    """
    full, kept = _check(full, kept)
    increase = 100 * (kept > full).float()
    return reduce_images(torch.where(full.isnan() | kept.isnan(), math.nan, increase), reduction)


def average_gain(full: Tensor, kept: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute Average Gain in percent: `100 * mean(ReLU(O - Y) / (1 - Y))`.

    Source: Zhang et al. 2024. Higher is better. A probability of 1 cannot gain: its gain is 0.
    Above 1 (a logit) the gain is undefined: NaN, left out of the mean.

    Args:
        full: (B,), Y, score on the image.
        kept: (B,), O, score on the kept region.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Examples:
        >>> average_gain(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(10.0000)
    """
    full, kept = _check(full, kept)
    gain = torch.where(full == 1, 0.0, 100 * (kept - full).relu() / (1 - full).where(full != 1, 1.0))
    return reduce_images(torch.where((full > 1) | kept.isnan(), math.nan, gain), reduction)
