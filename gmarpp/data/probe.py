"""The choice of a few images that stand for a whole data set, anyone's."""

from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset


def spread_over_classes(labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Choose images so that the classes are represented as evenly as possible, always the same ones.

    Args:
        labels: class of each image, shape (n,).
        size: number of images to choose; all, if there are fewer.

    Returns:
        indices, shape (min(size, n),): a first image of as many classes as possible, spread over the classes, then a
        second one, and so on.

    Examples:
        >>> spread_over_classes(np.array([0, 0, 0, 1, 1, 2]), 4).tolist()
        [0, 3, 5, 1]
    """
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(first, counts)
    by_turn = order[np.argsort(turn, kind="stable")]
    classes = len(counts)
    if size < classes:
        return by_turn[np.linspace(0, classes, size, endpoint=False).astype(np.int64)]
    return by_turn[:size]


def choose_probe(dataset: Any, size: int) -> NDArray[np.int64]:
    """Choose images of an indexed data set: spread over the classes where it tells them, else over the whole of it.

    Args:
        dataset: anything with a length.
        size: number of images to choose; all, if there are fewer.

    Examples:
        >>> choose_probe(range(10), 4).tolist()
        [0, 2, 5, 7]
    """
    labels = labels_of(dataset)
    if labels is not None:
        return spread_over_classes(labels, size)
    return np.linspace(0, len(dataset), min(size, len(dataset)), endpoint=False).astype(np.int64)


def labels_of(dataset: Any) -> NDArray[np.int64] | None:
    """Return the class of each sample, shape (n,), where a data set tells them without reading samples.

    They are its `labels` or `targets`, as torchvision names them; of a `Subset` or `ConcatDataset`, its parts'.
    """
    if isinstance(dataset, Subset):
        whole = labels_of(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [part for part in map(labels_of, dataset.datasets) if part is not None]
        return np.concatenate(parts) if len(parts) == len(dataset.datasets) else None
    for labels in (getattr(dataset, "labels", None), getattr(dataset, "targets", None)):
        if _are_classes(labels) and len(labels) == len(dataset):
            return np.asarray(labels).astype(np.int64)
    return None


def _are_classes(labels: Any) -> TypeGuard[Any]:
    if isinstance(labels, list | tuple):
        return all(isinstance(each, Integral) for each in labels)
    if isinstance(labels, Tensor):
        labels = labels.numpy(force=True)
    return isinstance(labels, np.ndarray) and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)


def is_indexed(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Return whether single samples of a loader's data set can be read; a stream, or one of whole batches, has none."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and hasattr(loader.dataset, "__len__")
    )


def first_source(dataset: Any) -> Any:
    """Return the data set inside `Subset` and `ConcatDataset`, which carries the transform and the class names."""
    while isinstance(dataset, Subset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return dataset


def normalization_in(transform: Any) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation per channel of the `Normalize` in a transform, or in a data set that has one.

    It is looked for in what `transforms` and `transform` hold, as in torchvision's data sets and in `Compose`, and in
    sequences. `None` where there is none, or one of values outside [0, 1].
    """
    if type(transform).__name__ == "Normalize" and hasattr(transform, "mean") and hasattr(transform, "std"):
        mean, std = (np.asarray(each, dtype=np.float64).ravel() for each in (transform.mean, transform.std))
        in_range = ((mean >= 0) & (mean <= 1)).all() and ((std > 0) & (std <= 1)).all()
        return (mean.tolist(), std.tolist()) if in_range and len(mean) == len(std) else None
    if isinstance(transform, list | tuple | nn.Sequential):
        parts = list(transform)
    else:
        parts = [getattr(transform, name) for name in ("transforms", "transform") if hasattr(transform, name)]
    return next((found for found in map(normalization_in, parts) if found is not None), None)
