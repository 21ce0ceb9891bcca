"""Networks and LightningModules as other people write them, named on command lines by their class paths."""

import lightning as L
import timm
import torch
from torch import nn

import gmarpp

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


class Encoder(nn.Module):
    """A transformer of no known family."""

    def __init__(self, width: int = 24, depth: int = 2):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, stride=16)
        self.position = nn.Parameter(torch.randn(1, 4, width))
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 3, 48, batch_first=True), depth, enable_nested_tensor=False
        )
        self.fc = nn.Linear(width, 3)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.layers(tokens).mean(dim=1))


def describe(network):
    return gmarpp.Architecture(
        grid=lambda height, width: (height // 16, width // 16), prefix_tokens=0, blocks=network.layers.layers
    )


def describe_nothing(network):
    return None


def trained_encoder() -> nn.Module:
    """A network that brings its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Encoder()


class Module(L.LightningModule):
    """Options that shape no weight, a loss with weights of its own, and no forward."""

    def __init__(self, width: int = 32, pool: str = "token"):
        super().__init__()
        self.save_hyperparameters()
        options = {**SMALL, "embed_dim": width, "global_pool": pool, "fc_norm": False, "num_classes": 3}
        self.net = timm.create_model("vit_tiny_patch16_224", **options)
        self.loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))


class Students(nn.Module):
    """Two networks of known families, of which one makes the logits."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = (timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=3) for _ in "12")

    def forward(self, images):
        return self.student(images)
