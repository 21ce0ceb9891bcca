"""Reduction of a value per image to one number."""

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "none"]


def reduce_images(values: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean over the images for which the value is defined (not NaN), or the values themselves.

    Args:
        values: (B,) float32.
        reduction: `mean` gives a scalar, NaN if no value is defined; `none` gives (B,).

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose from mean, none")
    return values.nanmean() if reduction == "mean" else values
