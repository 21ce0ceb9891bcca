"""Faithfulness metrics of torchcam, quantus and grad-cam for existing maps, as `speed.py` times them."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.perturbation import gaussian_blur

try:
    import quantus
    import torchcam.metrics
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:
    raise SystemExit(f"{error}. Install the other libraries: pip install -e '.[bench]'") from error


class _GivenMaps:
    """Existing maps, in the form of the extractors that torchcam's metrics call."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model = model
        self.maps = maps

    def __call__(self, *_: object, **__: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@torch.no_grad()
def torchcam_curves(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int) -> dict[str, float]:
    """Compute areas under the insertion and deletion curves of maps (B, h, w) over gmarpp's blur, by torchcam."""
    metric = torchcam.metrics.DeletionInsertionMetric(
        _GivenMaps(model, maps), partial(torch.softmax, dim=-1), steps=steps, baseline=gaussian_blur
    )
    metric.update(images, target.tolist())
    return metric.summary()


@torch.no_grad()
def torchcam_drop_and_increase(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor) -> dict[str, float]:
    """Compute Average Drop and Increase of maps (B, h, w), multiplied by the images, by torchcam."""
    metric = torchcam.metrics.ClassificationMetric(_GivenMaps(model, maps), partial(torch.softmax, dim=-1))
    metric.update(images, target.tolist())
    return metric.summary()


class _Float32Logits(nn.Module):
    """A network with float32 outputs under autocast, for libraries that read them with numpy, which has no bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).float()


def _pixel_maps(maps: Tensor, images: Tensor) -> Tensor:
    """Scale maps (B, h, w) to [0, 1], and enlarge them to the images' pixels."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    maps = maps / maps.amax((1, 2), keepdim=True)
    return F.interpolate(maps[:, None], images.shape[2:], mode="nearest")[:, 0]


def quantus_deletion(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int) -> Any:
    """Compute the deletion curve of maps (B, h, w) by quantus' pixel flipping.

    The number of values changed at a time must divide the number of pixels, so the curve has the nearest possible
    number of steps to the requested one.
    """
    channels, pixels = images.shape[1], images[0, 0].numel()
    divisors = [number for number in range(1, pixels + 1) if pixels % number == 0]
    values = min(divisors, key=lambda number: abs(math.log(channels * pixels / number / steps)))
    metric = quantus.PixelFlipping(features_in_step=values, disable_warnings=True)
    heat = _pixel_maps(maps, images)[:, None].expand_as(images)
    arrays = (each.cpu().numpy() for each in (images, target, heat))
    return metric(_Float32Logits(model).eval(), *arrays, device=str(images.device))


def grad_cam_road(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, fractions: Sequence[float]) -> Any:
    """Compute ROAD of maps (B, h, w) by grad-cam, in both orders, for the shares of the image that are removed."""
    metric = ROADCombined(percentiles=[100 * (1 - fraction) for fraction in fractions])
    classes = [ClassifierOutputTarget(label) for label in target.tolist()]
    return metric(images, _pixel_maps(maps, images).cpu().numpy(), classes, _Float32Logits(model))
