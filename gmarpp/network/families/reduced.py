"""Networks whose attention has fewer keys than tokens: PVT version 2, SegFormer, Twins, NextViT, MobileNet.

A key is made of a rectangle of tokens, by a strided convolution or an average, or in NextViT of a run of them.

Sources: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", CVMJ 2022; Xie et al., "SegFormer:
Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS 2021; Chu et al., "Twins: Revisiting
the Design of Spatial Attention in Vision Transformers", NeurIPS 2021; Li et al., "Next-ViT: Next Generation Vision
Transformer for Efficient Deployment in Realistic Industrial Scenarios", arXiv 2207.05501, 2022; Qin et al.,
"MobileNetV4: Universal Models for the Mobile Ecosystem", ECCV 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models._efficientnet_blocks import MobileAttention
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nextvit import NextTransformerBlock, NextViT
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import LocallyGroupedAttn, Twins
from torch import Tensor, nn

from gmarpp.network.families.hybrid import padded_step, whole_step
from gmarpp.network.families.stages import Family, Stages, in_stages, merged
from gmarpp.network.families.swin import attended
from gmarpp.network.pooling import Grid, Pooling, convolved
from gmarpp.network.transport import Step, padded, partitioned, put_together


def by_convolutions(
    convolutions: Sequence[nn.Module], stages: Sequence[Sequence[nn.Module]], step: Callable[[Any, Grid], Step]
) -> Stages:
    """Describe a network with a convolution before each stage, the first of the image."""
    embedding, *merging = convolutions
    return in_stages(
        lambda *size: convolved(size, embedding),
        stages,
        step,
        merging=[partial(Pooling.convolved, by=each) for each in merging],
    )


def of_kind(part: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Return the modules of a kind in a part of a network."""
    return [each for each in part.modules() if isinstance(each, kind)]


def above_convolutions(
    stages: Sequence[nn.Module],
    features: Sequence[dict[str, Any]],
    kind: type[nn.Module],
    step: Callable[[Any, Grid], Step],
    part: type[nn.Module] = nn.Module,
) -> Stages:
    """Describe a network whose upper stages attend.

    Args:
        stages: all, of blocks that are given tokens as (B, D, h, w).
        features: timm's information on them, the last for the last stage.
        kind: that of the blocks that attend.
        step: describes such a block on its grid.
        part: what such a block holds, if others of the kind do not attend.
    """
    attending = [[block for block in of_kind(stage, kind) if of_kind(block, part)] for stage in stages]
    lowest = next(index for index, blocks in enumerate(attending) if blocks)
    reduction = features[lowest - len(stages)]["reduction"]
    # Blocks may pool their tokens themselves, so that the lowest ones are given those of the stage below.
    found = in_stages(lambda *size: merged(size, reduction // 2), [[], *attending[lowest:]], step)
    return replace(found, grid=lambda *size: merged(size, reduction), channels_first=True)


def _reduced_by(reduction: nn.Module | None, block: nn.Module, grid: Grid) -> Step:
    whole = whole_step(block, grid)
    return whole if reduction is None else replace(whole, keys=Pooling.convolved(grid, reduction))


def _pvt_step(block: Any, grid: Grid) -> Step:
    pool = block.attn.pool
    if pool is None:
        return _reduced_by(block.attn.sr, block, grid)
    return replace(whole_step(block, grid), keys=Pooling.adaptive(grid, (pool.output_size,) * 2))


def _pvt(model: Any) -> Stages:
    embeddings = [model.patch_embed, *(stage.downsample for stage in model.stages[1:])]
    return by_convolutions(
        [each.proj for each in embeddings], [list(stage.blocks) for stage in model.stages], _pvt_step
    )


def _hugging_face_pvt_step(block: Any, grid: Grid) -> Step:
    attention = block.attention
    if attention.linear_attention:
        return replace(whole_step(block, grid), keys=Pooling.adaptive(grid, (attention.pool.output_size,) * 2))
    return _reduced_by(getattr(attention, "spatial_reduction", None), block, grid)


def _hugging_face_pvt(model: Any) -> Stages:
    layers = model.encoder.layers
    embeddings = [layer.patch_embedding.proj for layer in layers]
    return by_convolutions(embeddings, [list(layer.blocks) for layer in layers], _hugging_face_pvt_step)


def _segformer_step(block: Any, grid: Grid) -> Step:
    reduction = getattr(block.attention, "sequence_reduction", None)
    return _reduced_by(reduction and reduction.sequence_reduction, block, grid)


def _segformer(model: Any) -> Stages:
    stages = [list(stage.blocks) for stage in model.stages]
    return by_convolutions([stage.patch_embeddings.proj for stage in model.stages], stages, _segformer_step)


def _twins_step(block: Any, grid: Grid) -> Step:
    if not isinstance(block.attn, LocallyGroupedAttn):
        return _reduced_by(block.attn.sr, block, grid)
    return padded_step(grid, [block.attn.ws] * 2)


def _twins_attention(attention: Any) -> Callable[[Tensor, Grid], Tensor]:
    """Return the forward of a local attention module with windows in the batch."""

    def forward(tokens: Tensor, grid: Grid) -> Tensor:
        window = [attention.ws] * 2
        whole = padded(torch.unflatten(tokens, 1, grid), window)
        windows = attended(attention, partitioned(whole, window), attention.qkv.bias)
        left = put_together(windows, window, whole.shape[1:3])
        return left[:, : grid[0], : grid[1]].flatten(1, 2)

    return forward


def _twins(model: Any) -> Stages:
    found = by_convolutions(
        [each.proj for each in model.patch_embeds], [list(each) for each in model.blocks], _twins_step
    )
    local = [block.attn for block in found.blocks if isinstance(block.attn, LocallyGroupedAttn)]
    return replace(found, fused={each: _twins_attention(each) for each in local})


def _next_vit_step(block: Any, grid: Grid) -> Step:
    whole, reduction = whole_step(block, grid), block.e_mhsa.sr
    return whole if reduction is None else replace(whole, keys=Pooling.runs(grid, *reduction.kernel_size))


def _next_vit(model: Any) -> Stages:
    return above_convolutions(model.stages, model.feature_info, NextTransformerBlock, _next_vit_step)


def _is_mobile_net(model: nn.Module) -> bool:
    blocks = of_kind(model, MobileAttention) if isinstance(model, MobileNetV3) else []
    return bool(blocks) and all(block.has_skip for block in blocks)


def _mobile_net_step(block: Any, grid: Grid) -> Step:
    return _reduced_by(getattr(block.attn.key, "down_conv", None), block, grid)


def _mobile_net(model: Any) -> Stages:
    # The last stage does not halve its tokens, nor does it attend.
    return above_convolutions(model.blocks[:-1], model.feature_info, MobileAttention, _mobile_net_step)


FAMILIES: tuple[Family, ...] = (
    (lambda model: isinstance(model, PyramidVisionTransformerV2), _pvt),
    (lambda model: type(model).__name__ == "PvtV2Model", _hugging_face_pvt),
    (lambda model: type(model).__name__ == "SegformerModel", _segformer),
    (lambda model: isinstance(model, Twins), _twins),
    (lambda model: isinstance(model, NextViT), _next_vit),
    (_is_mobile_net, _mobile_net),
)
