"""Operations on raw maps: checks, scaling to [0, 1], ranks of patches."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def check_finite_maps(maps: Tensor) -> None:
    """Check that maps have shape (B, h, w) and are finite.

    Raises:
        ValueError: naming the positions of the images in the batch.
    """
    if maps.ndim != 3 or not maps.is_floating_point():
        raise ValueError(f"maps: expected floating point of shape (B, h, w), got {tuple(maps.shape)}, {maps.dtype}")
    finite = maps.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"NaN or infinite values in the maps of images {(~finite).nonzero().flatten().tolist()}")


def check_maps(maps: Mapping[str, Tensor], images: Tensor) -> tuple[int, int]:
    """Check that all maps fit the images and are finite, and return their common patch grid.

    Args:
        maps: (B, h, w) per method.
        images: (B, C, H, W).

    Raises:
        ValueError: no map, a wrong shape, grids that differ, a grid finer than the pixels, or values that are not
            finite (naming the method and the positions of the images in the batch).
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images: expected shape (B, C, H, W) with B at least 1, got {tuple(images.shape)}")
    if not maps:
        raise ValueError("maps: expected maps (B, h, w) of at least one method, got none")
    grid: tuple[int, int] | None = None
    for method, batch in maps.items():
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            given = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"{method}: expected maps of floating point, a tensor, got {given}")
        if batch.ndim != 3 or len(batch) != len(images):
            raise ValueError(
                f"{method}: expected maps of shape ({len(images)}, h, w) for {len(images)} images, got "
                f"{tuple(batch.shape)}; for several classes per image, score each alone, with maps[:, k]"
            )
        height, width = batch.shape[1:]
        grid = grid or (height, width)
        if (height, width) != grid:
            raise ValueError(f"{method}: expected the patch grid {grid} of the other maps, got {(height, width)}")
        if height > images.shape[2] or width > images.shape[3]:
            raise ValueError(
                f"{method}: patch grid {(height, width)} is finer than images of {tuple(images.shape[2:])}"
            )
        finite = batch.isfinite().flatten(1).all(1)
        if not finite.all():
            positions = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"{method}: NaN or infinite values in the maps of image positions {positions}")
    assert grid is not None
    return grid


def stacked_maps(maps: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Return maps (B, h, w) of several methods as one tensor (M, B, h, w), in the widest of their types."""
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in maps.values()), torch.float32)
    # Apple's GPUs have no wider type.
    dtype = torch.float32 if device.type == "mps" else dtype
    return torch.stack([each.to(device, dtype) for each in maps.values()])


def rank_patches(maps: Tensor) -> Tensor:
    """Return the rank of every patch: 0 for the most relevant, ties by index (a constant map ranks in reading order).

    Negative relevance comes behind zero, what speaks most against the class last.

    Args:
        maps: (..., h, w), raw.

    Returns:
        (..., h * w) long, a permutation of 0 … h * w - 1 in every map.

    Examples:
        >>> rank_patches(torch.tensor([[[0.1, 0.9], [0.9, 0.3]]]))
        tensor([[3, 0, 1, 2]])
    """
    return maps.flatten(-2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def minmax(maps: Tensor) -> Tensor:
    """Scale every map to [0, 1]; a constant map, which points nowhere, becomes 0.

    Negative relevance is the low end of the scale: zero is then above 0.

    Args:
        maps: (..., h, w), on their own grid: interpolation would leave constant maps slightly uneven.
    """
    # In double precision, the difference of two float32 values cannot overflow.
    values = maps.double()
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    return ((values - low) / torch.where(high > low, high - low, 1.0)).to(maps.dtype)


def normalize_map(attribution: Tensor | Array) -> Array:
    """Scale each map to [0, 1] by its minimum and maximum, whatever their sign.

    Args:
        attribution: maps, shape (..., h, w), any range.

    Returns:
        float32 array of the same shape. A constant map becomes zeros; values that are not finite count as the minimum.

    Examples:
        >>> normalize_map(torch.tensor([[1.0, 3.0], [2.0, 5.0]])).tolist()
        [[0.0, 0.5], [0.25, 1.0]]
    """
    values = torch.as_tensor(attribution, dtype=torch.float64)
    finite = values.isfinite()
    low = values.where(finite, math.inf).amin((-2, -1), keepdim=True)
    return minmax(values.where(finite, low.where(low.isfinite(), 0.0))).float().numpy()


def normalize_signed_map(attribution: Tensor | Array) -> Array:
    """Scale each map to [-1, 1] by its largest absolute value, so that zero stays zero.

    Args:
        attribution: maps, shape (..., h, w), any range.

    Returns:
        float32 array of the same shape. A map of zeros stays one; values that are not finite count as zero.

    Examples:
        >>> normalize_signed_map(torch.tensor([[1.0, -4.0], [2.0, 0.0]])).tolist()
        [[0.25, -1.0], [0.5, 0.0]]
    """
    values = torch.as_tensor(attribution, dtype=torch.float64)
    values = values.where(values.isfinite(), 0.0)
    largest = values.abs().amax((-2, -1), keepdim=True)
    return (values / torch.where(largest > 0, largest, 1.0)).float().numpy()
