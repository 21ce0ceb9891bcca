"""Mixing of the images of a training batch, and smoothing of their targets."""

from dataclasses import dataclass

from timm.data import Mixup
from torch import Tensor

from gmarpp.options import Range, require_ranges
from gmarpp.training.task import Task


@dataclass(frozen=True)
class Mixing:
    """How the images of a training batch, and the targets of one image, are mixed.

    Args:
        mixup: alpha of mixup's Beta distribution, 0 (none) or more (Zhang et al. 2018).
        cutmix: alpha of CutMix's Beta distribution, 0 (none) or more (Yun et al. 2019). With both, each batch draws
            one.
        label_smoothing: share of the target spread over all classes, in [0, 1); of labels that do not exclude each
            other, over presence and absence.

    Raises:
        ValueError: an option is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        ranges = {"mixup": Range(0), "cutmix": Range(0), "label_smoothing": Range(0, 1, high_open=True)}
        require_ranges(vars(self), ranges, "--model.mixing.")

    def require_task(self, name: str, task: Task) -> None:
        """Check that a task's labels can be mixed and smoothed as asked for.

        Raises:
            ValueError: they cannot; naming the option.
        """
        for option, possible in (("mixup", task.mixes), ("cutmix", task.mixes), ("label_smoothing", task.has_classes)):
            if getattr(self, option) and not possible:
                raise ValueError(f"--model.mixing.{option}: cannot be used with --model.task {name}: set it to 0")

    def mixer(self, num_classes: int) -> "PairMixing | None":
        """Return what mixes images and labels into images and smoothed targets, or None where nothing is mixed."""
        if not (self.mixup or self.cutmix):
            return None
        return PairMixing(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=num_classes)


class PairMixing(Mixup):  # type: ignore[misc]
    """Timm's mixing of the first image with the last and so on, which asserts that none is left alone."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets (B, C).

        Raises:
            ValueError: the number of images is odd.
        """
        if len(x) % 2:
            raise ValueError(f"mixup pairs images, and this batch has {len(x)}: set an even batch size")
        mixed: tuple[Tensor, Tensor] = super().__call__(x, target)
        return mixed
