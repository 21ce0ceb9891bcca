"""Batches that somebody else chooses, loaded by any data module in its own way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from gmarpp.data.batches import ChooseBatches, batch_loader
from gmarpp.data.module import ImageDataModule


@contextmanager
def chosen_batches(data: L.LightningDataModule, choose: ChooseBatches) -> Iterator[None]:
    """Have a data module's `predict_dataloader` load chosen batches in this context.

    An `ImageDataModule` has `predict_batches` for it. Any other module, and one whose class has a `predict_dataloader`
    of its own, need not know about it: whatever it returns is handed to `choose`, and the chosen batches are loaded
    from its data set in its way.
    """
    module: Any = data
    name: str = "predict_batches"
    value: Any = choose
    if getattr(type(data), "predict_dataloader", None) is not ImageDataModule.predict_dataloader:
        loader_of_all = module.predict_dataloader

        def predict_dataloader() -> DataLoader[Any]:
            loader = loader_of_all()
            return batch_loader(loader, choose(loader))

        name, value = "predict_dataloader", predict_dataloader
    own = name in vars(module)
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own:
            setattr(module, name, before)
        else:
            delattr(module, name)
