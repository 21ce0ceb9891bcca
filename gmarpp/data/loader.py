"""Samplers and loader whose order depends on seed and epoch only, on any number of ranks, also after a resume."""

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """Shuffled (index, epoch) keys for one rank's share of the training images.

    Lightning sets the epoch, and leaves instances of `DistributedSampler` alone. Over all ranks, the k-th batches
    together hold the images that one process with the whole batch would have seen. The last images of a shuffle that
    do not fill all ranks are left out, never repeated.

    >>> samplers = [EpochSampler(range(5), world_size=2, rank=rank, seed=0) for rank in (0, 1)]
    >>> [len(list(sampler)) for sampler in samplers]
    [2, 2]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, seed: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Skips `start` keys, once."""
        keys = [(int(index), self.epoch) for index in super().__iter__()]
        keys, self.start = keys[self.start :], 0
        return iter(keys)


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
    """The largest batch size up to `batch_size` that gives every rank the same number of unequal shares' batches.

    A rank with one batch more than the others would wait for them forever where a network synchronises buffers.
    Where no size does, `batch_size` itself.

    >>> equal_batch_count(9, world_size=2, batch_size=4)  # shares of 5 and 4 images: 2 and 1 batches of 4, but 2 of 3
    3
    >>> equal_batch_count(8, world_size=2, batch_size=4)
    4
    """
    share, rest = divmod(images, world_size)
    sizes = (size for size in range(batch_size, 0, -1) if rest == 0 or share % size)
    return next(sizes, batch_size)


class ResumableLoader(DataLoader[Any]):
    """Training loader that Lightning saves and restores in the middle of an epoch.

    The state is the epoch and the number of images seen by all ranks in it, so that a run may resume with other
    batch sizes or ranks. Iteration starts at the first `next`, after Lightning has set the sampler's epoch.
    """

    sampler: EpochSampler

    def __init__(self, dataset: Dataset[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self._seen = 0
        self._resumed: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the batches of the sampler's epoch that were not yet seen in it."""
        resumed, self._resumed = self._resumed, {}
        self._seen = resumed["images"] if resumed.get("epoch") == self.sampler.epoch else 0
        assert self.batch_size is not None
        batches = self._seen // (self.batch_size * self.sampler.num_replicas)
        self.sampler.start = batches * self.batch_size
        for batch in super().__iter__():
            self._seen += self.batch_size * self.sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and images handed out in it over all ranks."""
        return {"epoch": self.sampler.epoch, "images": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes effect when the epoch of the state is iterated next."""
        self._resumed = dict(state)
