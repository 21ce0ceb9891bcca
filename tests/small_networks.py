"""Networks whose scores are known or soon computed, and images and maps for them."""

import timm
import torch
import torch.nn.functional as F
from torch import nn


class PatchSum(nn.Module):
    """Logit of class 1 is the weighted sum of the patches' means, logit of class 0 is 0; records its batches."""

    def __init__(self, weights, pretrained_cfg=None):
        super().__init__()
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        self.pretrained_cfg = pretrained_cfg or {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        means = F.adaptive_avg_pool2d(images.mean(1), self.weights.shape)
        logit = (means * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


WEIGHTS = [[4.0, 1.0], [3.0, 2.0]]
ONES = torch.ones(1, 3, 4, 4)
TRUE_MAP = torch.tensor([WEIGHTS])
CLASS_1 = torch.tensor([1])


def vit(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **(defaults | options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(count=3, size=(32, 32), grid=(4, 4), methods=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *size, generator=generator)
    maps = {f"method_{i}": torch.rand(count, *grid, generator=generator) for i in range(methods)}
    return images, maps, torch.arange(count) % 5
