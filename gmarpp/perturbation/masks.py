"""Masks on the patch grid, and at the resolution of the image."""

import torch
from torch import Tensor, nn

from gmarpp.attribution import UnsupportedNetworkError, architecture_of
from gmarpp.network.extent import grid_extent


def step_counts(patches: int, steps: int) -> list[int]:
    """Return the number of changed patches at every curve point, from 0 to `patches`, as evenly spaced as possible.

    With more steps than patches there is one step per patch, so the curve is shorter than requested.

    Raises:
        ValueError: fewer than one step.

    Examples:
        >>> step_counts(10, 4)
        [0, 2, 5, 8, 10]
        >>> step_counts(3, 28)
        [0, 1, 2, 3]
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
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
    """Return the index of the patch of every pixel: nearest-neighbor upsampling of the patch grid.

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
