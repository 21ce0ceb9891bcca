"""Swin Transformers: attention in windows, shifted in every second block, and tokens merged four by four in between.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.network.transport import Grid, Step, cells, padded, partitioned, put_together, shifted


def merged_grids(finest: Grid, stages: Sequence[Sequence[nn.Module]]) -> list[tuple[nn.Module, Grid]]:
    """Return all blocks with the grid of each; four tokens are merged from stage to stage."""
    grids = [finest]
    for _ in stages[1:]:
        height, width = grids[-1]
        grids.append(((height + 1) // 2, (width + 1) // 2))
    return [(block, grid) for stage, grid in zip(stages, grids, strict=True) for block in stage]


def timm_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of timm, which shifts its tokens before it pads them."""
    tokens = padded(shifted(cells(grid), block.shift_size), block.window_size, value=grid[0] * grid[1])
    return Step(grid, partitioned(tokens, block.window_size)[..., 0])


def timm_attention(attention: Any) -> Callable[..., Tensor]:
    """Return the forward of an attention module of timm with its fused attention, which is off by default."""

    def forward(windows: Tensor, mask: Tensor | None = None) -> Tensor:
        fused = copy.copy(attention)
        fused.fused_attn = True
        attended: Tensor = type(attention).forward(fused, windows, mask)
        return attended

    return forward


def torchvision_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of torchvision, which pads its tokens before it shifts them."""
    window = block.attn.window_size
    tokens = padded(cells(grid), window, value=grid[0] * grid[1])
    return Step(grid, partitioned(shifted(tokens, _shift(block.attn, tokens.shape[1:3])), window)[..., 0])


def torchvision_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of torchvision, version 1 or 2, by fused attention."""

    def forward(tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        whole, window = padded(tokens, attention.window_size), attention.window_size
        grid = whole.shape[1:3]
        shift = _shift(attention, grid)
        windows = partitioned(shifted(whole, shift), window)
        query, key, value, scale = _projected(attention, windows)
        mask = attention.get_relative_position_bias()
        if any(shift):
            apart = _apart(grid, window, shift, windows)
            mask = (mask + apart).repeat(len(windows) // len(apart), 1, 1, 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        windows = attention.proj(attended.transpose(1, 2).flatten(2))
        left = shifted(put_together(windows, window, grid), [-each for each in shift])
        return left[:, :height, :width].contiguous()

    return forward


def _shift(attention: Any, grid: Sequence[int]) -> list[int]:
    """Return by how much windows are shifted: not along a side that one window covers."""
    sides = zip(attention.shift_size, attention.window_size, grid, strict=True)
    return [0 if window >= side else shift for shift, window, side in sides]


def _projected(attention: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Return queries, keys and values, (B * W, H, n, d), and the factor of their products."""
    bias, logit_scale = attention.qkv.bias, getattr(attention, "logit_scale", None)
    if logit_scale is not None and bias is not None:
        # Version 2 has no bias of keys.
        of_query, of_key, of_value = bias.chunk(3)
        bias = torch.cat([of_query, torch.zeros_like(of_key), of_value])
    projected = F.linear(windows, attention.qkv.weight, bias)
    query, key, value = torch.unflatten(projected, 2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        return query, key, value, None
    # Cosines, whose factor is at most 100.
    query = F.normalize(query, dim=-1) * logit_scale.clamp(max=math.log(100)).exp()
    return query, F.normalize(key, dim=-1), value, 1.0


def _apart(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """Return the mask, (W, 1, n, n), of tokens that only the circular shift brings into one window."""
    down, right = (_regions(*each) for each in zip(grid, window, shift, strict=True))
    regions = partitioned((3 * down[:, None] + right)[None, ..., None], window)
    mask = torch.where(regions == regions.mT, 0.0, -100.0)
    return mask[:, None].to(like)


def _regions(side: int, window: int, shift: int) -> Tensor:
    """Return numbers of the parts of a shifted side that other windows cover, or that were at its other end."""
    places = torch.arange(side)
    return (places >= side - window).long() + (places >= side - shift)
