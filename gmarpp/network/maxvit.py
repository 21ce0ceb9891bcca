"""MaxViT: convolutions, attention in windows, and attention in windows that reach all over the grid, by turns.

The convolutions between mix neighboring tokens; relevance passes them place by place.

Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022.
"""

from typing import Any

from torch import nn

from gmarpp.network.transport import Grid, Step, cells, partitioned


def partitions(stage: Any) -> list[nn.Module]:
    """Return the modules of a stage of timm that attend, each with a residual connection and an MLP."""
    found = (each for block in stage.blocks for each in (block.attn_block, block.attn_grid))
    return [each for each in found if each is not None]


def timm_step(partition: Any, grid: Grid) -> Step:
    """Describe the windows of a partition of timm: of neighbors, or of places as far apart as there are windows."""
    size = partition.partition_size
    if partition.partition_block:
        return Step(grid, partitioned(cells(grid), size)[..., 0])
    # Each window has one place of each of these.
    apart = [side // count for side, count in zip(grid, size, strict=True)]
    return Step(grid, partitioned(cells(grid), apart)[..., 0].T)
