"""Networks whose tokens are pooled between stages of attention: PiT, CoAtNet, iFormer, Visformer, DaViT and Nest.

EfficientFormer attends in its last stage alone. What they do to tokens beside attention, convolutions and in DaViT
attention between channels, is passed place by place.

Sources: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", ICCV 2021; Dai et al., "CoAtNet: Marrying
Convolution and Attention for All Data Sizes", NeurIPS 2021; Zheng, "iFormer: Integrating ConvNet and Transformer for
Mobile Application", ICLR 2025; Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed", NeurIPS 2022; Chen
et al., "Visformer: The Vision-friendly Transformer", ICCV 2021; Ding et al., "DaViT: Dual Attention Vision
Transformers", ECCV 2022; Zhang et al., "Nested Hierarchical Transformer: Towards Accurate, Data-Efficient and
Interpretable Visual Understanding", AAAI 2022.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.davit import DaVit, SpatialBlock
from timm.models.efficientformer import EfficientFormer, MetaBlock1d
from timm.models.iformer import IFormer, SHMABlock
from timm.models.maxxvit import ConvNeXtBlock, MaxxVit, MbConvBlock, TransformerBlock2d
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from timm.models.visformer import Visformer
from torch import Tensor, nn

from gmarpp.network.families.hybrid import padded_step, whole_step
from gmarpp.network.families.reduced import above_convolutions, by_convolutions, of_kind
from gmarpp.network.families.stages import Family, Stages, in_stages, merged
from gmarpp.network.pooling import Grid, Pooling
from gmarpp.network.transport import Step, cells, partitioned


def _pit(model: Any) -> Stages:
    prefix = model.num_tokens

    def step(block: nn.Module, grid: Grid) -> Step:
        return Step(grid, torch.arange(prefix + grid[0] * grid[1])[None], prefix)

    pools = [stage.pool.conv for stage in model.transformers[1:]]
    stages = [list(stage.blocks) for stage in model.transformers]
    return replace(by_convolutions([model.patch_embed.conv, *pools], stages, step), prefix_tokens=prefix)


def _is_coatnet(model: nn.Module) -> bool:
    blocks = [block for stage in model.stages for block in stage.blocks] if isinstance(model, MaxxVit) else []
    attends = any(isinstance(block, TransformerBlock2d) for block in blocks)
    return attends and all(isinstance(block, TransformerBlock2d | MbConvBlock | ConvNeXtBlock) for block in blocks)


def _coatnet(model: Any) -> Stages:
    return above_convolutions(model.stages, model.feature_info, TransformerBlock2d, whole_step)


def _iformer(model: Any) -> Stages:
    return above_convolutions(model.stages, model.feature_info, SHMABlock, whole_step)


def _efficient_former(model: Any) -> Stages:
    reduction = model.feature_info[-1]["reduction"]
    return in_stages(lambda *size: merged(size, reduction), [of_kind(model, MetaBlock1d)], whole_step)


def _visformer_stages(model: Any) -> list[list[nn.Module]]:
    stages = (model.stage1, model.stage2, model.stage3)
    return [[block for block in stage if block.attn is not None] for stage in stages]


def _visformer(model: Any) -> Stages:
    stages, embeddings = _visformer_stages(model), (model.patch_embed1, model.patch_embed2, model.patch_embed3)
    lowest = next(index for index, blocks in enumerate(stages) if blocks)
    found = in_stages(
        lambda *size: merged(size, model.feature_info[lowest]["reduction"]),
        stages[lowest:],
        whole_step,
        merging=[partial(Pooling.convolved, by=each.proj) for each in embeddings[lowest + 1 :]],
    )
    return replace(found, channels_first=True)


def _davit_step(block: Any, grid: Grid) -> Step:
    return padded_step(grid, block.window_size)


def _davit(model: Any) -> Stages:
    stages = [of_kind(stage, SpatialBlock) for stage in model.stages]
    pools = [stage.downsample for stage in model.stages[1:]]
    merging = [None if pool.even_k else partial(Pooling.convolved, by=pool.conv) for pool in pools]
    found = in_stages(lambda *size: merged(size, model.stem.stride[0]), stages, _davit_step, merging=merging)
    return replace(found, channels_first=True)


def _nest_attention(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return the forward of an attention module with windows in the batch."""

    def forward(windows: Tensor) -> Tensor:
        projected = torch.unflatten(attention.qkv(windows.flatten(0, 1)), -1, (3, attention.num_heads, -1))
        attended = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4))
        # Heads come last, within each of their channels.
        left: Tensor = attention.proj(attended.permute(0, 2, 3, 1).reshape(windows.shape))
        return left

    return forward


def _nest(model: Any) -> Stages:
    def step(block: nn.Module, grid: Grid) -> Step:
        return Step(grid, partitioned(cells(grid), [model.block_size] * 2)[..., 0], enters_in_windows=True)

    stages = [list(level.transformer_encoder) for level in model.levels]
    fused = {block.attn: _nest_attention(block.attn) for stage in stages for block in stage}
    return in_stages(lambda *size: merged(size, model.patch_size), stages, step, fused)


FAMILIES: tuple[Family, ...] = (
    (lambda model: isinstance(model, PoolingVisionTransformer), _pit),
    (_is_coatnet, _coatnet),
    (lambda model: isinstance(model, IFormer) and bool(of_kind(model, SHMABlock)), _iformer),
    (lambda model: isinstance(model, EfficientFormer) and bool(of_kind(model, MetaBlock1d)), _efficient_former),
    (lambda model: isinstance(model, Visformer) and not model.vit_stem and any(_visformer_stages(model)), _visformer),
    (lambda model: isinstance(model, DaVit) and bool(of_kind(model, SpatialBlock)), _davit),
    (lambda model: isinstance(model, Nest), _nest),
)
