"""Rows of Hugging Face datasets as samples: downloaded ones by number, streamed ones in their order."""

import logging
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from gmarpp.data.dataset import Record, Sample, drawing_from
from gmarpp.data.numbering import DROPPED, Labels
from gmarpp.data.row_images import RowImages
from gmarpp.data.transforms import Transform

logger = logging.getLogger(__name__)


def damage() -> tuple[type[Exception], ...]:
    """Return what `datasets` and its readers raise on damaged files."""
    # Imported where they are needed, here and below: runs with other data need not wait for a second.
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError

    builtin = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, MemoryError)
    return (OSError, *builtin, pa.ArrowException, DatasetsError)


def class_number(names: Mapping[str, int] | None, value: Any, row: str) -> int:
    """Return the number of a row's class, by its name where there are names; -1 where the label is missing.

    Raises:
        ValueError: the label is neither a number nor one of the names.
    """
    if value is None:
        return -1
    if names is None:
        if isinstance(value, int):
            return value
        raise ValueError(f"row {row}: expected a whole number as label, got {value!r}")
    if value not in names:
        raise ValueError(
            f"row {row}: expected one of {len(names)} classes as label, got {value!r}: set classes to all of them"
        )
    return names[value]


class HubRows:
    """Rows of a downloaded dataset as a source; see `gmarpp.data.dataset.Source`."""

    def __init__(self, data: Any, image_column: str, split: str, images: RowImages) -> None:
        self.data = data.select_columns([image_column])
        self.image_column = image_column
        self.split = split
        self.images = images

    def read(self, row: int) -> Record:
        """Read and decode one row."""
        return self.images.read(self.data[row][self.image_column], f"{self.split}/{row}")


class HubStream(IterableDataset[Sample]):
    """Samples of a streamed dataset.

    For evaluation each rank takes its own rows of the same stream, so that "index" is the row's number. For training
    the stream's files are shared among ranks and processes, and "index" only distinguishes the samples of a pass. On
    several ranks the training stream repeats endlessly, reshuffled, because no rank may run out of images first.

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
        images: reads the images of rows.
        origin: name of the data set in messages.
        names: class numbers by label, where labels are text.
        skips: log images that cannot be read, and go on.

    Attributes:
        rows_behind: rows that each process leaves out at the beginning of the next pass; none if empty.
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
        images: RowImages,
        origin: str,
        names: Mapping[str, int] | None = None,
        skips: bool = False,
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
        self.images = images
        self.origin = origin
        self.names = names
        self.skips = skips
        self.rows_behind: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Sample]:
        """Yield this process's samples of an epoch."""
        if self.epoch is None:
            rows = ((k, row) for k, row in enumerate(self.stream) if k % self.world_size == self.rank)
            yield from self._samples(rows, 0)
            return
        worker = get_worker_info()
        share, shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        behind, self.rows_behind = (self.rows_behind[share] if self.rows_behind else 0), ()
        share, shares = self.rank * shares + share, self.world_size * shares
        epoch, self.epoch = self.epoch, self.epoch + 1
        for turn in count():
            # Each pass has its own seed: the loader's processes share the state of set_epoch, which would be a race.
            seed = hash((self.seed, epoch, turn)) & 0xFFFFFFFF
            stream = self.stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            if self.world_size > 1:
                from datasets.distributed import split_dataset_by_node

                stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size)
            found = False
            rows = ((k * shares + share, row) for k, row in islice(enumerate(stream), behind, None))
            for sample in self._samples(rows, seed):
                found = True
                yield sample
            # A process without any file would search for images forever.
            if self.world_size == 1 or not found:
                return

    def _samples(self, rows: Iterator[tuple[int, Any]], turn: int) -> Iterator[Sample]:
        while True:
            try:
                index, row = next(rows)
            except StopIteration:
                return
            except damage() as error:
                raise ValueError(
                    f"split {self.split!r} of {self.origin} cannot be read any further: {error}"
                ) from error
            name = f"{self.split}/{index}"
            label = self._label(class_number(self.names, row[self.label_column], name), name)
            if label != DROPPED:
                try:
                    record = self.images.read(row[self.image_column], name)
                except (FileNotFoundError, ValueError) as error:
                    if not self.skips:
                        raise
                    logger.warning("skipped: %s", error)
                    continue
                with drawing_from(hash((self.seed, turn, index))):
                    tensors = self.transform(record.image)
                yield {**tensors, "label": label, "index": index, "path": record.path}

    def _label(self, number: int, row: str) -> int:
        classes = len(self.numbers) - 1
        if not -1 <= number < classes:
            raise ValueError(
                f"row {row}: expected a label of 0 to {classes - 1} for {classes} classes, or -1 if it is unknown, got "
                f"{number}: correct the labels, or set classes to all of them"
            )
        if number == -1 and self.epoch is not None:
            raise ValueError(f"row {row}: expected a label for every training image, got none")
        return int(self.numbers[number])
