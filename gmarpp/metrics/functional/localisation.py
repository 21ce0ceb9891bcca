"""Agreement of maps with boxes or masks of the object.

Maps are upsampled to the masks' size (bilinear) and scaled to [0, 1] each; a constant map becomes 0 everywhere. An
image whose mask is empty - it has no box, or an empty one - has no value: NaN, left out of means.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_accuracy, binary_average_precision

from gmarpp.metrics.functional.reduction import Reduction, check_finite_maps, reduce_images
from gmarpp.perturbation.masks import minmax


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the pixels whose centre lies in the box; an empty box or one with NaN gives an empty mask.

    Args:
        boxes: (B, 4), x0, y0, x1, y1 in pixels, right and bottom edges exclusive.
        size: (H, W).

    Returns:
        (B, H, W) bool.

    Example:
        >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (B, 4), got {tuple(boxes.shape)}")
    x0, y0, x1, y1 = boxes.float().T[..., None]
    rows, columns = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    inside_rows, inside_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    masks: Tensor = inside_rows[:, :, None] & inside_columns[:, None, :]
    return masks


def _aligned(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    check_finite_maps(maps)
    if masks.ndim != 3 or len(masks) != len(maps):
        raise ValueError(f"masks must have shape ({len(maps)}, H, W) for {len(maps)} maps, got {tuple(masks.shape)}")
    masks = masks.to(maps.device, torch.bool)
    upsampled = F.interpolate(maps[:, None].float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    return minmax(upsampled[:, 0]).flatten(1), masks.flatten(1)


def _where_masked(values: Tensor, masks: Tensor, reduction: Reduction) -> Tensor:
    return reduce_images(torch.where(masks.any(1), values, math.nan), reduction)


def _highlighted(maps: Tensor, threshold: float | None) -> Tensor:
    return maps > (maps.mean(1, keepdim=True) if threshold is None else threshold)


def pointing_game(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Share of images whose most relevant pixel (the first one on ties) lies on the object (Zhang et al. 2018).

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image (0 or 1, NaN where the mask is empty).

    Example:
        >>> pointing_game(torch.eye(2)[None], torch.tensor([[[1, 1], [0, 0]]]))
        tensor(1.)
    """
    scaled, masks = _aligned(maps, masks)
    return _where_masked(masks.gather(1, scaled.argmax(1, keepdim=True))[:, 0].float(), masks, reduction)


def energy_inside(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Share of the min-max map's sum that lies on the object (Wang et al. 2020); 0 for a constant map.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image.

    Example:
        >>> energy_inside(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.7500)
    """
    scaled, masks = _aligned(maps, masks)
    total = scaled.sum(1)
    inside = torch.where(total > 0, (scaled * masks).sum(1) / total, 0.0)
    return _where_masked(inside, masks, reduction)


def iou(maps: Tensor, masks: Tensor, threshold: float | None = None, reduction: Reduction = "mean") -> Tensor:
    """Intersection over union of the object and the pixels where the min-max map exceeds a threshold.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        threshold: in [0, 1]; None is the mean of each min-max map, as Chefer et al. 2021 segment.
        reduction: `mean` over images, or `none` for a value per image.

    Example:
        >>> iou(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.3333)
    """
    scaled, masks = _aligned(maps, masks)
    highlighted = _highlighted(scaled, threshold)
    return _where_masked((highlighted & masks).sum(1) / (highlighted | masks).sum(1), masks, reduction)


def pixel_accuracy(
    maps: Tensor, masks: Tensor, threshold: float | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Share of pixels told right - object or not - by whether the min-max map exceeds a threshold.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        threshold: in [0, 1]; None is the mean of each min-max map, as Chefer et al. 2021 segment.
        reduction: `mean` over images, or `none` for a value per image.

    Example:
        >>> pixel_accuracy(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.5000)
    """
    scaled, masks = _aligned(maps, masks)
    correct = binary_accuracy(_highlighted(scaled, threshold).int(), masks.int(), multidim_average="samplewise")
    return _where_masked(correct, masks, reduction)


def average_precision(maps: Tensor, masks: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Average precision of each map as a ranking of the pixels, averaged over images, without a threshold.

    Args:
        maps: (B, h, w), raw.
        masks: (B, H, W), true on the object.
        reduction: `mean`, or `none` for a value per image.

    Example:
        >>> average_precision(torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.8333)
    """
    scaled, masks = _aligned(maps, masks)
    # Pixels that are equal in exact arithmetic leave the interpolation an ulp apart, which would order ties by chance.
    scaled = scaled.round(decimals=5)
    values = scaled.new_full((len(scaled),), math.nan)
    default = torch.get_default_dtype()
    # torchmetrics divides numbers of pixels in the default dtype, which may be bfloat16.
    torch.set_default_dtype(torch.float32)
    try:
        for image in masks.any(1).nonzero()[:, 0].tolist():
            values[image] = binary_average_precision(scaled[image], masks[image].int(), validate_args=False)
    finally:
        torch.set_default_dtype(default)
    return reduce_images(values, reduction)
