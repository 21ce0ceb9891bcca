"""Uniform numbers that depend on a seed and an image's content alone, computed where the image is.

Integers of 64 bits wrap around alike on every device, and their sum is the same in any order.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def noise(images: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` numbers in [0, 1) per image, float32, (B, count).

    They are those of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), which starts
    from a sum of the image's values, each times an odd number of its own.
    """
    values = images.detach().float().flatten(1).contiguous().view(torch.int32)
    factors = 2 * _mixed(torch.arange(values.shape[1], device=images.device)) + 1
    start = _mixed((values.long() * factors).sum(dim=1) + seed)
    steps = torch.arange(1, count + 1, device=images.device) * _GOLDEN
    # The 24 highest bits are as many as a float32 has.
    return _shifted(_mixed(start[:, None] + steps), 40).float() / 2**24


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right, filling with zeros, where PyTorch would repeat the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
