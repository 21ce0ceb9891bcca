"""Maps of methods that make them themselves, checked and brought to the network's patch grid."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.attribution.method import MapMethod
from gmarpp.attribution.target import Contrast, Target
from gmarpp.network.architecture import Architecture
from gmarpp.network.extent import fit_to_extent, grid_extent


def require_classes(methods: Sequence[MapMethod], target: Target) -> None:
    """Raise `ValueError` for a target that methods which make their maps themselves cannot know: they take classes."""
    if methods and (callable(target) or isinstance(target, Contrast)):
        kind = "a function" if callable(target) else "a Contrast"
        names = ", ".join(method.name for method in methods)
        raise ValueError(f"{names}: expected classes as target, got {kind}: leave out the methods that make own maps")


def own_maps(
    methods: Sequence[MapMethod], model: nn.Module, images: Tensor, indices: Tensor, layout: Architecture
) -> dict[str, Tensor]:
    """Return the maps by method, float32, (B, h, w) or (B, K, h, w).

    Args:
        methods: each is called once for every column of classes.
        model: the network, in eval mode.
        images: (B, 3, H, W).
        indices: classes, (B,) or (B, K).
        layout: of the network.

    Raises:
        ValueError: naming the method whose maps have a wrong shape or are not finite.
    """
    columns = (indices[:, None] if indices.dim() == 1 else indices).unbind(dim=1)
    maps: dict[str, Tensor] = {}
    for method in methods:
        with _restoring(model):
            made = [method.maps(model, images.clone().requires_grad_(), column.clone()) for column in columns]
        stacked = torch.stack([_on_grid(each, images, layout, method.name) for each in made], dim=1)
        maps[method.name] = stacked.view(*indices.shape, *stacked.shape[2:])
    return maps


@contextmanager
def _restoring(model: nn.Module) -> Iterator[None]:
    """Give the network its modes and its parameters' gradients back, which other libraries change and clear."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
        for parameter, is_trained, gradient in kept:
            parameter.requires_grad_(is_trained)
            parameter.grad = gradient


def _on_grid(maps: Tensor, images: Tensor, layout: Architecture, name: str) -> Tensor:
    """Check maps, average those of pixels over patches, and return them as float32 (B, h, w), or (B, t, h, w)."""
    batch, *size = len(images), *layout.pictures_of(images).shape[2:]
    grid = layout.grid(*size)
    # What is not given to the network as images has no pixels.
    of_pixels = (batch, *size) if layout.pictures is None else (batch, *grid)
    expected = f"{name}: expected maps of shape {(batch, *grid)}, or {of_pixels} of pixels, got"
    if not isinstance(maps, Tensor):
        raise ValueError(f"{expected} {type(maps).__name__}: return a tensor")
    if maps.is_complex():
        raise ValueError(f"{expected} {maps.dtype}: return real numbers")
    values = maps.detach().to(images.device, torch.float32)
    if values.dim() == len(of_pixels) + 1:
        values = values.mean(dim=1)
    if values.shape not in ((batch, *grid), of_pixels):
        raise ValueError(f"{expected} {tuple(maps.shape)}")
    unusable = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if unusable:
        raise ValueError(f"{name}: expected finite maps, got NaN or infinite values for images {unusable}")
    if values.shape[1:] == grid:
        return values
    extent = grid_extent(layout, *size)
    # Padding beyond the image, where patches do not divide it, does not count.
    pooled, pixels = (
        F.adaptive_avg_pool2d(fit_to_extent(each, extent), (grid[-2], grid[-1]))
        for each in (values, torch.ones_like(values))
    )
    return pooled / pixels
