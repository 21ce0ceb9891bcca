"""A small network with random weights."""

import torch

from gmarpp.network.build import build_model

TINY = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def tiny(num_classes=3, image_size=32, **options):
    torch.manual_seed(0)
    return build_model("vit_tiny_patch16_224", num_classes, image_size, {**TINY, **options}).eval()
