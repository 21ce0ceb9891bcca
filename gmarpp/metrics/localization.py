"""Agreement of maps with boxes or masks of the object.

Boxes become masks by `gmarpp.metrics.functional.boxes_to_masks`. Images with an empty mask do not count.
"""

from typing import Any

from torch import Tensor

from gmarpp.metrics.base import MeanOverImages
from gmarpp.metrics.functional.localization import average_precision, energy_inside, iou, pixel_accuracy, pointing_game


class PointingGame(MeanOverImages):
    """Share of images whose most relevant pixel lies on the object; see `gmarpp.metrics.functional.pointing_game`.

    As input to `forward` and `update`: `maps` (B, h, w), raw, and `masks` (B, H, W), true on the object.
    As output of `forward` and `compute`: a scalar, higher is better.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> PointingGame()(torch.eye(2)[None], torch.tensor([[[1, 1], [0, 0]]]))
        tensor(1.)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch."""
        self.accumulate(pointing_game(maps, masks, reduction="none"))


class EnergyInside(MeanOverImages):
    """Share of the min-max map's sum that lies on the object; see `gmarpp.metrics.functional.energy_inside`.

    As input to `forward` and `update`: `maps` (B, h, w), raw, and `masks` (B, H, W), true on the object.
    As output of `forward` and `compute`: a scalar, higher is better.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> EnergyInside()(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.7500)
    """

    is_differentiable: bool = True
    higher_is_better: bool = True

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch."""
        self.accumulate(energy_inside(maps, masks, reduction="none"))


class IoU(MeanOverImages):
    """Intersection over union of the object and the highlighted pixels; see `gmarpp.metrics.functional.iou`.

    As input to `forward` and `update`: `maps` (B, h, w), raw, and `masks` (B, H, W), true on the object.
    As output of `forward` and `compute`: a scalar, the mean over images, higher is better.

    Args:
        threshold: of the min-max map, in [0, 1]; None is the mean of each map.
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> IoU()(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.3333)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(threshold, **kwargs)
        self.threshold = threshold

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch."""
        self.accumulate(iou(maps, masks, self.threshold, reduction="none"))


class PixelAccuracy(MeanOverImages):
    """Share of pixels classified correctly as object or not; see `gmarpp.metrics.functional.pixel_accuracy`.

    As input to `forward` and `update`: `maps` (B, h, w), raw, and `masks` (B, H, W), true on the object.
    As output of `forward` and `compute`: a scalar, the mean over images, higher is better.

    Args:
        threshold: of the min-max map, in [0, 1]; None is the mean of each map.
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> PixelAccuracy()(torch.tensor([[[3.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.5000)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(threshold, **kwargs)
        self.threshold = threshold

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch."""
        self.accumulate(pixel_accuracy(maps, masks, self.threshold, reduction="none"))


class AveragePrecision(MeanOverImages):
    """Average precision of each map as a ranking of pixels; see `gmarpp.metrics.functional.average_precision`.

    As input to `forward` and `update`: `maps` (B, h, w), raw, and `masks` (B, H, W), true on the object.
    As output of `forward` and `compute`: a scalar, the mean over images, higher is better.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> AveragePrecision()(torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        tensor(0.8333)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add a batch."""
        self.accumulate(average_precision(maps, masks, reduction="none"))
