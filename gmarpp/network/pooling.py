"""Tokens that are each made of several others: of keys for attention, or of the next coarser grid.

A token takes what it is made of in equal shares, whether the network averages, convolves, or keeps the largest: the
rows of its matrix U sum to 1, and relevance is handed down by `r_fine = Uᵀ r_coarse`, so that its sum is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width in cells."""


@dataclass(frozen=True)
class Pooling:
    """The matrix U, (N_coarse, N_fine), of tokens that each cover a rectangle of cells of a finer grid.

    As the rectangles have sides of their own, it is the Kronecker product of two small matrices.

    Attributes:
        down: shares along the height, (h_coarse, h_fine); rows sum to 1.
        right: along the width, (w_coarse, w_fine).
    """

    down: Tensor
    right: Tensor

    @staticmethod
    def cells(fine: Grid, coarse: Grid) -> "Pooling":
        """Pool cells without overlap, at the lower and right edges perhaps fewer than elsewhere.

        Raises:
            ValueError: if the coarse grid does not cover the fine one in this way.
        """
        strides = [-(-many // few) for many, few in zip(fine, coarse, strict=True)]
        if any(-(-many // stride) != few for many, few, stride in zip(fine, coarse, strides, strict=True)):
            raise ValueError(f"expected a grid that tokens of a {fine} grid can be merged into, got {coarse}")
        sides = zip(fine, coarse, strides, strict=True)
        return Pooling(*(_rectangles(many, few, stride, stride) for many, few, stride in sides))

    @staticmethod
    def convolved(fine: Grid, by: Any) -> "Pooling":
        """Pool as a convolution, or another module with kernel, stride and padding, does; padding takes no share."""
        sides = zip(fine, convolved(fine, by), *map(_pair, (by.kernel_size, by.stride, by.padding)), strict=True)
        return Pooling(*(_rectangles(*side) for side in sides))

    @staticmethod
    def subsampled(fine: Grid, stride: int) -> "Pooling":
        """Take one cell of each stride, the first."""
        return Pooling(*(_rectangles(side, -(-side // stride), 1, stride) for side in fine))

    @staticmethod
    def adaptive(fine: Grid, coarse: Grid) -> "Pooling":
        """Pool as `nn.AdaptiveAvgPool2d` does."""
        return Pooling(*(_adaptive(many, few) for many, few in zip(fine, coarse, strict=True)))

    @staticmethod
    def runs(fine: Grid, length: int) -> "Pooling":
        """Pool so many tokens after each other, as `nn.AvgPool1d` does with a grid's rows laid end to end."""
        tokens = fine[0] * fine[1]
        return Pooling(torch.ones(1, 1), _rectangles(tokens, tokens // length, length, length))

    @property
    def coarse(self) -> Grid:
        """The coarser grid."""
        return len(self.down), len(self.right)

    @property
    def tokens(self) -> int:
        """N_coarse."""
        return len(self.down) * len(self.right)

    def to(self, device: torch.device) -> "Pooling":
        """Return the same on a device."""
        return Pooling(self.down.to(device), self.right.to(device))

    def spread(self, rows: Tensor) -> Tensor:
        """Multiply rows, (..., N_coarse), by U: share them out among the tokens they stand for, (..., N_fine)."""
        return (self.down.mT @ torch.unflatten(rows, -1, self.coarse) @ self.right).flatten(-2)

    def added(self, rows: Tensor) -> Tensor:
        """Add up entries, (..., N_fine), by the one token that each is part of, (..., N_coarse)."""
        fine = self.down.shape[1], self.right.shape[1]
        down, right = ((each > 0).to(rows.dtype) for each in (self.down, self.right))
        return (down @ torch.unflatten(rows, -1, fine) @ right.mT).flatten(-2)


def convolved(fine: Sequence[int], by: Any) -> Grid:
    """Return the grid of a convolution's output, or of another module's with kernel, stride and padding."""
    sides = zip(fine, *map(_pair, (by.kernel_size, by.stride, by.padding)), strict=True)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    return height, width


def _pair(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


def _rectangles(side: int, count: int, length: int, stride: int, padding: int = 0) -> Tensor:
    starts = torch.arange(count) * stride - padding
    return _shares(side, starts, starts + length)


def _adaptive(side: int, count: int) -> Tensor:
    edges = torch.arange(count + 1) * side
    return _shares(side, edges[:-1] // count, -(-edges[1:] // count))


def _shares(side: int, starts: Tensor, stops: Tensor) -> Tensor:
    """Return equal shares of the cells from starts to stops, (count, side)."""
    cells = torch.arange(side)
    inside = ((cells >= starts[:, None]) & (cells < stops[:, None])).float()
    return inside / inside.sum(dim=1, keepdim=True)
