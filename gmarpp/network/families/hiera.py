"""Hiera and the image encoders of SAM 2: attention in windows, and queries pooled by a maximum between the stages.

Hiera lays its tokens out so that a window's are equally far apart in the sequence, and pooled ones are halves of it.

Sources: Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML 2023; Ravi et
al., "SAM 2: Segment Anything in Images and Videos", 2024.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor

from gmarpp.network.families.block_by_block import along, by_convolution
from gmarpp.network.families.stages import Stages
from gmarpp.network.pooling import Grid
from gmarpp.network.transport import QueryPool, Step, cells, footprints, padded, partitioned


def _timm_step(block: Any, grid: Grid, stride: Sequence[int]) -> Step:
    """Describe the windows of a block of timm's Hiera, and how it pools its queries."""

    def residual(tokens: Tensor) -> Tensor:
        projected: Tensor = tokens if block.proj is None else block.proj(block.norm1(tokens))
        return projected

    attention = block.attn
    return _step(attention, grid, stride, attention.q_stride, residual, has_mean=block.proj is None)


def _hugging_face_step(block: Any, grid: Grid, stride: Sequence[int]) -> Step:
    """Describe the windows of a block of transformers' Hiera, and how it pools its queries."""

    def residual(tokens: Tensor) -> Tensor:
        projected: Tensor = block.proj(block.layernorm_before(tokens))
        return projected

    return _step(block.attn, grid, stride, block.attn.query_stride, residual)


def _step(
    attention: Any,
    grid: Grid,
    stride: Sequence[int],
    pooled: int,
    residual: Callable[[Tensor], Tensor],
    has_mean: bool = False,
) -> Step:
    """Describe a block whose windows and pools lie evenly in the sequence; `pooled` tokens become one."""
    tokens = torch.arange(grid[0] * grid[1])
    places = attention.window_size if attention.use_mask_unit_attn else len(tokens) // pooled
    windows = tokens.view(pooled * places, -1).T
    if pooled == 1:
        return Step(grid, windows)
    coarse = grid[0] // stride[0], grid[1] // stride[1]
    queries = Step(coarse, torch.arange(len(tokens) // pooled).view(places, -1).T)
    return Step(grid, windows, pool=QueryPool(queries, tokens.view(pooled, -1).T, residual, has_mean))


def _places_in_sequence(grid: Grid, strides: Sequence[Sequence[int]]) -> Tensor:
    """Return the place in the sequence of each cell of a grid, (N,), whose tokens are laid out stride by stride.

    Raises:
        ValueError: if the strides do not divide the grid.
    """
    unit = [math.prod(lengths) for lengths in zip(*strides, strict=True)]
    if any(side % length for side, length in zip(grid, unit, strict=True)):
        raise ValueError(
            f"expected a grid that windows of {unit[0]} x {unit[1]} divide, got {grid[0]} x {grid[1]}: give images of "
            "another size"
        )
    order = torch.arange(grid[0] * grid[1]).view(1, *grid)
    for down, right in strides:
        height, width = order.shape[1:]
        parts = order.view(-1, height // down, down, width // right, right)
        order = parts.permute(0, 2, 4, 1, 3).flatten(0, 2)
    return order.flatten().argsort()


def _windowed_attention(attention: Any, heads: int, pooled: int) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of Hiera by fused attention, each window as an image."""

    def forward(tokens: Tensor) -> Tensor:
        places = pooled * attention.window_size if attention.use_mask_unit_attn else tokens.shape[1]
        projected = torch.unflatten(torch.unflatten(attention.qkv(tokens), 2, (3, heads, -1)), 1, (places, -1))
        query, key, value = projected.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each (B * W, H, n, d)
        query = query if pooled == 1 else torch.unflatten(query, 2, (pooled, -1)).amax(dim=2)
        attended = F.scaled_dot_product_attention(query, key, value)
        by_window = torch.unflatten(attended, 0, (len(tokens), -1))  # (B, W, H, q, d)
        left: Tensor = attention.proj(by_window.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))
        return left

    return forward


def _hugging_face_attention(attention: Any) -> Callable[..., tuple[Tensor, None]]:
    """Return the same for an attention module of transformers, which returns its weights beside the tokens."""
    attend = _windowed_attention(attention, attention.num_heads, attention.query_stride)
    return lambda tokens, output_attentions=False: (attend(tokens), None)


def _timm_sam2_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of timm's image encoder of SAM 2, and how it pools its queries."""
    window = block.window_size if block.is_windowed else grid
    return _pooled_windows(grid, window, block.q_stride, lambda tokens: block.proj(block.norm1(tokens)))


def _hugging_face_sam2_step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block of transformers' image encoder of SAM 2, and how it pools its queries."""
    window = [block.window_size] * 2 if block.window_size else grid
    return _pooled_windows(grid, window, block.query_stride, lambda tokens: block.proj(block.layer_norm1(tokens)))


def _pooled_windows(
    grid: Grid, window: Sequence[int], stride: Sequence[int] | None, residual: Callable[[Tensor], Tensor]
) -> Step:
    """Describe windows, with padding, whose queries are pooled with a stride, if there is one."""
    windows = _windows(grid, window)
    if stride is None:
        return Step(grid, windows)
    coarse = grid[0] // stride[0], grid[1] // stride[1]
    queries = Step(coarse, _windows(coarse, [side // each for side, each in zip(window, stride, strict=True)]))
    return Step(grid, windows, pool=QueryPool(queries, footprints(grid, stride, stride), residual))


def _windows(grid: Grid, window: Sequence[int]) -> Tensor:
    return partitioned(padded(cells(grid), window, value=grid[0] * grid[1]), window)[..., 0]


def _timm_hiera(model: Any) -> Stages:
    attentions = [block.attn for block in model.blocks if block.attn.use_mask_unit_attn]
    fused = {each: _windowed_attention(each, each.heads, each.q_stride) for each in attentions}
    step = partial(_timm_step, stride=model.q_stride)
    return _unrolled(along(by_convolution(model.patch_embed.proj), model.blocks, step, fused), model.unroll.schedule)


def _hugging_face_hiera(model: Any) -> Stages:
    blocks = [block for stage in model.encoder.stages for block in stage.layers]
    fused = {block.attn: _hugging_face_attention(block.attn) for block in blocks}
    step = partial(_hugging_face_step, stride=model.config.query_stride)
    grid = by_convolution(model.embeddings.patch_embeddings.projection)
    return _unrolled(along(grid, blocks, step, fused), model.unroll_schedule)


def _unrolled(found: Stages, strides: Sequence[Sequence[int]]) -> Stages:
    """Describe a network whose tokens are the cells of the finest grid stride by stride."""

    def transport(*size: int) -> list[Step]:
        cells = _places_in_sequence(found.grid(*size), strides)
        first, *others = found.transport(*size)
        return [replace(first, cells=cells), *others]

    return replace(found, transport=transport)


def _timm_sam2(model: Any) -> Stages:
    return along(by_convolution(model.patch_embed.proj), model.blocks, _timm_sam2_step)


def _hugging_face_sam2(model: Any) -> Stages:
    return along(by_convolution(model.patch_embed.projection), model.blocks, _hugging_face_sam2_step)


FAMILIES = (
    (lambda model: isinstance(model, Hiera), _timm_hiera),
    (lambda model: type(model).__name__ == "HieraModel", _hugging_face_hiera),
    (lambda model: isinstance(model, HieraDet), _timm_sam2),
    (lambda model: type(model).__name__ == "Sam2HieraDetModel", _hugging_face_sam2),
)
