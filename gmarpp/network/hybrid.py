"""Networks of convolutions and attention by turns: MaxViT, TinyViT and CAFormer, as timm has them.

Convolutions mix neighboring tokens; relevance passes those between two layers of attention place by place.

Sources: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022; Wu et al., "TinyViT: Fast Pretraining
Distillation for Small Vision Transformers", ECCV 2022; Yu et al., "MetaFormer Baselines for Vision", PAMI 2024.
"""

from typing import Any

import torch
from torch import nn

from gmarpp.network.transport import Grid, Step, cells, padded, partitioned


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


def tiny_vit_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of TinyViT."""
    window = [block.window_size] * 2
    return Step(grid, partitioned(padded(cells(grid), window, value=grid[0] * grid[1]), window)[..., 0])


def whole_step(block: nn.Module, grid: Grid) -> Step:
    """Describe a block that attends over all tokens of its grid."""
    return Step(grid, torch.arange(grid[0] * grid[1])[None])
