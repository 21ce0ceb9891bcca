"""Networks that attend in several stages, with fewer tokens from stage to stage, by family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from timm.models.fastvit import AttentionBlock as FastVitAttention
from timm.models.fastvit import FastVit
from timm.models.gcvit import GlobalContextVit
from timm.models.maxxvit import MaxxVit, MaxxVitBlock
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.metaformer import MetaFormer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.tiny_vit import TinyVit
from torch import nn
from torchvision.models import MaxVit as TorchvisionMaxVit
from torchvision.models import SwinTransformer as TorchvisionSwinTransformer

from gmarpp.network.families import hybrid, swin
from gmarpp.network.pooling import Grid, Pooling
from gmarpp.network.transport import Step


@dataclass(frozen=True)
class Stages:
    """What there is to know of such a network; see `Architecture`."""

    grid: Callable[[int, int], Grid]
    blocks: Sequence[nn.Module]
    transport: Callable[[int, int], Sequence[Step]]
    fused: Mapping[nn.Module, Callable[..., Any]]
    channels_first: bool = False
    prefix_tokens: int = 0


Family = tuple[Callable[[nn.Module], bool], Callable[[Any], Stages]]
"""Whether a network is of it, and what describes the network."""


def merged(sides: Sequence[int], stride: int) -> Grid:
    """Return the grid of tokens that merge so many along each side, at the edges fewer."""
    height, width = (-(-side // stride) for side in sides)
    return height, width


def _halved(grid: Grid) -> Pooling:
    return Pooling.cells(grid, merged(grid, 2))


def in_stages(
    grid: Callable[[int, int], Grid],
    stages: Sequence[Sequence[nn.Module]],
    step: Callable[[Any, Grid], Step],
    fused: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
    merging: Sequence[Callable[[Grid], Pooling] | None] | None = None,
) -> Stages:
    """Describe a network of several stages.

    Args:
        grid: of the first stage, for the height and width of an image.
        stages: the blocks of each.
        step: describes a block on its grid.
        fused: see `Architecture`.
        merging: how tokens are made of those of the stage below, for each stage but the first; of two by two where it
            is not given.
    """
    by_stage = [None] * (len(stages) - 1) if merging is None else merging

    def transport(*size: int) -> list[Step]:
        at = grid(*size)
        steps = [step(block, at) for block in stages[0]]
        for stage, merge in zip(stages[1:], by_stage, strict=True):
            made = (merge or _halved)(at)
            at = made.coarse
            steps += [replace(step(block, at), merged=made) for block in stage]
        return steps

    blocks = [block for stage in stages for block in stage]
    return Stages(grid, blocks, transport, fused)


def _timm_swin(model: Any) -> Stages:
    is_second = isinstance(model, SwinTransformerV2)
    stages = [list(stage.blocks) for stage in model.layers]
    fused = swin.timm_cosine_attention if is_second else swin.timm_attention
    return in_stages(
        lambda *size: tuple(model.patch_embed.dynamic_feat_size(size)),
        stages,
        swin.timm_step,
        {block.attn: fused(block.attn) for stage in stages for block in stage},
    )


def _timm_logarithmic_swin(model: Any) -> Stages:
    stages, side = [list(stage.blocks) for stage in model.stages], model.patch_embed.patch_size
    fused = {block.attn: swin.timm_logarithmic_attention(block.attn) for stage in stages for block in stage}
    return in_stages(lambda *size: (size[0] // side[0], size[1] // side[1]), stages, swin.timm_step, fused)


def _torchvision_swin(model: Any) -> Stages:
    # An embedding, and then, by turns, the blocks of a stage and what merges tokens.
    embedding, *layers = model.features
    stages = [list(stage) for stage in layers[::2]]
    fused = {block.attn: swin.torchvision_attention(block.attn) for stage in stages for block in stage}
    down, right = embedding[0].stride
    return in_stages(lambda *size: (size[0] // down, size[1] // right), stages, swin.torchvision_step, fused)


_HUGGING_FACE_SWIN = ("SwinModel", "Swinv2Model", "DonutSwinModel")


def _hugging_face_swin(model: Any) -> Stages:
    side = model.config.patch_size
    stages = [list(stage.blocks) for stage in model.encoder.layers]
    is_second = type(model).__name__ == "Swinv2Model"
    step = swin.hugging_face_second_step if is_second else swin.hugging_face_step
    return in_stages(lambda *size: merged(size, side), stages, step)


def _is_timm_maxvit(model: nn.Module) -> bool:
    # Others of this class attend over all tokens in some stages (CoAtNet), in other layouts, or in parallel.
    blocks = [block for stage in model.stages for block in stage.blocks] if isinstance(model, MaxxVit) else []
    return bool(blocks) and all(isinstance(block, MaxxVitBlock) and not block.nchw_attn for block in blocks)


def _timm_maxvit(model: Any) -> Stages:
    # The stem and the first stage halve the image each.
    stages = [hybrid.maxvit_partitions(stage) for stage in model.stages]
    return in_stages(lambda *size: merged(size, 4), stages, hybrid.maxvit_step)


def _timm_tiny_vit(model: Any) -> Stages:
    # The stem halves the image twice; the first stage is one of convolutions.
    stages = [list(stage.blocks) for stage in model.stages[1:]]
    return in_stages(lambda *size: merged(size, 8), stages, hybrid.tiny_vit_step)


def _torchvision_maxvit(model: Any) -> Stages:
    # The stem and the first stage halve the image each.
    layers = [[each.layers for each in stage.layers] for stage in model.blocks]
    stages = [[each for layer in stage for each in (layer.window_attention, layer.grid_attention)] for stage in layers]
    attentions = [partition.attn_layer[1] for stage in stages for partition in stage]
    fused = {each: hybrid.torchvision_maxvit_attention(each) for each in attentions}
    found = in_stages(lambda *size: merged(size, 4), stages, hybrid.torchvision_maxvit_step, fused)
    return replace(found, channels_first=True)


def _fast_vit_stages(model: Any) -> list[Any]:
    return [stage for stage in model.stages if isinstance(stage.blocks[0], FastVitAttention)]


def _timm_fast_vit(model: Any) -> Stages:
    stages = [list(stage.blocks) for stage in _fast_vit_stages(model)]
    reduction = model.feature_info[-len(stages)]["reduction"]
    found = in_stages(lambda *size: merged(size, reduction), stages, hybrid.whole_step)
    return replace(found, channels_first=True)


def _attending_stages(model: Any) -> list[Any]:
    return [stage for stage in model.stages if isinstance(stage.blocks[0].token_mixer, MetaFormerAttention)]


def _timm_caformer(model: Any) -> Stages:
    stages = [list(stage.blocks) for stage in _attending_stages(model)]
    convolutional = len(model.stages) - len(stages)
    # The stem has patches of 7 x 7 pixels at every fourth pixel, from 2 pixels outside the image.
    return in_stages(
        lambda *size: merged([(side + 1) // 4 for side in size], 2**convolutional), stages, hybrid.whole_step
    )


def _timm_global_context(model: Any) -> Stages:
    # Whatever the queries of a window are made of, the window's own places are what it takes values from.
    return in_stages(
        lambda *size: merged(size, 4),
        [list(stage.blocks) for stage in model.stages],
        hybrid.window_step,
        merging=[partial(Pooling.convolved, by=stage.downsample.reduction) for stage in model.stages[1:]],
    )


FAMILIES: tuple[Family, ...] = (
    (lambda model: isinstance(model, SwinTransformer | SwinTransformerV2), _timm_swin),
    (lambda model: isinstance(model, SwinTransformerV2Cr), _timm_logarithmic_swin),
    (lambda model: isinstance(model, GlobalContextVit), _timm_global_context),
    (lambda model: isinstance(model, TorchvisionSwinTransformer), _torchvision_swin),
    (lambda model: type(model).__name__ in _HUGGING_FACE_SWIN and hasattr(model, "encoder"), _hugging_face_swin),
    (_is_timm_maxvit, _timm_maxvit),
    (lambda model: isinstance(model, TorchvisionMaxVit), _torchvision_maxvit),
    (lambda model: isinstance(model, TinyVit), _timm_tiny_vit),
    (lambda model: isinstance(model, FastVit) and bool(_fast_vit_stages(model)), _timm_fast_vit),
    (lambda model: isinstance(model, MetaFormer) and bool(_attending_stages(model)), _timm_caformer),
)
