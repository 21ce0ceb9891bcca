"""Convolutional networks with attention between all places in some blocks: LowFormer, CPUBone, BoTNet and SHViT.

LowFormer and CPUBone attend on a coarser grid than they have tokens, and lay out what comes of it on the finer one.
SHViT attends with some of a token's channels; the others stay at their place.

Sources: Nottebaum et al., "LowFormer: Hardware Efficient Design for Convolutional Transformer Backbones", WACV 2025;
Nottebaum et al., "CPUBone: Efficient Vision Backbone Design for Devices with Low Parallelization Capabilities", 2026;
Srinivas et al., "Bottleneck Transformers for Visual Recognition", CVPR 2021; Yun and Ro, "SHViT: Single-Head Vision
Transformer with Memory Efficient Macro Design", CVPR 2024.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.models import cpubone, lowformer, shvit
from timm.models.byobnet import ByobNet, SelfAttnBlock
from torch import Tensor, nn

from gmarpp.network.families.hybrid import whole_step
from gmarpp.network.families.levit import by_head
from gmarpp.network.families.reduced import above_convolutions, of_kind
from gmarpp.network.families.sam import attend_with_positions
from gmarpp.network.families.stages import Family, Stages, in_stages, merged
from gmarpp.network.pooling import Grid, Pooling
from gmarpp.network.transport import Step


def _coarse_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as a module that may attend on a coarser grid, with a query for each of its tokens.

    A token has the query of the coarser one that it is part of, and the mean of what comes of these is that one's.
    """

    def forward(tokens: Tensor) -> Tensor:
        height, width = tokens.shape[-2:]
        stride, heads = attention.att_stride, attention.num_heads
        needs_whole = getattr(attention, "small_kernels", False)
        whole = F.pad(tokens, (0, -width % stride, 0, -height % stride)) if needs_whole else tokens
        projected = attention.pwise(attention.conv_proj(whole))
        coarse = projected.shape[-2:]
        query, key, value = torch.chunk(by_head(projected, heads), 3, dim=-1)
        down, right = (torch.arange(side, device=tokens.device) // stride for side in (height, width))
        own = (down[:, None] * coarse[1] + right).flatten()
        attended = F.scaled_dot_product_attention(query[:, :, own], key, value)
        by_token = torch.unflatten(attended.mT.flatten(1, 2), 2, (height, width))
        alike = F.avg_pool2d(by_token, stride, ceil_mode=True, count_include_pad=False)
        left: Tensor = attention.upsampling(attention.o_proj(alike))[..., :height, :width]
        return left

    return forward


_COARSE = (lowformer.ConvAttention, cpubone.ConvAttention)


def _coarse_step(block: nn.Module, grid: Grid) -> Step:
    (attention,) = (each for each in block.modules() if isinstance(each, _COARSE))
    whole = whole_step(block, grid)
    if attention.att_stride == 1:
        return whole
    if getattr(attention, "small_kernels", False):
        return replace(whole, keys=Pooling.cells(grid, merged(grid, attention.att_stride)))
    return replace(whole, keys=Pooling.convolved(grid, attention.conv_proj.conv))


def _coarsely_attending(kind: type[nn.Module]) -> Callable[[Any], Stages]:
    def describe(model: Any) -> Stages:
        found = above_convolutions(model.stages, model.feature_info, kind, _coarse_step)
        attentions = [each for each in model.modules() if isinstance(each, _COARSE)]
        return replace(found, fused={each: _coarse_attention(each) for each in attentions})

    return describe


def _bottleneck_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of BoTNet by fused attention."""

    def forward(tokens: Tensor) -> Tensor:
        sizes = [attention.dim_out_qk, attention.dim_out_qk, attention.dim_out_v]
        parts = torch.split(attention.qkv(tokens), sizes, dim=1)
        query, key, value = (by_head(each, attention.num_heads) for each in parts)
        grid, positions = tokens.shape[-2:], attention.pos_embed
        sides = zip(grid, (positions.height_rel, positions.width_rel), strict=True)
        by_row, by_column = (_between(side, embedding) for side, embedding in sides)
        factor = attention.scale if attention.scale_pos_embed else 1.0
        attended = attend_with_positions(query, key, value, attention.scale, by_row * factor, by_column * factor)
        left: Tensor = attention.pool(torch.unflatten(attended.mT.flatten(1, 2), 2, tuple(grid)))
        return left

    return forward


def _between(side: int, embedding: Tensor) -> Tensor:
    """Return the embeddings of the distances from each of so many places to each, (side, side, d)."""
    places = torch.arange(side, device=embedding.device)
    return embedding[places - places[:, None] + side - 1]


def _attending_blocks(part: nn.Module) -> list[Any]:
    return of_kind(part, SelfAttnBlock)


def _is_botnet(model: nn.Module) -> bool:
    blocks = _attending_blocks(model) if isinstance(model, ByobNet) else []
    # A block with a convolution of its own may pool its tokens before it attends.
    return bool(blocks) and all(
        isinstance(block.self_attn, BottleneckAttn) and isinstance(block.conv2_kxk, nn.Identity) for block in blocks
    )


def _botnet(model: Any) -> Stages:
    by_reduction: dict[int, list[nn.Module]] = {}
    for stage, feature in zip(model.stages, model.feature_info[-len(model.stages) :], strict=True):
        for block in _attending_blocks(stage):
            # The first block of a stage attends on the grid of the stage below, and pools what comes of it.
            pools = not isinstance(block.self_attn.pool, nn.Identity)
            by_reduction.setdefault(feature["reduction"] // (2 if pools else 1), []).append(block)
    reductions = list(by_reduction)
    found = in_stages(
        lambda *size: merged(size, reductions[0]),
        list(by_reduction.values()),
        whole_step,
        {block.self_attn: _bottleneck_attention(block.self_attn) for block in _attending_blocks(model)},
        [partial(_in_cells, side=above // below) for below, above in itertools.pairwise(reductions)],
    )
    return replace(found, channels_first=True)


def _in_cells(fine: Grid, side: int) -> Pooling:
    return Pooling.cells(fine, merged(fine, side))


def _single_head(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return what computes the same as an attention module of SHViT by fused attention."""

    def forward(tokens: Tensor) -> Tensor:
        attending, others = torch.split(tokens, [attention.pdim, attention.dim - attention.pdim], dim=1)
        sizes = [attention.qk_dim, attention.qk_dim, attention.pdim]
        parts = torch.split(attention.qkv(attention.pre_norm(attending)), sizes, dim=1)
        # Fast kernels want as many channels in all three; zeros change no product.
        query, key, value = (F.pad(by_head(each, 1), (0, max(sizes) - each.shape[1])) for each in parts)
        attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)[:, 0, :, : attention.pdim]
        by_cell = torch.unflatten(attended.mT, 2, tuple(tokens.shape[-2:]))
        left: Tensor = attention.proj(torch.cat([by_cell, others], dim=1))
        return left

    return forward


def _shvit(model: Any) -> Stages:
    found = above_convolutions(model.stages, model.feature_info, shvit.BasicBlock, whole_step, shvit.SHSA)
    return replace(found, fused={each: _single_head(each) for each in of_kind(model, shvit.SHSA)})


def _attends(model: nn.Module, network: type[nn.Module]) -> bool:
    return isinstance(model, network) and any(isinstance(each, _COARSE) for each in model.modules())


FAMILIES: tuple[Family, ...] = (
    (lambda model: _attends(model, lowformer.LowFormer), _coarsely_attending(lowformer.LowFormerBlock)),
    (lambda model: _attends(model, cpubone.CPUBone), _coarsely_attending(cpubone.CPUBoneBlock)),
    (_is_botnet, _botnet),
    (lambda model: isinstance(model, shvit.SHViT) and bool(of_kind(model, shvit.SHSA)), _shvit),
)
