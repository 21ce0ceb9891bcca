"""A data module for the tests of training: flat colored squares, learned in a few steps without a file."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class ColouredSquares(Dataset):
    """Class c is bright in channel c; the rest is seeded noise."""

    def __init__(self, count, num_classes, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % num_classes
        self.images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
        for image, label in zip(self.images, self.labels, strict=True):
            image[label % 3] += 1.5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {
            "image": self.images[index],
            "label": self.labels[index],
            "index": index,
            "path": f"square{index:03}.png",
        }


class Squares(L.LightningDataModule):
    def __init__(self, batch_size: int = 8, count: int = 24, num_classes: int = 3, prefix: str = "class"):
        super().__init__()
        self.batch_size, self.count, self.num_classes = batch_size, count, num_classes
        self.classes = tuple(f"{prefix}{index}" for index in range(num_classes))
        self.class_names = tuple(f"Color {index}" for index in range(num_classes))

    def train_dataloader(self):
        return DataLoader(
            ColouredSquares(self.count, self.num_classes, seed=0),
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
        )

    def val_dataloader(self):
        return DataLoader(ColouredSquares(self.count - 1, self.num_classes, seed=1), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class OrderedSquares(Squares):
    """Without shuffling, so that runs on any number of processes see the same batches."""

    def train_dataloader(self):
        squares = ColouredSquares(self.count, self.num_classes, seed=0)
        # Lightning would put in a sampler that shuffles
        sampler = DistributedSampler(squares, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(squares, batch_size=self.batch_size, sampler=sampler)
