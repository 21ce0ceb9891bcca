"""Gradients in float16, whose range is small: each image's score is multiplied by a power of two of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Largest gradient looked for: as far from float16's largest number as layers below may still make it grow.
_LARGEST = 2.0**8
_HIGHEST_SCALE = 2.0**60
_HIGHEST_FLOAT16_SCALE = 2.0**15
# What overflows somewhere on the way is lowered by so much, and never raised again.
_BACKOFF = 2.0**-2
_ROUNDS = 32


def in_float16(*tensors: Tensor) -> bool:
    """Tell whether float16 takes part in what the tensors are used for."""
    device = tensors[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or any(each.dtype == torch.float16 for each in tensors)


def scaled_sum(scores: Tensor, scale: Tensor) -> Tensor:
    """Return the sum of scores (B,) times scale (B,) in float32."""
    return (scores.float() * scale).sum()


def gradients(scores: Tensor, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the gradients of the images' scores, times a scale for each image, and that scale, shape (B,).

    The graph is kept.

    The scale is 1, except where float16 takes part: there it is the largest power of two that leaves room for growth.

    Args:
        scores: shape (B,).
        inputs: tensors of the graph, each with images in its first dimension.
    """
    scale = torch.ones(len(scores), device=scores.device, dtype=torch.float32)
    if not in_float16(scores, *inputs):
        found = torch.autograd.grad(scores.sum(), inputs, retain_graph=True, allow_unused=True)
        return found, scale
    highest = torch.full_like(scale, _HIGHEST_FLOAT16_SCALE if scores.dtype == torch.float16 else _HIGHEST_SCALE)
    for _ in range(_ROUNDS):
        found = torch.autograd.grad(scaled_sum(scores, scale), inputs, retain_graph=True, allow_unused=True)
        sizes = [each.flatten(1).abs().amax(dim=1).float() for each in found if each is not None]
        if not sizes:
            break
        largest = torch.stack(sizes).amax(dim=0)
        fits = largest.isfinite()
        highest = highest.where(fits, scale * _BACKOFF)
        factor = torch.exp2((_LARGEST / largest).log2().floor().clamp(max=16))
        following = torch.minimum(scale * factor.where(fits, 1), highest)
        if torch.equal(following, scale):
            break
        scale = following
    return found, scale
