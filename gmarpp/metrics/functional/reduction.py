"""From a value per image to one number."""

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "none"]


def reduce_images(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean over the images for which the value is defined (not NaN), or the values themselves.

    Args:
        values: (B,) float32.
        reduction: `mean` gives a scalar, NaN if no value is defined; `none` gives (B,).
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values.nanmean() if reduction == "mean" else values
