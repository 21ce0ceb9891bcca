"""Mixing of the images of a training batch, and smoothing of their targets."""

from dataclasses import dataclass

from timm.data import Mixup

from gmarpp.options import Range, require_ranges


@dataclass(frozen=True)
class Mixing:
    """How the images of a training batch, and the targets of one image, are mixed.

    Args:
        mixup: alpha of mixup's Beta distribution, 0 (none) or more (Zhang et al. 2018).
        cutmix: alpha of CutMix's Beta distribution, 0 (none) or more (Yun et al. 2019). With both, each batch draws
            one.
        label_smoothing: share of the target spread over all classes, in [0, 1).

    Raises:
        ValueError: an option is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        ranges = {"mixup": Range(0), "cutmix": Range(0), "label_smoothing": Range(0, 1, high_open=True)}
        require_ranges(vars(self), ranges, "--model.mixing.")

    def mixer(self, num_classes: int) -> Mixup | None:
        """Return what mixes images and labels into images and smoothed targets, or None where nothing is mixed."""
        if not (self.mixup or self.cutmix):
            return None
        return Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=num_classes)
