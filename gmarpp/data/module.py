"""Base of the data modules: preprocessing, numbering of classes, loaders."""

import inspect
import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, get_args

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gmarpp.data.batches import BATCH_SIZE, ChooseBatches, batch_loader, predict_batch_size
from gmarpp.data.dataset import ImageDataset, Source, Unreadable, collate_readable
from gmarpp.data.loader import (
    EpochSampler,
    ResumableLoader,
    UnrepeatedSampler,
    balancing_weights,
    equal_batch_count,
    prepare_worker,
)
from gmarpp.data.numbering import Labels, Numbering
from gmarpp.data.transforms import Augmentation, EvaluationTransform, TrainingTransform, Transform
from gmarpp.network.preprocessing import Preprocessing
from gmarpp.network.task import task_of
from gmarpp.options import Range, require_ranges
from gmarpp.processes import usable_cores

# "selection" is what `fit` validates on, "val" what `validate` reports.
Split: TypeAlias = Literal["train", "selection", "val", "test", "predict"]
OnError: TypeAlias = Literal["raise", "skip"]
STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "selection"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
DEFAULT_AUGMENTATION = Augmentation()
SEEDS = Range(0, 2**32 - 1)
_RANGES = {
    "batch_size": Range(1),
    "num_workers": Range(0, 1024),
    "images_per_class": Range(1),
    "seed": SEEDS,
    "only_classes": Range(1),
}


def _require_options(options: Mapping[str, Any]) -> None:
    """Check the options of an `ImageDataModule`.

    Raises:
        ValueError: one is out of range, or unknown; naming it.
    """
    only_classes, on_error = options["only_classes"], options["on_error"]
    counted = only_classes if isinstance(only_classes, int) else None
    require_ranges({**options, "only_classes": counted}, _RANGES, "data: ")
    if on_error not in get_args(OnError):
        raise ValueError(f"data: on_error: unknown way {on_error!r}: choose from {', '.join(get_args(OnError))}")
    if only_classes == []:
        raise ValueError("only_classes: expected at least one class, got none")


class ImageDataModule(L.LightningDataModule):
    """Images with labels as batches: "image", "label", "index", "path", and "box" or "mask" where there are any.

    Labels follow the network's own classes where it knows them, whatever the data's order is; otherwise the data's
    (sorted ids). Subclasses say what there is to read; `prepare_data` makes it available, `setup` only opens it.

    Args:
        batch_size: images per batch and rank, at least 1; None takes 32, and to explain on a GPU as many as suit it.
        num_workers: loader processes per rank; 0 loads in its own; None takes its share of the node's CPUs, up to 8.
        pin_memory: stage batches in page-locked memory, where there is an accelerator to copy them to.
        persistent_workers: keep loader processes over epochs.
        preprocessing: what the network expects; None takes `preprocessing` from the trainer's LightningModule.
        augmentation: random changes of training images.
        only_classes: how many classes, the first ones, or a list of class ids; None keeps all.
        images_per_class: upper limit of training images per class, at least 1; None keeps all.
        balanced: draw training images of all classes equally often: those of rare ones several times in an epoch.
        on_error: "raise", or "skip" images that cannot be read: they are logged, `predict` leaves them out, evaluation
            does not count them, and in training the next image takes their place.
        seed: of the order and augmentation of training images, 0 to 2**32 - 1; None takes `seed_everything`'s.

    Attributes:
        classes: class ids in the order of the labels, after `setup`; empty when the images are unlabeled. For a network
            with one output, the latter of two classes, whose absence is the other.
        class_names: the same for people.
        preprocessing: the one in use, after `setup`.
        predict_batch_size: images explained at a time, after `setup`.
        predict_batches: chooses the batches of `predict_dataloader`; None for all images in their order.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        num_workers: int | None = None,
        pin_memory: bool = True,
        persistent_workers: bool = True,
        preprocessing: Preprocessing | None = None,
        augmentation: Augmentation = DEFAULT_AUGMENTATION,
        only_classes: int | list[str] | None = None,
        images_per_class: int | None = None,
        balanced: bool = False,
        on_error: OnError = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = BATCH_SIZE if batch_size is None else batch_size
        self.predict_batch_size = self.batch_size
        self._follows_device = batch_size is None
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.preprocessing = preprocessing
        self._follows_network = preprocessing is None
        self.augmentation = augmentation
        self.only_classes = only_classes
        self.images_per_class = images_per_class
        self.balanced = balanced
        self.on_error = on_error
        self.seed = seed
        _require_options(vars(self))
        self.classes: tuple[str, ...] = ()
        self.class_names: tuple[str, ...] = ()
        self.numbering = Numbering((), (), np.array([-1]))
        self.datasets: dict[str, Any] = {}
        self.predict_batches: ChooseBatches | None = None

    @abstractmethod
    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the ids of all classes in the order that `read_split` numbers them, and their names for people."""

    @abstractmethod
    def read_split(self, split: Split) -> tuple[Source, Labels]:
        """Return where a split's samples are read from, and their labels: -1 where unknown."""

    def setup(self, stage: str) -> None:
        """Open the splits of a stage ("fit", "validate", "test" or "predict").

        Raises:
            ValueError: a class is unknown to the data or the network or has no training image, a label is none of a
                class, the preprocessing is unknown, a split is empty or has fewer images than there are ranks.
        """
        if self._follows_network:
            self.preprocessing = getattr(self._network, "preprocessing", self.preprocessing)
        if self.preprocessing is None:
            example = "{size: [224, 224], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
            raise ValueError(f"{type(self).__name__} needs preprocessing=..., as --data.preprocessing '{example}'")
        self._number_classes(*self.read_classes())
        for split in STAGES[stage]:
            dataset = self.open_split(split)
            if isinstance(dataset, ImageDataset):
                self._check_size(split, len(dataset))
                if split == "train":
                    self.numbering.require_examples(dataset.labels, type(self).__name__)
            self.datasets["val" if split == "selection" else split] = dataset
        if stage == "predict":
            self.predict_batch_size = self._suitable_batch_size() if self._follows_device else self.batch_size

    def open_split(self, split: Split) -> Dataset[Any]:
        """Open one split, restricted to the chosen classes and number of images."""
        source, labels = self.read_split(split)
        self.numbering.require_labels(split, labels, type(self).__name__)
        labels, rows = self.numbering.apply(labels)
        if split == "train" and self.images_per_class is not None:
            if labels.ndim == 2:
                raise ValueError("images_per_class: expected one class per image: leave it out")
            rows = np.sort(
                [row for k in np.unique(labels[rows]) for row in rows[labels[rows] == k][: self.images_per_class]]
            )
        if split == "selection":
            # A monitor that looks at the first images sees many classes, also where the data is sorted by class.
            rows = np.random.default_rng(0).permutation(rows)
        return ImageDataset(source, labels, self.transform(split), self.order_seed, rows, self._unreadable(split))

    def _unreadable(self, split: Split) -> Unreadable:
        if self.on_error == "raise":
            return "raise"
        return "replace" if split == "train" else "drop" if split == "predict" else "unlabel"

    def transform(self, split: Split) -> Transform:
        """Return what turns decoded images of a split into tensors."""
        assert self.preprocessing is not None, "setup has not run"
        if split == "train":
            return TrainingTransform(self.preprocessing, self.augmentation)
        return EvaluationTransform(self.preprocessing)

    @property
    def options(self) -> dict[str, Any]:
        """The options it was made with, by their names in the constructors of its class and of the base classes."""
        names = {name for base in type(self).__mro__ for name in inspect.signature(base).parameters}
        return {name: value for name, value in vars(self).items() if name in names}

    @property
    def order_seed(self) -> int:
        """Seed of the order and augmentation of training images."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled, augmented batches, resumable within an epoch, without an incomplete one where possible."""
        dataset = self.datasets["train"]
        weights = balancing_weights(dataset.labels) if self.balanced else None
        sampler = EpochSampler(dataset, self.world_size, self._rank, self.order_seed, weights)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # Mixup pairs images within a batch: an odd last batch would break it.
            drop_last=len(sampler) >= self.batch_size,
            progress=None if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress,
            **self._process_options(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the selection split in `fit`, and in `validate` the split that is reported."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the split that is reported."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to explain, in the batches that `predict_batches` chooses when the loader is asked for."""
        loader = self._evaluation_loader("predict")
        return loader if self.predict_batches is None else batch_loader(loader, self.predict_batches(loader))

    @property
    def world_size(self) -> int:
        """Number of ranks that share the data."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _network(self) -> L.LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        dataset = self.datasets[name]
        sampler = UnrepeatedSampler(dataset, self.world_size, self._rank)
        batch_size = self.predict_batch_size
        if name != "predict":
            batch_size = equal_batch_count(len(dataset), self.world_size, self.batch_size)
        options = self._process_options()
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate_readable, **options)

    def _process_options(self) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            ranks = 1 if self.trainer is None else self.trainer.num_devices
            workers = min(8, usable_cores(ranks))
        return {
            "num_workers": workers,
            "worker_init_fn": prepare_worker,
            "pin_memory": self.pin_memory and torch.accelerator.is_available(),
            "persistent_workers": self.persistent_workers and workers > 0,
            # The loader's own draws leave the global generator alone: they would differ after a resume.
            "generator": torch.Generator().manual_seed(self.order_seed),
        }

    def _number_classes(self, ids: Sequence[str], names: Sequence[str]) -> None:
        """Set the classes, and the table from the data's own numbers to labels."""
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise ValueError(f"{type(self).__name__} has class {twice[0]!r} twice: expected every class once")
        kept = self._chosen(ids)
        known = tuple(getattr(self._network, "classes", ()) or ())
        if len(kept) == len(ids) == 2 and task_of(getattr(self._network, "model", None)) == "binary":
            self.numbering = Numbering.of_one_label(ids, names, known)
        elif ids and known:
            unknown = [name for name in kept if name not in known]
            if unknown:
                raise ValueError(
                    f"the network does not know class {unknown[0]!r} of the data ({len(unknown)} of {len(kept)} are "
                    f"unknown to it; its first is {known[0]!r}): use the data it was trained on, or only_classes"
                )
            known_names = tuple(getattr(self._network, "class_names", ()) or known)
            self.numbering = Numbering.of(ids, kept, known, known_names)
        else:
            chosen = set(kept)
            kept_names = tuple(name for label, name in zip(ids, names, strict=True) if label in chosen)
            self.numbering = Numbering.of(ids, kept, tuple(kept), kept_names)
        self.classes, self.class_names = self.numbering.classes, self.numbering.class_names
        if not known:
            self._check_outputs()

    def _chosen(self, ids: Sequence[str]) -> list[str]:
        if self.only_classes is None:
            return list(ids)
        if isinstance(self.only_classes, int):
            if self.only_classes > len(ids):
                raise ValueError(f"only_classes={self.only_classes}, but the data has {len(ids)} classes")
            return list(ids[: self.only_classes])
        for name in self.only_classes:
            if name not in ids:
                close = get_close_matches(name, ids, n=1, cutoff=0) or ["none"]
                raise ValueError(
                    f"only_classes: the data has no class {name!r}; the closest of its ids is {close[0]!r}"
                )
        return [name for name in ids if name in set(self.only_classes)]

    def _suitable_batch_size(self) -> int:
        """Return how many images the device explains at a time, the same on all ranks."""
        assert self.preprocessing is not None
        strategy = None if self.trainer is None else self.trainer.strategy
        if strategy is None or strategy.root_device.type != "cuda":
            return self.batch_size
        memory = torch.cuda.get_device_properties(strategy.root_device).total_memory
        size: int = strategy.broadcast(predict_batch_size(3 * math.prod(self.preprocessing.size), memory))
        return size

    def _check_outputs(self) -> None:
        outputs = getattr(getattr(self._network, "model", None), "num_classes", None)
        if self.classes and outputs is not None and outputs != len(self.classes):
            raise ValueError(
                f"the data has {len(self.classes)} classes, but the network has {outputs} outputs: set its num_classes "
                f"to {len(self.classes)}, or use the data it was trained on"
            )

    def _check_size(self, split: Split, images: int) -> None:
        if images == 0:
            raise ValueError(f"{type(self).__name__} found no image for {split}")
        if images < self.world_size:
            raise ValueError(
                f"{type(self).__name__} has {images} images for {split}, fewer than the {self.world_size} ranks: "
                "use fewer devices, or more images"
            )
