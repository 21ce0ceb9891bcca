"""Small networks with fewer keys than tokens, and with tokens pooled between their stages, described by hand."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from convolutional_networks import botnet, coarse, efficient_former, global_context, seeded, single_head, visformer
from timm.models._efficientnet_blocks import MobileAttention
from timm.models.byobnet import SelfAttnBlock
from timm.models.cpubone import CPUBone, CPUBoneBlock
from timm.models.davit import DaVit, SpatialBlock
from timm.models.efficientformer import MetaBlock1d
from timm.models.gcvit import GlobalContextVitBlock
from timm.models.iformer import IFormer, SHMABlock
from timm.models.levit import Levit
from timm.models.lowformer import LowFormer, LowFormerBlock
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg, TransformerBlock2d
from timm.models.mobilenetv3 import _gen_mobilenet_v4
from timm.models.nest import Nest
from timm.models.nextvit import NextTransformerBlock, NextViT
from timm.models.pit import PoolingVisionTransformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.shvit import SHSA, BasicBlock
from timm.models.twins import Twins


def pvt(**options):
    sizes = {"depths": (1, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    return seeded(lambda: PyramidVisionTransformerV2(num_classes=5, **sizes, **options))


def transformers_pvt(**options):
    sizes = {"depths": [1, 2], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    patches = {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2}
    config = transformers.PvtV2Config(num_labels=5, **sizes, **patches, **options)
    return seeded(lambda: transformers.PvtV2ForImageClassification(config))


def segformer():
    sizes = {"depths": [1, 1, 1], "hidden_sizes": [8, 8, 16], "num_attention_heads": [1, 1, 2], "mlp_ratios": [2, 2, 2]}
    patches = {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "sr_ratios": [4, 2, 1], "num_encoder_blocks": 3}
    config = transformers.SegformerConfig(num_labels=5, **sizes, **patches)
    return seeded(lambda: transformers.SegformerForImageClassification(config))


def twins(**options):
    sizes = {"depths": (2, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    return seeded(lambda: Twins(img_size=32, num_classes=5, **sizes, **options))


def next_vit():
    return seeded(
        lambda: NextViT(3, num_classes=5, depths=(1, 2, 5, 2), stem_chs=(8, 8, 8), sr_ratios=(8, 2, 1, 1), head_dim=32)
    )


def pit(**options):
    sizes = {"base_dims": (8, 8), "depth": (1, 2), "heads": (1, 2), "mlp_ratio": 2, "patch_size": 8, "stride": 4}
    return seeded(lambda: PoolingVisionTransformer(img_size=(36, 44), num_classes=5, **sizes, **options))


def coatnet(kinds, **options):
    config = MaxxVitCfg(
        (8, 16, 32), (1, 2, 2), kinds, stem_width=8, transformer_cfg=MaxxVitTransformerCfg(dim_head=8), **options
    )
    return seeded(lambda: MaxxVit(config, img_size=(64, 96), num_classes=5))


def iformer():
    sizes = {"dims": (8, 16, 32), "depths": (1, 4, 3), "attn_groups": (0, 1, 1), "attn_head_dim_reduction": (0, 2, 4)}
    return seeded(lambda: IFormer(num_classes=5, **sizes))


def mobile_net():
    model = seeded(lambda: _gen_mobilenet_v4("mobilenetv4_hybrid_medium", 0.25, num_classes=5))
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            torch.nn.init.ones_(parameter)
    # Untrained, it makes logits whose exponentials no number can hold.
    model.classifier.weight.data.div_(1e5)
    return model


def levit(**options):
    sizes = {"embed_dim": (16, 32), "key_dim": 4, "depth": (1, 2), "num_heads": (2, 3), "stem_type": "s8"}
    torch.manual_seed(0)
    model = Levit(img_size=(40, 56), num_classes=5, **sizes, **options).eval()
    for name, parameter in model.named_parameters():
        # Many start as zero, so that nothing would come of attention.
        if "bn.weight" in name or "attention_biases" in name:
            torch.nn.init.normal_(parameter, 1)
    return model


def transformers_levit():
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 3], "depths": [1, 1, 2], "key_dim": [4] * 3}
    config = transformers.LevitConfig(image_size=80, num_labels=5, attention_ratio=[2] * 3, mlp_ratio=[2] * 3, **sizes)
    torch.manual_seed(0)
    model = transformers.LevitForImageClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "batch_norm.weight" in name or "attention_biases" in name:
            torch.nn.init.normal_(parameter, 1)
    return model


def davit(**options):
    sizes = {"depths": (1, 2), "embed_dims": (8, 16), "num_heads": (1, 2), "window_size": 3}
    return seeded(lambda: DaVit(num_classes=5, **sizes, **options))


def nest():
    sizes = {"num_levels": 2, "embed_dims": (8, 16), "num_heads": (1, 2), "depths": (1, 2)}
    return seeded(lambda: Nest(img_size=32, num_classes=5, **sizes))


# How tokens are pooled, as torch averages: the matrix of this, (N_coarse, N_fine), is that of equal shares.
overlapping = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False)
two_by_two = partial(F.avg_pool2d, kernel_size=2)
two_by_two_padded = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
four_by_four = partial(F.avg_pool2d, kernel_size=4)
to_seven = partial(F.adaptive_avg_pool2d, output_size=7)


every_second = partial(F.avg_pool2d, kernel_size=1, stride=2)
overlapping_more = partial(F.avg_pool2d, kernel_size=5, stride=2, padding=2, count_include_pad=False)
# How keys are made where two by two tokens attend together.
COARSE = {"five by five": overlapping_more, "two by two": two_by_two_padded}
# Of a block that attends from every second token, and adds nothing to it.
FROM_FEWER = "from fewer"


def runs_of_four(grids):
    return F.avg_pool1d(grids.flatten(2), 4)


def of_kind(part, kind):
    return [each for each in part.modules() if isinstance(each, kind)]


def attending(kind):
    return lambda model: [[block for block in stage.blocks if isinstance(block, kind)] for stage in model.stages]


def case(make, size, grids, steps, merging, blocks, prefix=0, rule=True, adds=True, exact=True, written=False):
    """Describe a network.

    `steps` are by stage, one for each block: `None` for attention over all tokens, a side of windows, how keys are
    pooled, or `FROM_FEWER`. `merging` is how tokens are, `exact` whether nothing else mixes them. `rule` says whether
    the balanced gradient knows all operations, `adds` whether blocks add attention to the tokens that they are given.
    `written` says whether they write attention out themselves.
    """
    return SimpleNamespace(**locals())


by_stage = lambda model: [list(stage.blocks) for stage in model.stages]  # noqa: E731
transformers_pvt_blocks = lambda model: [list(layer.blocks) for layer in model.pvt_v2.encoder.layers]  # noqa: E731
twins_blocks = lambda model: [list(stage) for stage in model.blocks]  # noqa: E731
pit_blocks = lambda model: [list(stage.blocks) for stage in model.transformers]  # noqa: E731
coatnet_blocks = lambda model: [each for each in attending(TransformerBlock2d)(model) if each]  # noqa: E731
levit_blocks = lambda model: [  # noqa: E731
    [*model.stages[0].blocks, model.stages[1].downsample],
    list(model.stages[1].blocks),
]
transformers_levit_blocks = lambda model: [  # noqa: E731
    [layer for layer in stage.layers if any("attention_biases" in name for name, _ in layer.named_parameters())]
    for stage in model.levit.encoder.stages
]
davit_blocks = lambda model: [of_kind(stage, SpatialBlock) for stage in model.stages]  # noqa: E731
botnet_blocks = lambda model: [of_kind(model, SelfAttnBlock)[:2], of_kind(model, SelfAttnBlock)[2:]]  # noqa: E731

NETWORKS = {
    "PVT v2": case(
        pvt, (36, 44), [(9, 11), (5, 6)], [[two_by_two], [None, None]], overlapping, by_stage,
    ),
    "PVT v2, keys of the mean": case(
        partial(pvt, linear=True), (36, 60), [(9, 15), (5, 8)], [[to_seven], [to_seven] * 2], overlapping, by_stage,
    ),
    "PVT v2 of transformers": case(
        transformers_pvt, (36, 44), [(9, 11), (5, 6)], [[two_by_two], [None] * 2], overlapping, transformers_pvt_blocks,
        exact=False, written=True,
    ),
    "PVT v2 of transformers, keys of the mean": case(
        partial(transformers_pvt, linear_attention=True), (36, 60), [(9, 15), (5, 8)], [[to_seven], [to_seven] * 2],
        overlapping, transformers_pvt_blocks, exact=False, written=True,
    ),
    "SegFormer": case(
        segformer, (62, 72), [(16, 18), (8, 9), (4, 5)], [[four_by_four], [two_by_two], [None]], overlapping,
        lambda model: by_stage(model.segformer),
    ),
    "Twins-PCPVT": case(
        twins, (38, 44), [(9, 11), (4, 5)], [[two_by_two] * 2, [None] * 2], two_by_two, twins_blocks,
    ),
    "Twins-SVT": case(
        partial(twins, wss=(4, 3)), (38, 44), [(9, 11), (4, 5)], [[4, two_by_two], [3, None]], two_by_two, twins_blocks,
    ),
    "NextViT": case(
        next_vit, (68, 92), [(9, 12), (5, 6), (3, 3)], [[runs_of_four], [None], [None]], two_by_two_padded,
        lambda model: attending(NextTransformerBlock)(model)[1:], exact=False,
    ),
    "PiT": case(pit, (36, 44), [(8, 10), (4, 5)], [[None], [None] * 2], overlapping, pit_blocks, prefix=1),
    "PiT, distilled": case(
        partial(pit, distilled=True), (36, 44), [(8, 10), (4, 5)], [[None], [None] * 2], overlapping, pit_blocks,
        prefix=2,
    ),
    "CoAtNet": case(
        partial(coatnet, ("C", "T", "T")), (64, 96), [(8, 12), (4, 6)], [[None] * 2] * 2, two_by_two, coatnet_blocks,
        adds=False, exact=False,
    ),
    "CoAtNet with ConvNeXt blocks": case(
        partial(coatnet, ("C", "C", ("C", "T")), conv_cfg=MaxxVitConvCfg(block_type="convnext")), (64, 96), [(4, 6)],
        [[None]], two_by_two, coatnet_blocks, adds=False, exact=False,
    ),
    "LeViT": case(
        levit, (40, 56), [(5, 7), (3, 4)], [[None, FROM_FEWER], [None] * 2], every_second, levit_blocks, adds=False,
        exact=False, written=True,
    ),
    "LeViT of convolutions": case(
        partial(levit, use_conv=True), (40, 56), [(5, 7), (3, 4)], [[None, FROM_FEWER], [None] * 2], every_second,
        levit_blocks, adds=False, exact=False, written=True,
    ),
    "LeViT of transformers": case(
        transformers_levit, (80, 80), [(5, 5), (3, 3), (2, 2)], [[None, FROM_FEWER], [None, FROM_FEWER], [None] * 2],
        every_second, transformers_levit_blocks, adds=False, exact=False, written=True,
    ),
    "iFormer": case(
        iformer, (60, 76), [(8, 10), (4, 5)], [[None]] * 2, two_by_two_padded,
        lambda model: attending(SHMABlock)(model)[1:], rule=False, exact=False,
    ),
    "MobileNet v4": case(
        mobile_net, (60, 76), [(4, 5), (2, 3)], [[overlapping] * 4, [None] * 4], two_by_two_padded,
        lambda model: [of_kind(stage, MobileAttention) for stage in model.blocks[2:4]], exact=False,
    ),
    "EfficientFormer": case(
        efficient_former, (224, 224), [(7, 7)], [[None] * 2], None, lambda model: [of_kind(model, MetaBlock1d)],
        exact=False, written=True,
    ),
    "Visformer": case(
        visformer, (96, 64), [(6, 4), (3, 2)], [[None] * 2, [None]], two_by_two,
        lambda model: [list(model.stage2), list(model.stage3)], exact=False, written=True,
    ),
    "GCViT": case(
        global_context, (64, 64), [(16, 16), (8, 8), (4, 4), (2, 2)], [[2] * 2, [2] * 2, [4], [2] * 2], overlapping,
        lambda model: [of_kind(stage, GlobalContextVitBlock) for stage in model.stages], exact=False,
        written=True,
    ),
    "LowFormer": case(
        partial(coarse, LowFormer), (124, 172), [(8, 11), (4, 6)], [["five by five"] * 2, [None]], two_by_two_padded,
        lambda model: [of_kind(stage, LowFormerBlock) for stage in model.stages[2:]], rule=False, exact=False,
    ),
    "LowFormer without MLP": case(
        partial(coarse, LowFormer, attn_mlp=False), (124, 172), [(8, 11), (4, 6)], [["five by five"] * 2, [None]],
        two_by_two_padded, lambda model: [of_kind(stage, LowFormerBlock) for stage in model.stages[2:]], exact=False,
    ),
    "CPUBone": case(
        partial(coarse, CPUBone, small_kernels=True, attn_upsample="nearest"), (124, 140), [(8, 9), (4, 5)],
        [["two by two"] * 2, [None]], two_by_two_padded,
        lambda model: [of_kind(stage, CPUBoneBlock) for stage in model.stages[2:]], rule=False, exact=False,
    ),
    "CPUBone, fused convolutions": case(
        partial(coarse, CPUBone, fused_conv=True), (124, 140), [(8, 9), (4, 5)], [["five by five"] * 2, [None]],
        two_by_two_padded, lambda model: [of_kind(stage, CPUBoneBlock) for stage in model.stages[2:]], rule=False,
        exact=False,
    ),
    "BoTNet": case(
        partial(botnet, scale_pos_embed=False), (64, 96), [(8, 12), (4, 6)], [[None] * 2, [None]], two_by_two,
        botnet_blocks, adds=False, exact=False, written=True,
    ),
    "BoTNet with scaled positions": case(
        partial(botnet, scale_pos_embed=True, dim_head=16), (64, 96), [(8, 12), (4, 6)], [[None] * 2, [None]],
        two_by_two, botnet_blocks, adds=False, exact=False, written=True,
    ),
    "SHViT": case(
        single_head, (124, 172), [(4, 6), (2, 3)], [[None] * 2, [None]], two_by_two_padded,
        lambda model: [of_kind(stage, BasicBlock) for stage in model.stages if of_kind(stage, SHSA)], rule=False,
        exact=False, written=True,
    ),
    "DaViT": case(
        davit, (34, 44), [(9, 11), (5, 6)], [[3], [3] * 2], two_by_two_padded, davit_blocks, rule=False, exact=False,
    ),
    "DaViT, overlapping": case(
        partial(davit, down_kernel_size=3), (36, 44), [(9, 11), (5, 6)], [[3], [3] * 2], overlapping, davit_blocks,
        rule=False, exact=False,
    ),
    "Nest": case(
        nest, (32, 32), [(8, 8), (4, 4)], [[4], [4] * 2], two_by_two,
        lambda model: [list(level.transformer_encoder) for level in model.levels], exact=False,
    ),
}  # fmt: skip
