"""Samplers and loader whose order depends on seed and epoch only, on any number of ranks, also after a resume."""

from collections.abc import Iterator, Sized
from itertools import chain, count, repeat
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gmarpp.processes import follow_parent


class EpochSampler(DistributedSampler[Any]):
    """Shuffled (index, epoch) keys for one rank's share of the training images.

    Lightning sets the epoch, and leaves instances of `DistributedSampler` alone. Over all ranks, the k-th batches
    together hold the images that one process with the whole batch would have seen. The last images of a shuffle that
    do not fill all ranks are left out, never repeated. With weights, images are drawn by them, some of them repeatedly.

    >>> samplers = [EpochSampler(range(5), world_size=2, rank=rank, seed=0) for rank in (0, 1)]
    >>> [len(list(sampler)) for sampler in samplers]
    [2, 2]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, seed: int, weights: Tensor | None = None) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.images = len(dataset)
        self.weights = weights
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the keys of the epoch, without the first `start` ones, once."""
        # Hashed, because a sum, as in the base class, gives the first epoch of seed 1 the order of seed 0's second.
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) & 0xFFFFFFFF)
        if self.weights is None:
            order = torch.randperm(self.images, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.images, replacement=True, generator=generator)
        order = order[: self.total_size][self.rank :: self.num_replicas]
        start, self.start = self.start, 0
        return zip(order[start:].tolist(), repeat(self.epoch))


def balancing_weights(labels: NDArray[Any]) -> Tensor:
    """Return weights, (n,), by which images of every class are drawn equally often.

    Args:
        labels: classes (n,), or (n, 1) of one label.

    Raises:
        ValueError: images have several labels, or values.

    >>> balancing_weights(np.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    if labels.size != len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError("balanced: expected one class per image: set --model.class_weights balanced instead")
    _, classes, counts = np.unique(labels.ravel(), return_inverse=True, return_counts=True)
    return torch.from_numpy(1 / counts[classes])


class UnrepeatedSampler(DistributedSampler[Any]):
    """Every rank-th index in order: unlike its base class, it repeats nothing to make the ranks' shares equal.

    >>> [list(UnrepeatedSampler(range(5), world_size=2, rank=rank)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, len(dataset), world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def equal_batch_count(images: int, world_size: int, batch_size: int) -> int:
    """Return the batch size nearest to `batch_size`, rather smaller, that gives every rank as many batches.

    The ranks' shares differ by one image where nothing is repeated. A rank with one batch more than the others would
    wait for them forever where a network synchronizes buffers.

    >>> equal_batch_count(9, world_size=2, batch_size=4)  # shares of 5 and 4 images: 2 and 1 batches of 4, but 2 of 3
    3
    >>> equal_batch_count(8, world_size=2, batch_size=4)
    4
    """
    share, rest = divmod(images, world_size)
    return next(size for size in chain(range(batch_size, 0, -1), count(batch_size)) if rest == 0 or share % size)


class ResumableLoader(DataLoader[Any]):
    """Training loader that Lightning saves and restores in the middle of an epoch.

    The state is the epoch and the number of images that all ranks have trained on in it, so that a run may resume with
    other batch sizes or ranks. Iteration starts at the first `next`, after Lightning has set the sampler's epoch.

    Args:
        dataset: takes the keys of `EpochSampler`.
        *args: of torch's DataLoader.
        progress: Lightning's progress through the batches of an epoch. An interrupted batch is not processed and will
            be repeated; without `progress`, every batch handed out counts.
        **kwargs: of torch's DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], *args: Any, progress: Any = None, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.progress = progress
        self._epoch = -1
        self._images_before = self._batches_before = self._handed_out = self._images_per_batch = 0
        self._resumed: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the sampler's epoch that were not yet seen in it."""
        if not isinstance(self.sampler, EpochSampler):
            # Lightning puts a sequential sampler in its place to overfit a few batches.
            yield from super().__iter__()
            return
        resumed, self._resumed = self._resumed, {}
        assert self.batch_size is not None
        self._epoch = self.sampler.epoch
        self._images_before = resumed["images"] if resumed.get("epoch") == self._epoch else 0
        self._batches_before = self._batches_done
        self._images_per_batch = self.batch_size * self.sampler.num_replicas
        self.sampler.start = self._images_before // self._images_per_batch * self.batch_size
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    @property
    def _batches_done(self) -> int:
        return self._handed_out if self.progress is None else int(self.progress.current.processed)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many images all ranks have trained on in it."""
        batches = self._batches_done - self._batches_before
        return self._resumed or {
            "epoch": self._epoch,
            "images": self._images_before + batches * self._images_per_batch,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state when its epoch is iterated next."""
        self._resumed = dict(state)


def prepare_worker(worker: int) -> None:
    """Seed a loader's process as Lightning does, and have it follow the process that it loads for."""
    pl_worker_init_function(worker)
    follow_parent()
