"""The image encoders of SAM, and ViTDet: attention in windows and, in some blocks, over all tokens.

Relative positions: each query adds its products with embeddings of the rows and columns between it and a key to the
scores. As fused attention takes no such bias with a gradient, they are further channels of the query, which meet ones
in the keys of their row or column.

Sources: Kirillov et al., "Segment Anything", ICCV 2023; Li et al., "Exploring Plain Vision Transformer Backbones for
Object Detection", ECCV 2022; Li et al., "MViTv2: Improved Multiscale Vision Transformers for Classification and
Detection", CVPR 2022, for the positions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer_sam import VisionTransformerSAM, get_rel_pos
from torch import Tensor

from gmarpp.network.families import hybrid
from gmarpp.network.families.block_by_block import along, by_convolution
from gmarpp.network.families.stages import Stages
from gmarpp.network.pooling import Grid
from gmarpp.network.transport import Step


def _step(block: Any, grid: Grid) -> Step:
    """Describe the windows of a block, of timm or of transformers."""
    return hybrid.tiny_vit_step(block, grid) if block.window_size else hybrid.whole_step(block, grid)


def attend_with_positions(
    query: Tensor, key: Tensor, value: Tensor, scale: float, by_row: Tensor, by_column: Tensor, prefix: int = 0
) -> Tensor:
    """Return the attended values, (B, H, Q, dv), where relative positions add to the scores.

    Args:
        query: (B, H, Q, d), of cells in rows behind prefix tokens, which have no position.
        key: (B, H, K, d), likewise.
        value: (B, H, K, dv).
        scale: factor of the products of queries and keys.
        by_row: embeddings of the rows between a query and a key, (query rows, key rows, d).
        by_column: of the columns, likewise.
        prefix: number of prefix tokens.
    """
    rows, columns = by_row.shape[1], by_column.shape[1]
    cells = torch.unflatten(query[:, :, prefix:], 2, (by_row.shape[0], by_column.shape[0]))
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", cells, by_row)
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", cells, by_column)
    added = torch.cat([of_rows, of_columns], dim=-1).flatten(2, 3)
    row_of_key = torch.eye(rows, device=key.device, dtype=key.dtype).repeat_interleave(columns, dim=0)
    column_of_key = torch.eye(columns, device=key.device, dtype=key.dtype).repeat(rows, 1)
    met = F.pad(torch.cat([row_of_key, column_of_key], dim=1), (0, 0, prefix, 0)).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query * scale, F.pad(added, (0, 0, prefix, 0))], dim=-1)
    key = torch.cat([key, met], dim=-1)
    # Fast kernels want as many channels in all three; zeros change no product.
    size = value.shape[-1]
    channels = max(size, query.shape[-1])
    query, key, value = (F.pad(each, (0, channels - each.shape[-1])) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :size]


def _timm_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of timm, without a bias that depends on the queries."""

    def forward(tokens: Tensor) -> Tensor:
        query, key, value = _projected(attention, tokens, attention.num_heads)
        query, key = attention.q_norm(query), attention.k_norm(key)
        if attention.rope is not None:
            rope = attention.rope.get_embed()
            query, key = (apply_rot_embed_cat(each, rope).type_as(value) for each in (query, key))
        return _attended(attention, query, key, value, tokens, get_rel_pos if attention.use_rel_pos else None)

    return forward


def _hugging_face_attention(attention: Any) -> Callable[..., tuple[Tensor, None]]:
    """Return the same for an attention module of transformers, which returns its weights beside the tokens."""

    def forward(hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
        query, key, value = _projected(attention, hidden_states, attention.num_attention_heads)
        embeddings = attention.get_rel_pos if attention.use_rel_pos else None
        return _attended(attention, query, key, value, hidden_states, embeddings), None

    return forward


def _vit_det_attention(attention: Any) -> Callable[..., tuple[Tensor]]:
    """Return the same for an attention module of ViTDet, which has windows and heads in the batch."""

    def forward(hidden_state: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        query, key, value = _projected(attention, hidden_state, attention.num_heads)
        embeddings = get_rel_pos if attention.use_relative_position_embeddings else None
        return (_attended(attention, query, key, value, hidden_state, embeddings),)

    return forward


def _projected(attention: Any, tokens: Tensor, heads: int) -> Tensor:
    """Return queries, keys and values of tokens (B, h, w, D), (3, B, H, N, d)."""
    return torch.unflatten(attention.qkv(tokens.flatten(1, 2)), 2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _attended(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor, embeddings: Callable[..., Tensor] | None
) -> Tensor:
    """Return the output of an attention module, in the layout of its tokens, (B, h, w, D)."""
    height, width = tokens.shape[1:3]
    if embeddings is not None:
        by_row = embeddings(height, height, attention.rel_pos_h)
        by_column = embeddings(width, width, attention.rel_pos_w)
        attended = attend_with_positions(query, key, value, attention.scale, by_row, by_column)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    left: Tensor = attention.proj(attended.transpose(1, 2).flatten(2)).view(tokens.shape)
    return left


def _timm(model: Any) -> Stages:
    fused = {block.attn: _timm_attention(block.attn) for block in model.blocks}
    return along(by_convolution(model.patch_embed.proj), model.blocks, _step, fused)


def _hugging_face(model: Any) -> Stages:
    fused = {layer.attn: _hugging_face_attention(layer.attn) for layer in model.layers}
    return along(by_convolution(model.patch_embed.projection), model.layers, _step, fused)


def _vit_det(model: Any) -> Stages:
    layers = model.encoder.layer
    fused = {layer.attention: _vit_det_attention(layer.attention) for layer in layers}
    found = along(by_convolution(model.embeddings.projection), layers, _step, fused)
    return replace(found, channels_first=True)


# Copies of one encoder.
_TWINS = ("SamVisionEncoder", "SamHQVisionEncoder", "GotOcr2VisionEncoder", "DeepseekOcr2SamVisionEncoder")
FAMILIES = (
    (lambda model: isinstance(model, VisionTransformerSAM), _timm),
    (lambda model: type(model).__name__ in _TWINS, _hugging_face),
    (lambda model: type(model).__name__ == "VitDetModel", _vit_det),
)
