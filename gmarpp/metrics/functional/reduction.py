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


def check_finite_maps(maps: Tensor) -> None:
    """Check that maps have shape (B, h, w) and are finite.

    Raises:
        ValueError: naming the positions of the images in the batch.
    """
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ValueError(f"maps must be floating point of shape (B, h, w), got {tuple(maps.shape)}, {maps.dtype}")
    finite = maps.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"NaN or infinite values in the maps of images {(~finite).nonzero().flatten().tolist()}")
