"""MViT version 2: queries and keys pooled by convolutions, with relative positions, and perhaps a class token.

It adds the pooled queries to what they attend to. They lie where the pooled residual does, which they are counted with.

Source: Li et al., "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", CVPR 2022.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.mvitv2 import MultiScaleAttention, MultiScaleVit, reshape_post_pool, reshape_pre_pool
from torch import Tensor

from gmarpp.network.families.block_by_block import along, by_convolution
from gmarpp.network.families.sam import attend_with_positions
from gmarpp.network.families.stages import Stages
from gmarpp.network.pooling import Grid, Pooling, convolved
from gmarpp.network.transport import QueryPool, Step, footprints


def _step(block: Any, grid: Grid) -> Step:
    """Describe a block over all tokens of a grid, perhaps of fewer queries and keys."""
    attention, pool, prefix = block.attn, block.shortcut_pool_attn, int(block.has_cls_token)
    step = Step(grid, _whole(grid, prefix), prefix=prefix, keys=_keys(attention.pool_v, grid, prefix))
    if pool is None:
        return step
    made_of = prefix + footprints(grid, pool.kernel_size, pool.stride, pool.padding)
    alone = torch.full((prefix, made_of.shape[1]), step.tokens)
    alone[:, 0] = torch.arange(prefix)
    coarse = convolved(grid, pool)
    queries = Step(coarse, _whole(coarse, prefix), prefix=prefix)

    def residual(tokens: Tensor) -> Tensor:
        projection = block.shortcut_proj_attn
        projected: Tensor = tokens if projection is None else projection(block.norm1(tokens))
        return projected

    return replace(step, pool=QueryPool(queries, torch.cat([alone, made_of]), residual))


def _whole(grid: Grid, prefix: int) -> Tensor:
    return torch.arange(prefix + grid[0] * grid[1])[None]


def _keys(pool: Any, grid: Grid, prefix: int) -> Pooling | None:
    """Return what keys are made of; where a convolution keeps their number, they are their tokens."""
    if pool is None or max(pool.stride) == 1:
        return None
    made_of = Pooling.convolved(grid, pool)
    if not prefix:
        return made_of
    alone = F.pad(torch.eye(prefix), (0, grid[0] * grid[1]))
    return Pooling(torch.ones(1, 1), torch.cat([alone, F.pad(torch.kron(made_of.down, made_of.right), (prefix, 0))]))


def _attention(attention: Any) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """Return what computes the same as an attention module by fused attention."""

    def forward(tokens: Tensor, grid: Any) -> tuple[Tensor, Any]:
        projected = torch.unflatten(attention.qkv(tokens), 2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, above = _pooled(attention, projected[0], grid, attention.pool_q, attention.norm_q)
        key, reduced = _pooled(attention, projected[1], grid, attention.pool_k, attention.norm_k)
        value, _ = _pooled(attention, projected[2], grid, attention.pool_v, attention.norm_v)
        if attention.rel_pos_type == "spatial":
            by_row, by_column = (
                embeddings[_distances(*sides)]
                for embeddings, *sides in zip((attention.rel_pos_h, attention.rel_pos_w), above, reduced, strict=True)
            )
            prefix = int(attention.has_cls_token)
            attended = attend_with_positions(query, key, value, attention.scale, by_row, by_column, prefix)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        if attention.residual_pooling:
            attended = attended + query
        return attention.proj(attended.transpose(1, 2).flatten(2)), above

    return forward


def _pooled(attention: Any, tokens: Tensor, grid: Any, pool: Any, norm: Any) -> tuple[Tensor, Any]:
    """Return pooled queries, keys or values, (B, H, N, d), and their grid."""
    if pool is not None:
        cells, prefix = reshape_pre_pool(tokens, grid, attention.has_cls_token)
        tokens, grid = reshape_post_pool(pool(cells), attention.num_heads, prefix)
    return tokens if norm is None else norm(tokens), grid


def _distances(queries: int, keys: int) -> Tensor:
    """Return which of the embeddings is that of a query's and a key's distance along one side, (queries, keys)."""
    by_query, by_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    apart = torch.arange(queries)[:, None] * by_query - torch.arange(keys) * by_key
    return (apart + (keys - 1) * by_key).long()


def _is_known(model: Any) -> bool:
    attentions = [block.attn for stage in model.stages for block in stage.blocks]
    return all(isinstance(each, MultiScaleAttention) for each in attentions)


def _timm(model: Any) -> Stages:
    blocks = [block for stage in model.stages for block in stage.blocks]
    fused = {block.attn: _attention(block.attn) for block in blocks}
    found = along(by_convolution(model.patch_embed.proj), blocks, _step, fused)
    return replace(found, prefix_tokens=model.num_prefix_tokens)


FAMILIES = ((lambda model: isinstance(model, MultiScaleVit) and _is_known(model), _timm),)
