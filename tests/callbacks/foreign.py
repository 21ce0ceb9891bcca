"""LightningModules and loaders as other people write them, without a word about explanations."""

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from small_networks import vit
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, random_split
from torchvision import datasets, transforms


class Steps(L.LightningModule):
    """Training and validation on pairs of images and labels."""

    trained = 0

    def training_step(self, batch, batch_idx):
        self.trained += 1
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def loss(self, batch):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OwnNet(Steps):
    """Everything in `net`."""

    def __init__(self, net=None):
        super().__init__()
        self.net = vit() if net is None else net

    def forward(self, images):
        return self.net(images)


class BackboneAndHead(Steps):
    """The network is the module itself."""

    def __init__(self):
        super().__init__()
        self.backbone = vit(num_classes=0)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 5)

    def forward(self, images):
        return self.head(self.dropout(self.backbone(images)))


class HuggingFace(Steps):
    """A classifier of transformers, with its own loss and batches that are its arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_labels=5,
            initializer_range=0.3,
        )
        self.model = transformers.ViTForImageClassification(config)

    def forward(self, pixel_values, labels):
        return self.model(pixel_values=pixel_values, labels=labels)

    def loss(self, batch):
        return self(**batch).loss


class Columns(torch.utils.data.Dataset):
    """Samples as the arguments of a model of transformers."""

    def __init__(self):
        self.images, self.labels = samples()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


@dataclass
class Batch:
    """Images of uint8 that hooks of the module make usable."""

    pixels: torch.Tensor
    classes: torch.Tensor

    @classmethod
    def of(cls, samples):
        return cls(*(torch.stack(each) for each in zip(*samples, strict=True)))


class Transferred(OwnNet):
    """Batches are dataclasses, and hooks make images of bytes, which they augment in training."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        pixels = batch.pixels.float() / 255
        return Batch(pixels.flip(3) if self.trainer.training else pixels, batch.classes)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)

    def loss(self, batch):
        return super().loss((batch.pixels, batch.classes))


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*samples(), strict=True)


def samples(count=12):
    """Images, and labels 0, 0, 0, 1, …"""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(count) // 3


def image_folder(folder):
    """Four images of each of three classes."""
    images = (255 * torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))).byte()
    for index, image in enumerate(images):
        path = folder / f"class{index // 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(image).save(path)
    return datasets.ImageFolder(folder, transforms.Compose([transforms.ToTensor(), NORMALIZE]))


NORMALIZE = transforms.Normalize([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


def own_net(folder):
    """A part of anonymous pairs: four of nine, evenly spaced."""
    part, _ = random_split(TensorDataset(*samples()), [9, 3], torch.Generator().manual_seed(0))
    module = OwnNet()
    return module, DataLoader(part, 4), module.net, torch.stack([part[index][0] for index in (0, 2, 4, 6)])


def hugging_face(folder):
    """Four of four labels, each the first."""
    module = HuggingFace()
    return module, DataLoader(Columns(), 4), module.model, samples()[0][[0, 3, 6, 9]]


def torchvision_folder(folder):
    """A part of an image folder: one of each class, then a second one of the first."""
    part = Subset(image_folder(folder / "images"), [11, 0, 1, 8, 4, 5])
    module = BackboneAndHead()
    return module, DataLoader(part, 4), module, torch.stack([part[index][0] for index in (1, 4, 0, 2)])


def dataclasses(folder):
    pixels, labels = samples()[0].sigmoid().mul(255).byte(), samples()[1]
    module = Transferred()
    loader = DataLoader(TensorDataset(pixels, labels), 4, collate_fn=Batch.of)
    return module, [loader, loader], module.net, pixels[[0, 3, 6, 9]].float() / 255


def streamed(folder):
    module = OwnNet()
    return module, DataLoader(Stream(), 5), module.net, samples()[0][:4]


SETTINGS = (own_net, hugging_face, torchvision_folder, dataclasses, streamed)
