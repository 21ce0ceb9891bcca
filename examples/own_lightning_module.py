"""Watch the explanations of a LightningModule of one's own, trained on pictures in a folder for each class.

    python examples/own_lightning_module.py FOLDER

Maps and metrics of every validation go to lightning_logs: `tensorboard --logdir lightning_logs` shows them. The last
checkpoint there is explained from the command line, with nothing of this file changed:

    python explain.py predict --data ImageFolder --data.root FOLDER --ckpt_path LAST.ckpt
        --model examples.own_lightning_module.Classifier
"""

import sys
from pathlib import Path

import lightning as L
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

from gmarpp.callbacks import AttributionMonitor


class Classifier(L.LightningModule):
    """A small Vision Transformer, in `net`, that learns from pairs of images and labels."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.create_model("vit_tiny_patch16_224", num_classes=classes)  # pretrained=True downloads weights

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:  # noqa: D102
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:  # noqa: D102
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    module = Classifier(classes=len(list(folder.iterdir())))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module.net))
    train, val = random_split(ImageFolder(folder, transform), [0.8, 0.2])
    trainer = L.Trainer(max_epochs=1, callbacks=[AttributionMonitor(images=16)])
    trainer.fit(module, DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=16))
    print(trainer.callback_metrics["attribution/gmarpp_l1/insertion_auc"])
