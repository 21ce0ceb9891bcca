"""Any Hugging Face dataset with an image and a label column: on the Hub, or local parquet files or image folders."""

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from gmarpp.data.hub_rows import HubRows, HubStream, class_number, damage
from gmarpp.data.module import ImageDataModule, Split
from gmarpp.data.names import readable_names
from gmarpp.data.numbering import Labels
from gmarpp.data.row_images import RowImages
from gmarpp.data.splits import split_names
from gmarpp.data.stream_loader import StreamLoader
from gmarpp.data.walk import files_below, require_regular_file
from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges

logger = logging.getLogger(__name__)


class HubDataset(ImageDataModule):
    """Images and labels read through `datasets`. The preset is Tiny-ImageNet on the Hub, which has no boxes.

    Classes are the names of the label column in their own order, or the sorted values of a text column's training and
    validation split. A row holds its image, or names a file below the data's own folder; other files are not read.

    Args:
        path: name on the Hub, a local folder, one that `save_to_disk` wrote, or a loader's name such as "parquet" with
            `data_files`. Here, in `data_files` and `cache_dir`, `~` and environment variables are expanded.
        name: configuration of the dataset.
        data_files: files by split, for a loader's name.
        revision: branch, tag or commit on the Hub.
        cache_dir: where `datasets` keeps its files; its own default if None.
        image_column: column of images.
        label_column: column of labels.
        train_split: what `fit` trains on; slices such as "train[:95%]" are understood, except when streaming.
        val_split: what `fit` and `validate` evaluate on; "valid", "val" and "validation" mean each other.
        test_split: what `test` evaluates on; `val_split` if None.
        predict_split: what `predict` explains; `val_split` if None.
        classes: the expected class ids, in order: checked against the label column's names, and needed if the column
            has only numbers, or streamed text.
        streaming: read while training instead of downloading first. Then epochs have no known length (set the
            trainer's max_steps), and training images are shuffled within `shuffle_buffer`. A run of one rank is resumed
            within an epoch, if num_workers, shuffle_buffer and seed are as they were: rows that it has seen are read
            again, but not decoded. On several ranks an epoch is started again, and only limit_train_batches ends it.
        shuffle_buffer: images held for shuffling a stream, per process, at least 1.
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
        require_ranges({"shuffle_buffer": shuffle_buffer}, {"shuffle_buffer": Range(1)}, "data: ")
        for option in ("images_per_class", "balanced") if streaming else ():
            if getattr(self, option):
                raise ValueError(f"{option} cannot be used with streamed data: set streaming to false")
        self.path = _expanded(path)
        self.data_files = {split: _expanded(file) for split, file in (data_files or {}).items()}
        self.load_options = {
            "name": name,
            "data_files": self.data_files or None,
            "revision": revision,
            "cache_dir": None if cache_dir is None else _expanded(cache_dir),
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
        """Download into the cache, unless streaming.

        Raises:
            OSError: the dataset does not exist, a folder of it cannot be read, or the Hub cannot be reached.
            ValueError: it has no such split, or `datasets` would leave out a linked folder or take results for data.
        """
        self._check_folder()
        if not self.streaming:
            self._load("val")

    def setup(self, stage: str) -> None:
        """See `ImageDataModule`; a local folder is checked as in `prepare_data`."""
        self._check_folder()
        super().setup(stage)

    def _check_folder(self) -> None:
        if Path(self.path).is_dir():
            files_below(Path(self.path), None, strict=True)

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the label column, as ids and for people."""
        from datasets import ClassLabel

        data = self._load("val")
        feature = data.features[self.label_column]
        if isinstance(feature, ClassLabel):
            classes = list(feature.names)
        elif self.expected_classes is not None:
            classes = self.expected_classes
        elif _is_text(feature) and not self.streaming:
            found = {*data.unique(self.label_column), *self._load("train").unique(self.label_column)}
            classes = sorted(name for name in found if name is not None)
        else:
            raise ValueError(f"column {self.label_column!r} of {self.path} does not name its classes: set classes")
        if self.expected_classes is not None and classes != self.expected_classes:
            differences = (k for k, (a, b) in enumerate(zip(classes, self.expected_classes, strict=False)) if a != b)
            place = next(differences, min(len(classes), len(self.expected_classes)))
            raise ValueError(
                f"classes of {self.path}: expected {len(self.expected_classes)}, number {place} being "
                f"{self.expected_classes[place : place + 1]}, got {len(classes)}, number {place} being "
                f"{classes[place : place + 1]}"
            )
        if classes != sorted(classes):
            logger.warning(
                "classes of %s are not sorted: folders of the same images would number them differently", self.path
            )
        return classes, readable_names(classes)

    def read_split(self, split: Split) -> tuple[HubRows, Labels]:
        """See `ImageDataModule`."""
        data = self._load(split)
        names = self._text_numbers() if _is_text(data.features[self.label_column]) else None
        values = data.select_columns([self.label_column])[:][self.label_column]
        numbers = [class_number(names, value, f"{self.splits[split]}/{row}") for row, value in enumerate(values)]
        if numbers and max(map(abs, numbers)) > np.iinfo(np.int64).max:
            raise ValueError(
                f"split {self.splits[split]!r}: expected class numbers, got the label {max(numbers, key=abs)}"
            )
        labels = np.array(numbers, dtype=np.int64)
        return HubRows(data, self.image_column, self.splits[split], self._images(data)), labels

    def open_split(self, split: Split) -> Dataset[Any]:
        """Return a map-style dataset, or an iterable one when streaming."""
        if not self.streaming:
            return super().open_split(split)
        stream = self._load(split)
        return HubStream(
            stream,
            self.image_column,
            self.label_column,
            self.splits[split],
            self.numbering.numbers,
            self.transform(split),
            self.order_seed,
            rank=self._rank,
            world_size=self.world_size,
            epoch=0 if split == "train" else None,
            shuffle_buffer=self.shuffle_buffer,
            images=self._images(stream),
            origin=self._origin,
            names=self._text_numbers() if _is_text(stream.features[self.label_column]) else None,
            skips=self.on_error == "skip",
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
        # A stream counts its epochs in the loader's processes, so these must persist.
        options["persistent_workers"] = options["num_workers"] > 0
        return StreamLoader(
            self.datasets["train"],
            batch_size=self.batch_size,
            drop_last=True,
            current_epoch=lambda: 0 if trainer is None else int(trainer.current_epoch),
            progress=None if trainer is None else trainer.fit_loop.epoch_loop.batch_progress,
            **options,
        )

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        if not self.streaming:
            return super()._evaluation_loader(name)
        options = self._process_options()
        # With several processes, `datasets` would divide the files among them, and rows would lose their numbers.
        options["num_workers"] = min(1, options["num_workers"])
        return DataLoader(self.datasets[name], batch_size=self.batch_size, **options)

    def _load(self, split: Split) -> Any:
        """Load the dataset of a split, with images left encoded."""
        import datasets

        options = {name: value for name, value in self.load_options.items() if value is not None}
        try:
            for file in map(Path, self.data_files.values()):
                if file.exists():
                    require_regular_file(file)
            data = self._open_split(self.splits[split], options)
            for column in (self.image_column, self.label_column):
                if column not in (data.features or ()):
                    raise ValueError(
                        f"{self.path!r}: unknown column {column!r}: choose from {', '.join(data.features or ())}"
                    )
            return data.cast_column(self.image_column, datasets.Image(decode=False))
        except OSError as error:
            raise OSError(f"dataset {self._origin} cannot be loaded: {error}") from error
        except damage() as error:
            raise ValueError(
                f"split {self.splits[split]!r} of {self._origin} cannot be loaded: {error.__cause__ or error}"
            ) from error

    def _open_split(self, asked: str, options: dict[str, Any]) -> Any:
        """Return a split by its name, or by another usual one of it (`valid`, `validation`)."""
        import datasets

        if (Path(self.path) / "dataset_dict.json").is_file() or (Path(self.path) / "state.json").is_file():
            return self._saved_split(asked)
        names = split_names(asked)
        for name in names:
            try:
                return datasets.load_dataset(self.path, split=name, streaming=self.streaming, **options)
            except ValueError as error:  # noqa: PERF203, there are few
                if not re.search("(Unknown|Bad) split", str(error)) or name == names[-1]:
                    raise
        raise AssertionError(names)

    def _saved_split(self, asked: str) -> Any:
        """Return a split of what `save_to_disk` of `datasets` has written."""
        import datasets

        saved = datasets.load_from_disk(self.path)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        name = next((name for name in split_names(asked) if name in splits), None)
        if name is None:
            raise ValueError(f"unknown split {asked!r}: choose from {', '.join(splits)}")
        return splits[name].to_iterable_dataset() if self.streaming else splits[name]

    @property
    def _origin(self) -> str:
        return f"{self.path!r} ({', '.join(self.data_files.values())})" if self.data_files else repr(self.path)

    def _images(self, data: Any) -> RowImages:
        """Return a reader of images that accepts only the data's own locations."""
        import datasets
        import huggingface_hub

        listed = data.info.builder_name == "imagefolder"
        local = Path(self.path).is_dir()
        roots = [self.path] if local else []
        if listed:
            roots += [_folder_of(file) for file in self.data_files.values()]
        if not local and not self.data_files:
            roots += [f"hf://datasets/{self.path}@", f"hf://datasets/{self.path}/"]
        if listed or not (local or self.data_files):
            caches = [self.load_options["cache_dir"], datasets.config.HF_DATASETS_CACHE]
            caches += [datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH]
            roots += [str(cache) for cache in (*caches, huggingface_hub.constants.HF_HUB_CACHE) if cache is not None]
        return RowImages(roots, listed)

    def _text_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.read_classes()[0])}


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _expanded(path: str) -> str:
    """Expand a path with `~` or variables; leave other names, which `datasets` distinguishes from folders."""
    return str(expand_path(path)) if path.startswith("~") or "$" in path else path


def _folder_of(file: str) -> str:
    """Return the folder, or the beginning of the addresses, of data files."""
    if "://" in file:
        return file.rpartition("/")[0] + "/"
    folder = Path(file).absolute().parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return str(folder)
