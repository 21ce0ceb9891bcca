"""Agreement of maps with boxes or masks of the object.

Each map is scaled to [0, 1] on its own grid (a constant map becomes 0) and upsampled to the masks' size bilinearly, in
float64. Negative relevance is the low end of that scale; `energy_inside`, a share of relevance, leaves it out. An image
with an empty mask, because it has no box or an empty one, has no value: NaN, left out of means.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.maps import check_finite_maps, minmax
from gmarpp.metrics.functional.reduction import Reduction, reduce_images


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks of the pixels whose center lies in the box; an empty box or one with NaN gives an empty mask.

    Args:
        boxes: (B, 4), x0, y0, x1, y1 in pixels, right and bottom edges exclusive.
        size: (H, W).

    Returns:
        (B, H, W) bool.

    Raises:
        ValueError: boxes of a wrong shape.

    Examples:
        >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape (B, 4), got {tuple(boxes.shape)}")
    x0, y0, x1, y1 = boxes.float().T[..., None]
    rows, columns = (torch.arange(n, device=boxes.device, dtype=torch.float32) + 0.5 for n in size)
    inside_rows, inside_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    masks: Tensor = inside_rows[:, :, None] & inside_columns[:, None, :]
    return masks


def _aligned(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    check_finite_maps(maps)
    if masks.ndim != 3 or len(masks) != len(maps):
        raise ValueError(f"masks: expected shape ({len(maps)}, H, W) for {len(maps)} maps, got {tuple(masks.shape)}")
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError("masks: expected true or 1 on the object and false or 0 elsewhere, got other values")
    masks = masks.to(maps.device, torch.bool)
    scaled = minmax(maps.double())[:, None]
    upsampled = F.interpolate(scaled, size=masks.shape[1:], mode="bilinear", align_corners=False)
    return upsampled.flatten(1), masks.flatten(1)


def _where_masked(values: Tensor, masks: Tensor, reduction: Reduction) -> Tensor:
    return reduce_images(torch.where(masks.any(1), values.float(), math.nan), reduction)


def _rounded(values: Tensor) -> Tensor:
    """Round away the last bits, in which interpolation makes equal pixels differ."""
    return values.round(decimals=10)


def _highlighted(maps: Tensor, threshold: float | None) -> Tensor:
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1] or None, got {threshold}")
    return _rounded(maps) > (_rounded(maps.mean(1, keepdim=True)) if threshold is None else threshold)


def pointing_game(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the share of images whose most relevant pixel, the first on ties, lies on the object (Zhang et al. 2018).

    That is the pixel with most relevance for the class; of a map that is negative everywhere, the least against it.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image (0 or 1, NaN where the mask is empty).

    Raises:
        ValueError: wrong shapes, maps that are not finite, or an unknown reduction.

    Examples:
        >>> pointing_game(torch.eye(2)[None], torch.tensor([[[1, 1], [0, 0]]]))
        tensor(1.)
    """
    scaled, masks = _aligned(maps, masks)
    hits = masks.gather(1, _rounded(scaled).argmax(1, keepdim=True))[:, 0]
    return _where_masked(hits, masks, reduction)


def energy_inside(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the share of the min-max map's sum that lies on the object (Wang et al. 2020); 0 for a constant map.

    A share needs relevance from 0 on: of a map with negative values, the positive part counts alone.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, maps that are not finite, or an unknown reduction.

    Examples:
        >>> energy_inside(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.7500)
    """
    check_finite_maps(maps)
    scaled, masks = _aligned(maps.clamp(min=0), masks)
    total = scaled.sum(1)
    inside = (scaled * masks).sum(1) / torch.where(total > 0, total, 1.0)
    return _where_masked(inside, masks, reduction)


def iou(maps: Tensor, masks: Tensor, threshold: float | None = None, reduction: Reduction = "mean") -> Tensor:
    """Compute the intersection over union of the object and the pixels where the min-max map exceeds a threshold.

    Negative relevance is the low end of the min-max map, and lowers its mean.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        threshold: in [0, 1]; None is the mean of each min-max map, as Chefer et al. 2021 segment.
        reduction: `mean` over images, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, maps that are not finite, or an unknown reduction.

    Examples:
        >>> iou(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.3333)
    """
    scaled, masks = _aligned(maps, masks)
    highlighted = _highlighted(scaled, threshold)
    return _where_masked((highlighted & masks).sum(1).double() / (highlighted | masks).sum(1), masks, reduction)


def pixel_accuracy(
    maps: Tensor, masks: Tensor, threshold: float | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the share of pixels classified correctly, as object where the min-max map exceeds a threshold.

    Negative relevance is the low end of the min-max map, and lowers its mean.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        threshold: in [0, 1]; None is the mean of each min-max map, as Chefer et al. 2021 segment.
        reduction: `mean` over images, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, maps that are not finite, or an unknown reduction.

    Examples:
        >>> pixel_accuracy(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.5000)
    """
    scaled, masks = _aligned(maps, masks)
    return _where_masked((_highlighted(scaled, threshold) == masks).double().mean(1), masks, reduction)


def average_precision(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Compute the average precision of each map as a ranking of the pixels, without a threshold.

    Negative relevance ranks behind zero.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image.

    Raises:
        ValueError: wrong shapes, maps that are not finite, or an unknown reduction.

    Examples:
        >>> average_precision(torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.8333)
    """
    scaled, masks = _aligned(maps, masks)
    ordered, order = _rounded(scaled).sort(dim=1, descending=True)
    inside = masks.gather(1, order).double()
    place = torch.arange(inside.shape[1], device=inside.device).expand_as(order)
    # Equal pixels enter the ranking together: each counts with the precision at the last of them.
    ends = F.pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
    last = torch.where(ends, place, inside.shape[1]).flip(1).cummin(1).values.flip(1)
    precision = (inside.cumsum(1) / (place + 1)).gather(1, last)
    return _where_masked((inside * precision).sum(1) / inside.sum(1), masks, reduction)
