"""What a network expects of its input: size, normalization, interpolation and crop, and the way back to a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from gmarpp.network.weights import PREPROCESSING, check_preprocessing


def normalization_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Give mean and standard deviation per channel from the network's `pretrained_cfg`.

    Args:
        model: network.
        images: (B, C, H, W); decides dtype and device.

    Returns:
        two tensors (C, 1, 1), of RGB values in [0, 1]; `None` where the network tells none for so many channels.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("mean") or not config.get("std"):
        return None
    mean, std = (images.new_tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) == images.shape[1] else None


def displayable(model: nn.Module, images: Tensor) -> Tensor:
    """Turn images (B, C, H, W) into pictures (B, 3, H, W), float32 in [0, 1].

    The normalisation is undone where the network tells it, else each image is stretched to [0, 1]. Of more than three
    channels the first three are shown, fewer are shown as grey.
    """
    images = images.float()
    normalisation = normalization_of(model, images)
    if normalisation is not None:
        mean, std = normalisation
        images = (images * std + mean).clamp(0, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


MAX_EDGE = 16384


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input.

    Args:
        size: height and width in pixels, up to 16384.
        mean: per channel, of RGB values in [0, 1].
        std: per channel, of RGB values in [0, 1], above 0.
        interpolation: "nearest", "bilinear" or "bicubic"; the last two with antialiasing.
        crop_pct: part of the resized image's edge that the central crop keeps, in (0, 1].
        crop_mode: "center" keeps the aspect ratio, "squash" resizes both edges and loses it, as timm defines them.

    Raises:
        ValueError: an option is out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(edge, int) and 1 <= edge <= MAX_EDGE for edge in self.size):
            raise ValueError(
                f"preprocessing: size must be two integers (height, width) from 1 to {MAX_EDGE}, got {self.size}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"preprocessing: {name} must be three numbers in [0, 1], got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"preprocessing: std must be positive, got {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"preprocessing: unknown interpolation {self.interpolation!r}: choose from {', '.join(INTERPOLATIONS)}"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"preprocessing: crop_pct must be in (0, 1], got {self.crop_pct}")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"preprocessing: unknown crop_mode {self.crop_mode!r}: choose from center, squash")

    @classmethod
    def of(cls, model: nn.Module) -> "Preprocessing":
        """Preprocessing of a timm network, from its data config.

        The size is the one the network was built with, where it accepts no other: timm's config keeps the size of the
        pretrained weights even when `img_size` was given.

        Raises:
            ValueError: the network carries no data config.
        """
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(
                f"{type(model).__name__} carries no timm data config to take the preprocessing from: "
                "give Preprocessing(size=..., mean=..., std=...) instead"
            )
        config = resolve_model_data_config(model)
        size = config["input_size"][1:]
        embedding = getattr(model, "patch_embed", None)
        if getattr(embedding, "strict_img_size", False) and getattr(embedding, "img_size", None):
            size = embedding.img_size  # type: ignore[union-attr]
        height, width = size
        return cls(
            (height, width),
            config["mean"],
            config["std"],
            config["interpolation"],
            config["crop_pct"],
            config["crop_mode"],
        )


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """From normalised images (..., 3, H, W) to RGB in [0, 1].

    >>> preprocessing = Preprocessing((1, 1), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> denormalize(torch.tensor([-2.0, 0.0, 3.0]).view(3, 1, 1), preprocessing).flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    mean, std = (value.to(images) for value in _channels(preprocessing))
    return (images * std + mean).clamp(0, 1)


def _channels(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    return torch.tensor(preprocessing.mean).view(3, 1, 1), torch.tensor(preprocessing.std).view(3, 1, 1)


def get_preprocessing(model: nn.Module) -> dict[str, Any]:
    """The `PREPROCESSING` that a network was trained with, as plain lists and values."""
    config = resolve_model_data_config(model)
    return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in PREPROCESSING}


def set_preprocessing(model: nn.Module, preprocessing: Mapping[str, Any]) -> None:
    """Records in `pretrained_cfg` the preprocessing a network is trained with, and its true input size."""
    for key, value in preprocessing.items():
        check_preprocessing(key, value)
    network: Any = model
    config = dict(network.pretrained_cfg)
    config.update({key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()})
    config["input_size"] = (3, *get_image_size(model))
    network.pretrained_cfg = network.default_cfg = config


def get_image_size(model: nn.Module) -> tuple[int, int]:
    """The (height, width) in pixels that a timm network is built for."""
    network: Any = model
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return _pair(size if size is not None else network.pretrained_cfg["input_size"][1:])


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
