"""Transforms: from a decoded image to the tensor that a network was trained on."""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from gmarpp.network.preprocessing import Preprocessing, _channels

Policy: TypeAlias = Literal["none", "randaugment", "trivialaugment"]


# RandAugment of torchvision has 31 magnitudes, from 0 to 30.
MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, in the order they are applied.

    Args:
        scale: range of the crop's area relative to the image's, in (0, 1]; the aspect ratio varies from 3/4 to 4/3.
        horizontal_flip: probability of mirroring.
        policy: "none", "randaugment" (Cubuk et al. 2020) or "trivialaugment" (Müller & Hutter 2021).
        operations: operations that RandAugment applies to an image.
        magnitude: strength of RandAugment, from 0 to 30.
        erasing: probability of random erasing (Zhong et al. 2020): a rectangle of 2 to 33 % of the area is filled
            with normally distributed values after normalization, timm's "pixel" mode.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    horizontal_flip: float = 0.5
    policy: Policy = "none"
    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augmentation: scale: expected two rising numbers in (0, 1], got {self.scale}")
        for name in ("horizontal_flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name}: expected a probability in [0, 1], got {getattr(self, name)}")
        if self.policy not in get_args(Policy):
            raise ValueError(f"augmentation: unknown policy {self.policy!r}: choose from {', '.join(get_args(Policy))}")
        if self.operations < 1:
            raise ValueError(f"augmentation: operations: expected at least 1, got {self.operations}")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(
                f"augmentation: magnitude: expected a number in [0, {MAX_MAGNITUDE}], got {self.magnitude}"
            )


class Transform(Protocol):
    """From a decoded sample to the tensors of a batch.

    Takes the image, uint8 (3, H, W); a box, float (4,), or (C, 4) of labels, xyxy in pixels with exclusive right and
    bottom edges; a mask, bool (H, W). Returns "image", and "box" and "mask" where they still apply.
    """

    def __call__(self, image: Tensor, box: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Transform one sample."""
        ...


class EvaluationTransform:
    """Resizes and crops an image as timm's evaluation does, and moves box and mask with it."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.interpolation = InterpolationMode(preprocessing.interpolation)
        self.normalize = Normalize(preprocessing)

    def __call__(self, image: Tensor, box: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """See `Transform`; a box outside the crop gets an area of zero."""
        height, width = image.shape[-2:]
        inputs = {"image": image}
        if box is not None:
            boxes = box.reshape(-1, 4)
            inputs["box"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        size, final = list(self.preprocessing.resized(height, width)), list(self.preprocessing.size)
        outputs = {
            name: F.center_crop(
                F.resize(value, size, interpolation=self.interpolation, antialias=True), final
            ).as_subclass(Tensor)
            for name, value in inputs.items()
        }
        if mask is not None:
            # A mask as such would be resized by pixels' corners, and moved by up to half a pixel.
            resized = F.resize(mask[None].to(torch.uint8), size, interpolation=InterpolationMode.NEAREST_EXACT)
            outputs["mask"] = F.center_crop(resized, final)[0].bool()
        outputs["image"] = self.normalize(outputs["image"])
        if box is not None:
            outputs["box"] = outputs["box"].reshape(box.shape)
        return outputs


class TrainingTransform:
    """Augments and normalizes an image. Boxes and masks are dropped: the augmentation policies cannot move them."""

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.crop = v2.RandomResizedCrop(
            preprocessing.size,
            scale=augmentation.scale,
            interpolation=InterpolationMode(preprocessing.interpolation),
            antialias=True,
        )
        self.flip = v2.RandomHorizontalFlip(augmentation.horizontal_flip)
        self.policy = _policy(augmentation, fill=[round(255 * value) for value in preprocessing.mean])
        self.normalize = Normalize(preprocessing)
        self.erase = v2.RandomErasing(augmentation.erasing, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3), value="random")

    def __call__(self, image: Tensor, box: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        """See `Transform`; random numbers come from torch's global generator."""
        image = self.flip(self.crop(image))
        if self.policy is not None:
            # The policies' operations are two to three times faster in Pillow than on tensors.
            image = F.pil_to_tensor(self.policy(F.to_pil_image(image)))
        return {"image": self.erase(self.normalize(image))}


class Normalize:
    """From uint8 in [0, 255] to float32, (x / 255 - mean) / std per channel, with two operations on the image."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = _channels(preprocessing)
        self.offset, self.factor = 255 * mean, 1 / (255 * std)

    def __call__(self, image: Tensor) -> Tensor:
        """Normalize (..., 3, H, W)."""
        return image.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.offset).mul_(self.factor)


def _policy(augmentation: Augmentation, fill: list[int]) -> v2.Transform | None:
    bilinear = InterpolationMode.BILINEAR
    if augmentation.policy == "randaugment":
        return v2.RandAugment(augmentation.operations, augmentation.magnitude, interpolation=bilinear, fill=fill)
    if augmentation.policy == "trivialaugment":
        return v2.TrivialAugmentWide(interpolation=bilinear, fill=fill)
    return None
