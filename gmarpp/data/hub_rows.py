"""Rows of Hugging Face datasets as samples: downloaded ones by number, streamed ones in their order."""

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from gmarpp.data.dataset import Record, Sample, drawing_from
from gmarpp.data.decode import read_image, to_tensor
from gmarpp.data.module import DROPPED, Labels
from gmarpp.data.transforms import Transform


def class_number(names: Mapping[str, int] | None, value: Any, row: str) -> int:
    """Return the number of a row's class, by its name where there are names; -1 where the label is missing."""
    if value is None:
        return -1
    if names is None:
        if isinstance(value, int):
            return value
        raise ValueError(f"row {row} has the label {value!r}, expected a whole number")
    if value not in names:
        raise ValueError(
            f"row {row} has the label {value!r}, none of the {len(names)} classes: set classes to all of them"
        )
    return names[value]


def _record(image: Any, name: str, folders: Sequence[Path]) -> Record:
    """Decode a row's image: bytes, or a file below one of the folders; a data file is not to choose what is read."""
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, None)
    if content is not None:
        return Record(read_image(io.BytesIO(content), path or name), path or name)
    if path is None:
        raise ValueError(f"row {name} has no image")
    if path.rpartition("::")[2].startswith("hf://"):
        return Record(to_tensor(datasets.Image().decode_example(image)), path)
    if not any(Path(path).resolve().is_relative_to(folder) for folder in folders):
        raise ValueError(f"row {name} names {path}, which is outside of the data: store the images in the data files")
    return Record(read_image(path, path), path)


class HubRows:
    """Rows of a downloaded dataset as a source; see `gmarpp.data.dataset.Source`."""

    def __init__(self, data: Any, image_column: str, split: str, folders: Sequence[Path] = ()) -> None:
        self.data = data.select_columns([image_column])
        self.image_column = image_column
        self.split = split
        self.folders = folders

    def read(self, row: int) -> Record:
        """Reads and decodes one row."""
        return _record(self.data[row][self.image_column], f"{self.split}/{row}", self.folders)


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
        folders: where files may lie that rows name.
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
        folders: Sequence[Path] = (),
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
        self.folders = folders

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
            name = f"{self.split}/{index}"
            number = class_number(self.names, row[self.label_column], name)
            if not -1 <= number < len(self.numbers) - 1:
                raise ValueError(f"row {name} has the label {number}, expected -1 to {len(self.numbers) - 2}")
            label = int(self.numbers[number])
            if label != DROPPED:
                record = _record(row[self.image_column], name, self.folders)
                with drawing_from(hash((self.seed, turn, index))):
                    tensors = self.transform(record.image)
                yield {**tensors, "label": label, "index": index, "path": record.path}
