"""The predict loop's data, cut into batches that do not depend on ranks or interruptions."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch.utils.data import DataLoader, Dataset

from gmarpp.processes import follow_parent

ChooseBatches: TypeAlias = Callable[[Any], list[list[int]]]
"""From the loader of all images to the positions of those that are loaded together, batch by batch."""


BATCH_SIZE = 32
"""Images per batch where nobody says."""

_VALUES_ON_GPU, _BYTES_PER_VALUE = 2**24, 2**12


def predict_batch_size(values: int, gpu_memory: int) -> int:
    """Return how many images are explained at a time on a GPU where nobody says.

    Many, since Python starts as many kernels for one image as for a hundred: as many as have 2**24 values, and on a
    smaller GPU a value for every 4 KiB of its memory, of which nine maps of a ViT-L/16 need 0.8 in bfloat16 and 1.2 in
    float32. It does not depend on how much of the memory is free, so that a run can be repeated.

    Args:
        values: of an image, such as 3 * 224 * 224.
        gpu_memory: bytes of the whole GPU.

    Examples:
        >>> predict_batch_size(3 * 224 * 224, 80 * 2**30), predict_batch_size(3 * 224 * 224, 16 * 2**30)
        (111, 27)
    """
    return max(1, min(_VALUES_ON_GPU, gpu_memory // _BYTES_PER_VALUE) // values)


class WholeBatches(Dataset[Any]):
    """A data set whose items are whole batches of another one.

    A rank, or a resumed run, explains a batch whole or not at all: what is computed for an image never depends on how
    many ranks there are or where a run was interrupted, not even in its last bits.

    Args:
        loader: the loader whose batches these are.
        batches: positions in its data set, batch by batch.
    """

    def __init__(self, loader: DataLoader[Any], batches: Sequence[Sequence[int]]) -> None:
        self.dataset = loader.dataset
        self.collate: Callable[[list[Any]], Any] = loader.collate_fn
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        return self.collate([self.dataset[position] for position in self.batches[number]])


def pending_batches(images: int, batch_size: int, finished: Collection[int], ranks: int = 1) -> list[list[int]]:
    """Cut the positions of a data set into batches and leave out the finished ones.

    Args:
        images: length of the data set.
        batch_size: images per batch.
        finished: positions that are done; a set.
        ranks: processes that share the batches; a rank without any would stall the others, so that with fewer batches
            than ranks the last batch is repeated.

    Examples:
        >>> pending_batches(7, 3, {0, 1, 2, 4})
        [[3, 5], [6]]
    """
    whole = (range(start, min(start + batch_size, images)) for start in range(0, images, batch_size))
    batches = [[position for position in batch if position not in finished] for batch in whole]
    batches = [batch for batch in batches if batch]
    return batches + batches[-1:] * (ranks - len(batches))


def batch_loader(loader: DataLoader[Any], batches: Sequence[Sequence[int]]) -> DataLoader[Any]:
    """Load given batches of a loader's data set in its way.

    Lightning hands out items over ranks: here these are the batches. The loader's own sampler is left out, because
    under several ranks it may know this rank's share only. The loader's processes leave signals to this one, so that
    a signal to all of them does not end the batch that is being explained.
    """
    return DataLoader(
        WholeBatches(loader, batches),
        batch_size=1,
        collate_fn=_only_item,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=partial(_begin_worker, loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _begin_worker(original: Callable[[int], None] | None, worker: int) -> None:
    follow_parent()
    if original is not None:
        original(worker)


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item
