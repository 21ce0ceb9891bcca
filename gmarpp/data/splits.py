"""Splits of data: found by their usual names, or made by holding out a share."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from gmarpp.data.numbering import Labels

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def split_names(name: str) -> tuple[str, ...]:
    """Return a split's name, and the other usual ones of the same split.

    >>> split_names("valid")
    ('valid', 'val', 'validation', 'dev')
    >>> split_names("fold1")
    ('fold1',)
    """
    others = next((names for names in SPLIT_NAMES.values() if name.lower() in names), ())
    return (name, *(other for other in others if other != name))


def find_split(split: str, names: Collection[str]) -> str | None:
    """Return the one of some names that means a split, in any case of letters; None where none does.

    Raises:
        ValueError: several do.
    """
    found = [name for name in names if name.lower() in SPLIT_NAMES[split]]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(sorted(found))} are both the {split} split: rename all but one")
    return found[0] if found else None


def held_out(labels: Labels, share: float) -> NDArray[np.bool_]:
    """Choose a share of images, always the same ones: of every class where each image has one, at least one of each.

    Args:
        labels: (n,) classes, or (n, C).
        share: of the images, in (0, 1).

    Returns:
        (n,), which are chosen; of a class with a single image, none.

    >>> chosen = held_out(np.array([0, 0, 0, 1, 1, 2]), 0.4)
    >>> [int(chosen[:3].sum()), int(chosen[3:5].sum()), bool(chosen[5])]
    [1, 1, False]
    """
    generator = np.random.default_rng(0)
    chosen = np.zeros(len(labels), dtype=bool)
    groups = labels if labels.ndim == 1 else np.zeros(len(labels))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        chosen[generator.permutation(rows)[:count]] = True
    return chosen
