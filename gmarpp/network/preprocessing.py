"""What a network expects of its input: size, normalization, interpolation and crop, and the way back to a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from gmarpp.network.expected import PREPROCESSING, check_preprocessing, expect_pair

# Those of timm's that `EvaluationTransform` has.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
CROP_MODES = ("center", "squash")


def _data_config(model: nn.Module) -> dict[str, Any] | None:
    """Return what a network expects of its input, in timm's words; `None` where it does not say.

    Everything that is known of a network's normalization comes from here.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("mean") or not config.get("std"):
        return None
    resolved: dict[str, Any] = resolve_model_data_config(model)
    return resolved


def normalization_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation per channel of a network's input.

    Args:
        model: network.
        images: (B, C, H, W); decides dtype and device.

    Returns:
        two tensors (C, 1, 1), of RGB values in [0, 1]; `None` where the network tells none for so many channels.
    """
    config = _data_config(model)
    if config is None:
        return None
    mean, std = (images.new_tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (mean, std) if len(mean) == len(std) == images.shape[1] else None


def displayable(model: nn.Module, images: Tensor, normalization: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return images (B, C, H, W) as pictures (B, 3, H, W), and videos (B, C, T, H, W) as (B, T, 3, H, W).

    They are float32 in [0, 1]. The normalization is undone where it is given or the network tells it, else each image
    or video is stretched. Of more than three channels the first three are shown, fewer are shown as gray.
    """
    if images.dim() == 5:
        in_one = displayable(model, images.flatten(2, 3), normalization)
        return torch.unflatten(in_one, 2, images.shape[2:4]).movedim(2, 1)
    images = images.float()
    normalization = normalization or normalization_of(model, images)
    if normalization is not None:
        mean, std = normalization
        images = (images * std + mean).clamp(0, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input.

    Args:
        size: height and width in pixels, up to 16,384.
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
        try:
            if not isinstance(self.size, (list, tuple)):
                raise ValueError(f"size: expected (height, width), got {self.size!r}")
            expect_pair("size", self.size)
            for key in PREPROCESSING:
                check_preprocessing(key, getattr(self, key))
            for key in ("mean", "std"):
                if not all(0 <= value <= 1 for value in getattr(self, key)):
                    raise ValueError(f"{key}: expected three numbers in [0, 1], got {getattr(self, key)}")
            for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
                if getattr(self, key) not in known:
                    raise ValueError(f"unknown {key} {getattr(self, key)!r}: choose from {', '.join(known)}")
        except ValueError as error:
            raise ValueError(f"preprocessing: {error}") from error

    @classmethod
    def of(cls, model: nn.Module) -> "Preprocessing":
        """Return the preprocessing of a timm network, from its data config.

        The size is the one the network was built with, where it accepts no other: timm's config keeps the size of the
        pretrained weights even when `img_size` was given.

        Raises:
            ValueError: the network carries no data config.
        """
        config = _data_config(model)
        if config is None:
            raise ValueError(
                f"{type(model).__name__} carries no timm data config to take the preprocessing from: "
                "give Preprocessing(size=..., mean=..., std=...) instead"
            )
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

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image of this height and width before the central crop, rounded as timm does."""
        goal_height, goal_width = (math.floor(edge / self.crop_pct) for edge in self.size)
        if self.crop_mode == "squash":
            return goal_height, goal_width
        if goal_height == goal_width:
            if height <= width:
                return goal_height, int(goal_height * width / height)
            return int(goal_height * height / width), goal_height
        ratio = min(height / goal_height, width / goal_width)
        return round(height / ratio), round(width / ratio)

    def region(
        self, height: int, width: int, extent: tuple[int, int] | None = None
    ) -> tuple[float, float, float, float]:
        """Return the part of a picture that the network's input shows: edges x0, y0, x1, y1 in the picture's pixels.

        Args:
            height: of the picture.
            width: of the picture.
            extent: height and width of the part of the input, from its top left corner, that the network's patches
                cover; all of it by default.

        Examples:
            >>> Preprocessing((100, 100), (0, 0, 0), (1, 1, 1), crop_pct=0.5).region(400, 800)
            (300.0, 100.0, 500.0, 300.0)
        """
        resized = self.resized(height, width)
        edges = []
        for size, side, seen, before in zip(self.size, resized, extent or self.size, (height, width), strict=True):
            start = round((side - size) / 2)  # as torchvision's central crop
            edges.append((start * before / side, (start + seen) * before / side))
        (y0, y1), (x0, x1) = edges
        return x0, y0, x1, y1


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return normalized images (..., 3, H, W) as RGB in [0, 1].

    >>> preprocessing = Preprocessing((1, 1), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> denormalize(torch.tensor([-2.0, 0.0, 3.0]).view(3, 1, 1), preprocessing).flatten().tolist()
    [0.0, 0.5, 1.0]
    """
    mean, std = (value.to(images) for value in _channels(preprocessing))
    return (images * std + mean).clamp(0, 1)


def _channels(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    return torch.tensor(preprocessing.mean).view(3, 1, 1), torch.tensor(preprocessing.std).view(3, 1, 1)


def get_preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return the `PREPROCESSING` that a network was trained with, as plain lists and values.

    Raises:
        ValueError: the network carries no data config.
    """
    config = _data_config(model)
    if config is None:
        raise ValueError(f"{type(model).__name__} carries no timm data config to take the preprocessing from")
    return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in PREPROCESSING}


def set_preprocessing(model: nn.Module, preprocessing: Mapping[str, Any]) -> None:
    """Record in `pretrained_cfg` the preprocessing a network is trained with, and its true input size."""
    for key, value in preprocessing.items():
        check_preprocessing(key, value)
    network: Any = model
    config = dict(network.pretrained_cfg)
    config.update({key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()})
    config["input_size"] = (3, *get_image_size(model))
    network.pretrained_cfg = network.default_cfg = config


def tells_preprocessing(model: nn.Module) -> bool:
    """Return whether a network tells how images have to be prepared for it."""
    return _data_config(model) is not None


def give_preprocessing(model: nn.Module, preprocessing: Preprocessing) -> None:
    """Have a network of any kind tell how its images are prepared, in timm's words."""
    network: Any = model
    network.pretrained_cfg = {
        **(getattr(model, "pretrained_cfg", None) or {}),
        **{key: getattr(preprocessing, key) for key in PREPROCESSING},
        "input_size": (3, *preprocessing.size),
    }


def get_image_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) in pixels that a timm network is built for."""
    network: Any = model
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return _pair(size if size is not None else network.pretrained_cfg["input_size"][1:])


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
