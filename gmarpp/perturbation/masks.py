"""Order of the patches and the way from the patch grid to pixels."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gmarpp.attribution import UnsupportedNetworkError, architecture_of
from gmarpp.attribution.extent import grid_extent


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
        raise ValueError(f"images must have shape (B, C, H, W) with B at least 1, got {tuple(images.shape)}")
    if not maps:
        raise ValueError("maps is empty: give one map (B, h, w) per method")
    grid: tuple[int, int] | None = None
    for method, batch in maps.items():
        if batch.ndim != 3 or len(batch) != len(images):
            raise ValueError(
                f"{method}: maps must have shape ({len(images)}, h, w) for {len(images)} images, got "
                f"{tuple(batch.shape)}; of several classes per image, score each alone, with maps[:, k]"
            )
        height, width = batch.shape[1:]
        grid = grid or (height, width)
        if (height, width) != grid:
            raise ValueError(f"{method}: patch grid {(height, width)} differs from {grid} of the other maps")
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


def rank_patches(maps: Tensor) -> Tensor:
    """Rank of every patch: 0 for the most relevant, ties by index (so a constant map ranks in reading order).

    Args:
        maps: (..., h, w), raw.

    Returns:
        (..., h * w) long, a permutation of 0 … h * w - 1 in every map.

    Example:
        >>> rank_patches(torch.tensor([[[0.1, 0.9], [0.9, 0.3]]]))
        tensor([[3, 0, 1, 2]])
    """
    return maps.flatten(-2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def step_counts(patches: int, steps: int) -> list[int]:
    """Number of changed patches at every curve point: from 0 to `patches`, as evenly spaced as whole patches allow.

    With more steps than patches there is one step per patch, so the curve is shorter than asked for.

    Example:
        >>> step_counts(10, 4)
        [0, 2, 5, 8, 10]
        >>> step_counts(3, 28)
        [0, 1, 2, 3]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    steps = min(steps, patches)
    return [round(step * patches / steps) for step in range(steps + 1)]


def patch_extent(model: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width in pixels over which a grid of maps lies.

    Args:
        model: a network of a known family whose own grid this is; the maps of any other span the image.
        size: of the image, (H, W).
        grid: of the maps, (h, w).
    """
    try:
        layout = architecture_of(model)
    except UnsupportedNetworkError:
        return size
    return grid_extent(layout, *size) if layout.grid(*size) == grid else size


def pixel_to_patch(
    grid: tuple[int, int], size: tuple[int, int], device: torch.device, extent: tuple[int, int] | None = None
) -> Tensor:
    """Index of the patch every pixel belongs to: nearest-neighbour upsampling of the patch grid.

    Pixel row y belongs to patch row floor(y * h / extent), so where the grid does not divide the extent some patches
    are one pixel larger than others and every pixel still belongs to exactly one. Pixels beyond the extent, which the
    network does not see, go with the last patch.

    Args:
        grid: (h, w).
        size: of the image, (H, W).
        device: of the result.
        extent: pixels that the grid spans; the image by default.

    Returns:
        (H * W,) long.
    """
    rows, columns = (
        (torch.arange(n, device=device) * cells // span).clamp(max=cells - 1)
        for cells, n, span in zip(grid, size, extent or size, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def minmax(maps: Tensor) -> Tensor:
    """Scale every map to [0, 1]; a constant map, which points nowhere, becomes 0.

    Args:
        maps: (..., h, w), on their own grid: interpolation leaves constant maps an ulp uneven.
    """
    values = maps.double()  # no range of float32 overflows
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    return ((values - low) / torch.where(high > low, high - low, 1.0)).to(maps.dtype)
