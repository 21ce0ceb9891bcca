"""Any Hugging Face dataset with an image and a label column: on the Hub, or local parquet files or image folders."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from gmarpp.data.dataset import Record, Sample, drawing_from
from gmarpp.data.decode import read_image, to_tensor
from gmarpp.data.module import DROPPED, ImageDataModule, Labels, Split
from gmarpp.data.names import readable_names
from gmarpp.data.transforms import Transform

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
        self.path = path
        self.load_options = {"name": name, "data_files": data_files, "revision": revision, "cache_dir": cache_dir}
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
        values = data.select_columns([self.label_column]).with_format("numpy")[:][self.label_column]
        if _is_text(data.features[self.label_column]):
            names = self._text_numbers()
            values = np.array([_class_number(names, value, self.splits[split]) for value in values.tolist()])
        return HubRows(data, self.image_column, self.splits[split]), values.astype(np.int64)

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

    def _text_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.read_classes()[0])}


class HubRows:
    """Rows of a downloaded dataset as a source; see `gmarpp.data.dataset.Source`."""

    def __init__(self, data: Any, image_column: str, split: str) -> None:
        self.data = data.select_columns([image_column])
        self.image_column = image_column
        self.split = split

    def read(self, row: int) -> Record:
        """Reads and decodes one row."""
        return _record(self.data[row][self.image_column], f"{self.split}/{row}")


class HubStream(IterableDataset[Sample]):
    """Samples of a streamed dataset.

    For evaluation each rank takes its own rows of the same stream, so that "index" is the row's number. For training
    the stream's files are shared among ranks and processes, and "index" only tells samples of a pass apart. Of several
    ranks none must be the first to run out of images: there the training stream repeats, shuffled anew, without end.

    Args:
        stream: the streamed dataset.
        image_column: column of images.
        label_column: column of labels.
        split: name of the split, for the samples' paths.
        numbers: label of each of the data's class numbers.
        transform: from decoded sample to tensors.
        seed: of the order and of the transform's random numbers.
        rank: this rank.
        world_size: number of ranks.
        epoch: the epoch of the first pass when training, None for evaluation.
        shuffle_buffer: images held for shuffling when training.
        names: class numbers by label, where labels are text.
    """

    def __init__(
        self,
        stream: Any,
        image_column: str,
        label_column: str,
        split: str,
        numbers: Labels,
        transform: Transform,
        seed: int,
        rank: int,
        world_size: int,
        epoch: int | None,
        shuffle_buffer: int,
        names: Mapping[str, int] | None = None,
    ) -> None:
        self.stream = stream
        self.image_column, self.label_column = image_column, label_column
        self.split = split
        self.numbers = numbers
        self.transform = transform
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch = epoch
        self.shuffle_buffer = shuffle_buffer
        self.names = names

    def __iter__(self) -> Iterator[Sample]:
        """Yields this process's samples of an epoch."""
        if self.epoch is None:
            rows = ((k, row) for k, row in enumerate(self.stream) if k % self.world_size == self.rank)
            yield from self._samples(rows, 0)
            return
        worker = get_worker_info()
        share, shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share, shares = self.rank * shares + share, self.world_size * shares
        epoch, self.epoch = self.epoch, self.epoch + 1
        for turn in count():
            # A seed for each pass: set_epoch is a race between the loader's processes, which share what it adds to.
            seed = hash((self.seed, epoch, turn)) & 0xFFFFFFFF
            stream = self.stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            if self.world_size > 1:
                stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size)
            found = False
            for sample in self._samples(((k * shares + share, row) for k, row in enumerate(stream)), seed):
                found = True
                yield sample
            # without a file of its own a process would search for images forever
            if self.world_size == 1 or not found:
                return

    def _samples(self, rows: Iterator[tuple[int, Any]], turn: int) -> Iterator[Sample]:
        for index, row in rows:
            value = row[self.label_column]
            number = value if self.names is None else _class_number(self.names, value, self.split)
            label = int(self.numbers[number])
            if label != DROPPED:
                record = _record(row[self.image_column], f"{self.split}/{index}")
                with drawing_from(hash((self.seed, turn, index))):
                    tensors = self.transform(record.image)
                yield {**tensors, "label": label, "index": index, "path": record.path}


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _class_number(names: Mapping[str, int], value: str, split: str) -> int:
    if value not in names:
        raise ValueError(
            f"label {value!r} of split {split!r} is not one of the {len(names)} classes: set classes to all of them"
        )
    return names[value]


def _record(image: dict[str, Any], name: str) -> Record:
    """Decodes a row's image: bytes, a file, or a remote path that `datasets` opens."""
    content, path = image["bytes"], image["path"]
    if content is None and "://" in path:
        return Record(to_tensor(datasets.Image().decode_example(image)), path)
    return Record(read_image(path if content is None else io.BytesIO(content), path or name), path or name)
