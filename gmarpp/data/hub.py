"""Any Hugging Face dataset with an image and a label column: on the Hub, or local parquet files or image folders."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader, Dataset

from gmarpp.data.hub_rows import HubRows, HubStream, class_number
from gmarpp.data.module import ImageDataModule, Labels, Split
from gmarpp.data.names import readable_names
from gmarpp.data.walk import linked_folder
from gmarpp.storage import expand_path

logger = logging.getLogger(__name__)


class HubDataset(ImageDataModule):
    """Images and labels read through `datasets`. The preset is Tiny-ImageNet on the Hub, which has no boxes.

    Classes are the names of the label column in their own order, or the sorted values of a text column's training and
    validation split.

    Args:
        path: name on the Hub, a local folder, or a loader's name such as "parquet" with `data_files`.
        name: configuration of the dataset.
        data_files: files by split, for a loader's name.
        revision: branch, tag or commit on the Hub.
        cache_dir: where `datasets` keeps its files; its own default if None.
        image_column: column of images.
        label_column: column of labels.
        train_split: what `fit` trains on; slices such as "train[:95%]" are understood, except when streaming.
        val_split: what `fit` and `validate` evaluate on.
        test_split: what `test` evaluates on; `val_split` if None.
        predict_split: what `predict` explains; `val_split` if None.
        classes: the class ids expected, in order: checked against the label column's names, needed where it has only
            numbers, or streamed text.
        streaming: read while training instead of downloading first. Then epochs have no known length (give the
            trainer max_steps), training images are shuffled within `shuffle_buffer`, and a resumed run begins with
            the order of the first epoch again. On several ranks an epoch ends with limit_train_batches alone.
        shuffle_buffer: images held for shuffling a stream, per process.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        path: str = "zh-plus/tiny-imagenet",
        name: str | None = None,
        data_files: dict[str, str] | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str = "valid",
        test_split: str | None = None,
        predict_split: str | None = None,
        classes: list[str] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if streaming and self.images_per_class is not None:
            raise ValueError("images_per_class needs the whole data at hand: set streaming to false")
        if shuffle_buffer < 1:
            raise ValueError(f"data: shuffle_buffer must be at least 1, got {shuffle_buffer}")
        self.path = _local(path)
        data_files = None if data_files is None else {split: _local(files) for split, files in data_files.items()}
        cache_dir = None if cache_dir is None else _local(cache_dir)
        self.load_options: dict[str, Any] = {
            "name": name,
            "data_files": data_files,
            "revision": revision,
            "cache_dir": cache_dir,
        }
        self.image_column = image_column
        self.label_column = label_column
        self.splits: dict[Split, str] = {
            "train": train_split,
            "selection": val_split,
            "val": val_split,
            "test": test_split or val_split,
            "predict": predict_split or val_split,
        }
        self.expected_classes = classes
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer

    @property
    def options(self) -> dict[str, Any]:
        """See `ImageDataModule`."""
        splits = {f"{split}_split": self.splits[split] for split in ("train", "val", "test", "predict")}
        return {**super().options, **self.load_options, **splits, "classes": self.expected_classes}

    def prepare_data(self) -> None:
        """Downloads into the cache, unless streaming.

        Raises:
            OSError: the dataset is not there, or the Hub cannot be reached.
            ValueError: it has no such split.
        """
        if not self.streaming:
            self._load("val")

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the label column, as ids, and as people read them."""
        data = self._load("val")
        feature = data.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            classes = list(feature.names)
        elif self.expected_classes is not None:
            classes = self.expected_classes
        elif _is_text(feature) and not self.streaming:
            classes = sorted(set(data.unique(self.label_column)) | set(self._load("train").unique(self.label_column)))
        else:
            raise ValueError(f"column {self.label_column!r} of {self.path} does not name its classes: set classes")
        if self.expected_classes is not None and classes != self.expected_classes:
            differences = (k for k, (a, b) in enumerate(zip(classes, self.expected_classes, strict=False)) if a != b)
            place = next(differences, min(len(classes), len(self.expected_classes)))
            raise ValueError(
                f"{self.path} has other classes than expected, or in another order: {len(classes)} and "
                f"{len(self.expected_classes)} of them, number {place} is {classes[place : place + 1]} and should be "
                f"{self.expected_classes[place : place + 1]}"
            )
        if classes != sorted(classes):
            logger.warning("classes of %s are not sorted: folders of the same images number them otherwise", self.path)
        return classes, readable_names(classes)

    def read_split(self, split: Split) -> tuple["HubRows", Labels]:
        """See `ImageDataModule`."""
        data = self._load(split)
        names = self._text_numbers() if _is_text(data.features[self.label_column]) else None
        values = data.select_columns([self.label_column])[:][self.label_column]
        numbers = [class_number(names, value, f"{self.splits[split]}/{row}") for row, value in enumerate(values)]
        source = HubRows(data, self.image_column, self.splits[split], self._folders())
        return source, np.array(numbers, dtype=np.int64)

    def open_split(self, split: Split) -> Dataset[Any]:
        """A map-style dataset, or an iterable one when streaming."""
        if not self.streaming:
            return super().open_split(split)
        stream = self._load(split)
        return HubStream(
            stream,
            self.image_column,
            self.label_column,
            self.splits[split],
            self._numbers,
            self.transform(split),
            self.order_seed,
            rank=self._rank,
            world_size=self.world_size,
            epoch=None if split != "train" else 0 if self.trainer is None else self.trainer.current_epoch,
            shuffle_buffer=self.shuffle_buffer,
            names=self._text_numbers() if _is_text(stream.features[self.label_column]) else None,
            folders=self._folders(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """See `ImageDataModule`; a stream is shuffled in its buffer."""
        if not self.streaming:
            return super().train_dataloader()
        trainer: Any = self.trainer
        if self.world_size > 1 and not isinstance(trainer.limit_train_batches, int) and trainer.max_steps < 0:
            raise ValueError(
                f"streamed training data has no end on {self.world_size} ranks, whose shares may differ: set "
                "--trainer.max_steps, or --trainer.limit_train_batches to a number of batches"
            )
        options = self._process_options()
        # a stream counts its epochs within the loader's processes
        options["persistent_workers"] = options["num_workers"] > 0
        return DataLoader(self.datasets["train"], batch_size=self.batch_size, drop_last=True, **options)

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        if not self.streaming:
            return super()._evaluation_loader(name)
        options = self._process_options()
        # `datasets` would share the files among several processes, and no row would know its number
        options["num_workers"] = min(1, options["num_workers"])
        return DataLoader(self.datasets[name], batch_size=self.batch_size, **options)

    def _load(self, split: Split) -> Any:
        """The dataset of a split, images left encoded."""
        if Path(self.path).is_dir() and (linked := linked_folder(Path(self.path))) is not None:
            raise ValueError(
                f"{linked} is a linked folder, which `datasets` leaves out: use --data ImageFolder, or move it"
            )
        options = {name: value for name, value in self.load_options.items() if value is not None}
        try:
            data = datasets.load_dataset(self.path, split=self.splits[split], streaming=self.streaming, **options)
        except OSError as error:
            raise OSError(f"dataset {self.path!r} cannot be loaded: {error}") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"split {self.splits[split]!r} of {self.path!r} cannot be loaded: {error}") from error
        for column in (self.image_column, self.label_column):
            if column not in data.features:
                raise ValueError(f"{self.path!r} has no column {column!r}; it has {', '.join(data.features)}")
        return data.cast_column(self.image_column, datasets.Image(decode=False))

    def _folders(self) -> tuple[Path, ...]:
        """Return where files may lie that rows name: the data set's own folder, and what `datasets` downloaded."""
        folders = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, self.load_options["cache_dir"]]
        if Path(self.path).is_dir():
            folders.append(self.path)
        elif self.path == "imagefolder":
            folders += [_beginning(files) for files in (self.load_options["data_files"] or {}).values()]
        return tuple(Path(folder).resolve() for folder in folders if folder is not None)

    def _text_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.read_classes()[0])}


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _local(path: str) -> str:
    """Return a path with `~` and variables expanded; names on the Hub and addresses have neither."""
    return str(expand_path(path)) if path.startswith("~") or "$" in path else path


def _beginning(pattern: str) -> Path:
    """Return the folder of a file, or the part of a pattern before its first wildcard."""
    fixed = re.split(r"[*?\[{]", pattern)[0]
    return Path(fixed) if fixed.endswith("/") else Path(fixed).parent
