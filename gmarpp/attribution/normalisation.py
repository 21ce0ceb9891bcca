"""The normalisation of a network's input, as far as the network tells, and the way back to a picture."""

from collections.abc import Mapping

from torch import Tensor, nn


def normalisation_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor] | None:
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
    normalisation = normalisation_of(model, images)
    if normalisation is not None:
        mean, std = normalisation
        images = (images * std + mean).clamp(0, 1)
    else:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
