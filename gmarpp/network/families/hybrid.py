"""Networks of convolutions and attention by turns: MaxViT, TinyViT, CAFormer and FastViT.

Convolutions mix neighboring tokens; relevance passes those between two layers of attention place by place.

Sources: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022; Wu et al., "TinyViT: Fast Pretraining
Distillation for Small Vision Transformers", ECCV 2022; Yu et al., "MetaFormer Baselines for Vision", PAMI 2024;
Vasu et al., "FastViT: A Fast Hybrid Vision Transformer Using Structural Reparameterization", ICCV 2023.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.network.pooling import Grid
from gmarpp.network.transport import Step, cells, padded, partitioned


def maxvit_partitions(stage: Any) -> list[nn.Module]:
    """Return the modules of a stage of MaxViT that attend, each with a residual connection and an MLP."""
    found = (each for block in stage.blocks for each in (block.attn_block, block.attn_grid))
    return [each for each in found if each is not None]


def maxvit_step(partition: Any, grid: Grid) -> Step:
    """Describe the windows of a partition of MaxViT: of neighbors, or of places as far apart as there are windows."""
    size = partition.partition_size
    if partition.partition_block:
        return Step(grid, partitioned(cells(grid), size)[..., 0])
    # Each window has one place of each of these.
    apart = [side // count for side, count in zip(grid, size, strict=True)]
    return Step(grid, partitioned(cells(grid), apart)[..., 0].T)


def torchvision_maxvit_step(partition: Any, grid: Grid) -> Step:
    """Describe the windows of a partition of torchvision's MaxViT."""
    parts = partitioned(cells(grid), [partition.p] * 2)[..., 0]
    return Step(grid, parts.T if partition.partition_type == "grid" else parts)


def torchvision_maxvit_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of torchvision's MaxViT by fused attention."""

    def forward(windows: Tensor) -> Tensor:
        projected = torch.unflatten(attention.to_qkv(windows), -1, (3, attention.n_heads, -1))
        query, key, value = projected.flatten(0, 1).permute(2, 0, 3, 1, 4)
        bias = attention.get_relative_positional_bias()
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale_factor)
        left: Tensor = attention.merge(attended.transpose(1, 2).reshape(windows.shape))
        return left

    return forward


def tiny_vit_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of TinyViT."""
    return padded_step(grid, [block.window_size] * 2)


def window_step(block: Any, grid: Grid) -> Step:
    """Describe windows of neighbors, which divide the grid."""
    return Step(grid, partitioned(cells(grid), block.window_size)[..., 0])


def padded_step(grid: Grid, window: Sequence[int]) -> Step:
    """Describe windows of neighbors, padded at the bottom and on the right."""
    return Step(grid, partitioned(padded(cells(grid), window, value=grid[0] * grid[1]), window)[..., 0])


def whole_step(block: nn.Module, grid: Grid) -> Step:
    """Describe a block that attends over all tokens of its grid."""
    return Step(grid, torch.arange(grid[0] * grid[1])[None])
