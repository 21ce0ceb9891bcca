"""Noisy linear imputation: removed pixels filled from their surroundings, so that a mask's shape reveals nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLERANCE = 1e-3
_MAX_ITERATIONS = 100
_DAMPING = 0.8
_COARSEST = 4


def _neighbors(values: Tensor) -> Tensor:
    """Return the weighted sum of the eight neighbors: 1/6 for direct, 1/12 for diagonal, 0 outside the picture."""
    padded = F.pad(values, (1, 1, 1, 1))
    rows = torch.add(padded[..., :-2, :], padded[..., 1:-1, :], alpha=2).add_(padded[..., 2:, :])
    return torch.add(rows[..., :-2], rows[..., 1:-1], alpha=2).add_(rows[..., 2:]).sub_(values, alpha=4).div_(12)


def _precondition(residual: Tensor, unknown: list[Tensor], diagonal: list[Tensor]) -> Tensor:
    """Run one symmetric multigrid V-cycle with damped Jacobi smoothing; each level halves the grid."""
    inside, scale = unknown[0], _DAMPING * unknown[0] / diagonal[0]
    guess = scale * residual
    if len(unknown) > 1:
        rest = inside * (residual - diagonal[0] * guess + _neighbors(guess))
        summed = F.avg_pool2d(rest, 2, ceil_mode=True, divisor_override=1)
        coarse = _precondition(summed * unknown[1], unknown[1:], diagonal[1:])
        height, width = guess.shape[2:]
        guess = guess + inside * F.interpolate(coarse, scale_factor=2.0)[..., :height, :width]
    return guess + scale * (residual - diagonal[0] * guess + _neighbors(guess))


def _fill(images: Tensor, known: Tensor) -> Tensor:
    """Solve for the unknown pixels by preconditioned conjugate gradients, each image and channel on its own."""
    unknown = [1 - known]
    while min(unknown[-1].shape[2:]) > _COARSEST:
        unknown.append(1 - F.max_pool2d(1 - unknown[-1], 2, ceil_mode=True))
    diagonal = [_neighbors(torch.ones_like(level[:1])) for level in unknown]

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum((2, 3), keepdim=True)

    tiny = torch.finfo(images.dtype).tiny
    mean = dot(images, known) / known.sum((2, 3), keepdim=True)
    filled = torch.lerp(mean.expand_as(images), images, known)
    residual = unknown[0] * (_neighbors(filled) - diagonal[0] * filled)
    direction = step = _precondition(residual, unknown, diagonal)
    energy = dot(residual, step)
    for _ in range(_MAX_ITERATIONS):
        if residual.abs().amax() < _TOLERANCE:
            break
        product = unknown[0] * (diagonal[0] * direction - _neighbors(direction))
        length = energy / dot(direction, product).clamp_min(tiny)
        filled = filled + length * direction
        residual = residual - length * product
        step = _precondition(residual, unknown, diagonal)
        previous, energy = energy, dot(residual, step)
        direction = step + energy / previous.clamp_min(tiny) * direction
    return filled


def noisy_linear_imputation(images: Tensor, known: Tensor, noise: float | Tensor = 0.01) -> Tensor:
    """Fill unknown pixels with the weighted mean of their eight neighbors, plus noise (Rong et al. 2022).

    Direct neighbors weigh 1/6, diagonal ones 1/12, and those outside the picture 0. The sparse linear system
    over all unknown pixels is solved for the whole batch by multigrid-preconditioned conjugate gradients, until no
    pixel is farther than 0.001 from its neighbors' mean (in units of the images).

    Args:
        images: (n, C, H, W).
        known: (n, H, W) bool; at least one known pixel per image.
        noise: standard deviation of Gaussian noise on the unknown pixels, or the noise itself, broadcast to images.

    Raises:
        ValueError: an image without a known pixel.
    """
    if not known.flatten(1).any(1).all():
        raise ValueError("known: expected at least one known pixel in every image, got none in some")
    with torch.autocast(images.device.type, enabled=False):
        values, weights = images.float(), known[:, None].float()
        field = noise if isinstance(noise, Tensor) else noise * torch.randn_like(values)
        filled = torch.where(known[:, None], values, _fill(values, weights) + field)
    return filled.to(images.dtype)
