"""LeViT: attention with a bias by distance, and between stages attention from every second token, without a residual.

Source: Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", ICCV 2021.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.levit import Attention, AttentionDownsample, Levit, LevitDownsample
from torch import Tensor, nn

from gmarpp.network.families.hybrid import whole_step
from gmarpp.network.families.stages import Family, Stages, in_stages, merged
from gmarpp.network.pooling import Grid, Pooling, convolved
from gmarpp.network.transport import Step


def by_head(tokens: Tensor, heads: int) -> Tensor:
    """Lay out tokens (B, N, D) or (B, D, h, w) by head, (B, H, N, d)."""
    # Fused attention needs the channels of a token side by side.
    tokens = tokens.flatten(2).mT.contiguous() if tokens.dim() == 4 else tokens
    return torch.unflatten(tokens, -1, (heads, -1)).transpose(1, 2)


def _projected(attention: Any, attended: Tensor, grid: Sequence[int]) -> Tensor:
    """Return what a module makes of its attention's output, (B, H, N, d)."""
    tokens = attended.transpose(1, 2).flatten(2)
    left: Tensor = attention.proj(torch.unflatten(tokens.mT, -1, tuple(grid)) if attention.use_conv else tokens)
    return left


def _attended(attention: Any, query: Tensor, key: Tensor, value: Tensor, pairs: Tensor) -> Tensor:
    """Attend with a bias for each pair of tokens, whose numbers are (Q, N).

    Queries and keys get as many channels as values, which fused attention needs; zeros do not change their products.
    """
    missing = value.shape[-1] - key.shape[-1]
    query, key, bias = F.pad(query, (0, missing)), F.pad(key, (0, missing)), attention.attention_biases[:, pairs]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=attention.scale)


def _attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module by fused attention."""

    def forward(tokens: Tensor) -> Tensor:
        sizes = [attention.key_dim, attention.key_dim, attention.val_dim]
        query, key, value = torch.split(by_head(attention.qkv(tokens), attention.num_heads), sizes, dim=-1)
        attended = _attended(attention, query, key, value, attention.attention_bias_idxs)
        return _projected(attention, attended, attention.resolution)

    return forward


def _distances(height: int, width: int, device: torch.device) -> Tensor:
    """Return the number of the distance between each pair of a grid's tokens, (N, N)."""
    cells = torch.arange(height * width, device=device)
    down, right = ((each[:, None] - each).abs() for each in (cells // width, cells % width))
    return down * width + right


def _attention_downsample(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as such a module by fused attention, from all tokens, of which it leaves some out.

    So queries and keys are the same tokens; those left out get no gradient.
    """

    def forward(tokens: Tensor) -> Tensor:
        (height, width), stride = attention.resolution, attention.stride
        query = by_head(attention.q.ln(tokens), attention.num_heads)
        sizes = [attention.key_dim, attention.val_dim]
        key, value = torch.split(by_head(attention.kv(tokens), attention.num_heads), sizes, dim=-1)
        attended = _attended(attention, query, key, value, _distances(height, width, tokens.device))
        kept = torch.unflatten(attended, 2, (height, width))[:, :, ::stride, ::stride]
        return _projected(attention, kept.flatten(2, 3), kept.shape[2:4])

    return forward


def _hugging_face_downsample(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return the same for such a module of transformers, on square grids."""

    def forward(hidden_state: Tensor) -> Tensor:
        side, stride = attention.queries_subsample.resolution, attention.queries_subsample.stride
        query = by_head(attention.queries(hidden_state), attention.num_attention_heads)
        sizes = [attention.key_dim, attention.attention_ratio * attention.key_dim]
        key, value = torch.split(by_head(attention.keys_values(hidden_state), attention.num_attention_heads), sizes, -1)
        attended = _attended(attention, query, key, value, _distances(side, side, hidden_state.device))
        kept = torch.unflatten(attended, 2, (side, side))[:, :, ::stride, ::stride].flatten(2, 3)
        left: Tensor = attention.projection(attention.activation(kept.transpose(1, 2).flatten(2)))
        return left

    return forward


def _is_hugging_face_downsample(module: nn.Module) -> bool:
    return type(module).__name__ == "LevitAttentionSubsample"


def _step(block: nn.Module, grid: Grid) -> Step:
    pools = isinstance(block, LevitDownsample) or _is_hugging_face_downsample(block)
    return replace(whole_step(block, grid), has_residual=not pools)


def _levit(model: Any) -> Stages:
    stages = [list(stage.blocks) for stage in model.stages]
    halving = [stage.downsample for stage in model.stages[1:]]
    # What a stage begins with attends on the grid of the one below.
    for below, block in zip(stages[:-1], halving, strict=True):
        below.append(block)
    attentions = [each for each in model.modules() if isinstance(each, Attention | AttentionDownsample)]
    found = in_stages(
        lambda *size: merged(size, model.stem.stride),
        stages,
        _step,
        {each: (_attention if isinstance(each, Attention) else _attention_downsample)(each) for each in attentions},
        [partial(Pooling.subsampled, stride=block.attn_downsample.stride) for block in halving],
    )
    return replace(found, channels_first=model.use_conv)


def _hugging_face_levit(model: Any) -> Stages:
    # Attention and MLP are layers of their own; a stage ends with attention from fewer tokens.
    stages = [
        [each for each in stage.layers if hasattr(getattr(each, "module", each), "attention_biases")]
        for stage in model.encoder.stages
    ]
    halving: list[Any] = [each for stage in stages for each in stage if _is_hugging_face_downsample(each)]
    embedding = model.patch_embeddings
    convolutions = [getattr(embedding, f"embedding_layer_{number}").convolution for number in range(1, 5)]

    def grid(height: int, width: int) -> Grid:
        for convolution in convolutions:
            height, width = convolved((height, width), convolution)
        return height, width

    return in_stages(
        grid,
        stages,
        _step,
        {each: _hugging_face_downsample(each) for each in halving},
        [partial(Pooling.subsampled, stride=each.queries_subsample.stride) for each in halving],
    )


FAMILIES: tuple[Family, ...] = (
    (lambda model: isinstance(model, Levit), _levit),
    (lambda model: type(model).__name__ == "LevitModel", _hugging_face_levit),
)
