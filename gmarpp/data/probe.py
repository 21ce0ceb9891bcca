"""The choice of a few images that stand for a whole data set."""

import numpy as np
from numpy.typing import NDArray


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
