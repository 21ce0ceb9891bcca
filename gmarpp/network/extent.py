"""The part of an image that a network's patch grid lies over: not all of it where patches do not divide the image."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from gmarpp.network.architecture import Architecture


def grid_extent(layout: Architecture, *size: int) -> tuple[int, int]:
    """Return the height and width in pixels, from the top left corner, that the patch grid spans.

    Where a patch does not divide the image, a network either leaves the last rows and columns out, and the extent is
    smaller than the image, or it pads the image, and the extent is larger.

    Args:
        layout: its `grid` is asked for images of other sizes too; one that ignores the size spans the whole image.
        size: height and width of the image in pixels; of a video, number of frames, height and width.
    """
    *frames, height, width = size
    return (
        _span(lambda side: layout.grid(*frames, side, width)[-2], height),
        _span(lambda side: layout.grid(*frames, height, side)[-1], width),
    )


def _span(cells_along: Callable[[int], int], side: int) -> int:
    """Return the pixels that the patches along one side span.

    The number of consecutive sides with the same number of patches is the number of pixels per patch, whether the rest
    is left out or padded.
    """
    cells = cells_along(side)
    first = last = side
    while first > 1 and cells_along(first - 1) == cells:
        first -= 1
    while last < 2 * side and cells_along(last + 1) == cells:
        last += 1
    return side if last == 2 * side else cells * (last - first + 1)


def fit_to_extent(images: Tensor, extent: tuple[int, int]) -> Tensor:
    """Crop images (..., H, W), or pad them with zeros, at the bottom and on the right."""
    return F.pad(images, (0, extent[1] - images.shape[-1], 0, extent[0] - images.shape[-2]))
