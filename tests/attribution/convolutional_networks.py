"""Small convolutional networks with attention in some blocks, in all stages or the last ones."""

from functools import partial

import torch
from test_families import sharpened
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientformer import EfficientFormer
from timm.models.gcvit import GlobalContextVit
from timm.models.shvit import SHViT
from timm.models.visformer import Visformer


def seeded(make):
    torch.manual_seed(0)
    return sharpened(make())


def whole_scales(model):
    """Set factors that start as almost nothing, so that little would come of attention."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("layer_scale", "ls1", "ls2", "conv3_1x1.bn.weight")):
            torch.nn.init.ones_(parameter)
        if "attention_biases" in name:
            torch.nn.init.normal_(parameter)
    return model


def efficient_former():
    sizes = {"depths": (1, 1, 1, 3), "embed_dims": (8, 8, 16, 32), "num_vit": 2, "mlp_ratios": 2}
    return whole_scales(seeded(lambda: EfficientFormer(num_classes=5, **sizes)))


def visformer(**options):
    sizes = {"init_channels": 8, "embed_dim": 16, "depth": (1, 2, 1), "num_heads": 2, "mlp_ratio": 2}
    model = seeded(lambda: Visformer((96, 64), num_classes=5, attn_stage="011", spatial_conv="100", **sizes, **options))
    for name, parameter in model.named_parameters():
        if "qkv" in name:
            parameter.data.mul_(30)
    return model


def global_context():
    sizes = {"embed_dim": 8, "depths": (2, 2, 1, 2), "num_heads": (1, 2, 2, 2), "mlp_ratio": 2}
    return seeded(lambda: GlobalContextVit(img_size=64, num_classes=5, **sizes))


def coarse(kind, **options):
    sizes = {"width_list": [8, 8, 8, 16, 64], "depth_list": [0, 1, 1, 2, 1], "head_widths": (16, 16)}
    model = seeded(lambda: kind(num_classes=5, **sizes, **options))
    for name, parameter in model.named_parameters():
        if "pwise" in name:
            parameter.data.mul_(5)
    return model


def botnet(scale_pos_embed, dim_head=8):
    bottle, attending = (partial(ByoBlockCfg, type=kind, br=0.5, gs=0) for kind in ("bottle", "self_attn"))
    blocks = (bottle(d=1, c=16, s=2), (bottle(d=1, c=32, s=2), attending(d=1, c=32, s=1)), attending(d=2, c=32, s=2))
    config = ByoModelCfg(
        blocks=blocks,
        stem_chs=8,
        stem_type="3x3",
        stem_pool="",
        fixed_input_size=True,
        self_attn_layer="bottleneck",
        self_attn_kwargs={"dim_head": dim_head, "scale_pos_embed": scale_pos_embed},
    )
    return whole_scales(seeded(lambda: ByobNet(config, img_size=(64, 96), num_classes=5)))


def single_head():
    sizes = {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "qk_dim": (4, 4, 12), "depth": (1, 2, 1)}
    model = seeded(lambda: SHViT(num_classes=5, types=("i", "s", "s"), **sizes))
    for name, parameter in model.named_parameters():
        if "bn.weight" in name:
            torch.nn.init.ones_(parameter)
        if "qkv.c" in name:
            parameter.data.mul_(5)
    return model
