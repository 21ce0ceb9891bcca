"""Labels in the order of a network's outputs, and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

Labels: TypeAlias = NDArray[Any]
"""(n,) int64: the class of each image, -1 where unknown. (n, C) int8: whether it has each label, 1 or 0, -1 where
unknown. (n, C) float32: its values, NaN where unknown."""

# What becomes of a class that was not chosen.
DROPPED = -2


@dataclass(frozen=True)
class Numbering:
    """How the classes of data become labels.

    Attributes:
        classes: ids in the order of the labels.
        class_names: the same for people.
        numbers: (n + 1,), the label of each of the data's n classes, `DROPPED` where it was not chosen; the last is
            read for -1, unknown.
        is_binary: the label is whether an image has the one class.
    """

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    numbers: NDArray[np.int64]
    is_binary: bool = False

    @classmethod
    def of(cls, ids: Sequence[str], kept: Sequence[str], classes: tuple[str, ...], names: tuple[str, ...]) -> Self:
        """Return the numbers in `classes` of those of the data's classes `ids` that are kept."""
        positions = {name: position for position, name in enumerate(classes)}
        chosen = set(kept)
        return cls(classes, names, np.array([positions[name] if name in chosen else DROPPED for name in ids] + [-1]))

    @classmethod
    def of_one_label(cls, ids: Sequence[str], names: Sequence[str], known: tuple[str, ...]) -> Self:
        """Return the numbers of two classes, of which one is a label and the other its absence.

        Args:
            ids: both, in the order of the data's numbers.
            names: the same for people.
            known: the class that the network knows as its label; the latter one if it knows none.

        Raises:
            ValueError: the network's label is neither.
        """
        label = known[0] if known else ids[1]
        if label not in ids:
            raise ValueError(
                f"the network's label is {label!r}, and the data's classes are {ids[0]!r} and {ids[1]!r}: use the data "
                "it was trained on"
            )
        numbers = np.array([int(name == label) for name in ids] + [-1])
        return cls((label,), (names[list(ids).index(label)],), numbers, is_binary=True)

    def apply(self, labels: Labels) -> tuple[Labels, NDArray[np.int64]]:
        """Return labels in the order of `classes`, of all rows, and the rows that are kept."""
        if labels.ndim == 2:
            unknown = np.nan if _are_values(labels) else -1
            ordered = np.full((len(labels), len(self.classes)), unknown, labels.dtype)
            kept = np.flatnonzero(self.numbers[:-1] != DROPPED)
            ordered[:, self.numbers[kept]] = labels[:, kept]
            return ordered, np.arange(len(labels))
        numbers = self.numbers[labels]
        return (numbers.astype(np.int8)[:, None] if self.is_binary else numbers), np.flatnonzero(numbers != DROPPED)

    def require_labels(self, split: str, labels: Labels, owner: str) -> None:
        """Check the labels of a split as they were read.

        Raises:
            ValueError: a label is none of a class, or is missing where it is needed; naming the row.
        """
        classes = len(self.numbers) - 1
        if labels.ndim == 2:
            self._require_table(labels, owner, split)
            unknown = np.isnan(labels).any(1) if _are_values(labels) else (labels == -1).all(1)
        else:
            _require_classes(split, labels, owner, classes)
            unknown = labels == -1
        rows = np.flatnonzero(unknown)
        if split == "train" and len(rows):
            raise ValueError(
                f"{owner}: row {rows[0]} of {split} has no label, as {len(rows)} of {len(labels)}: expected one of "
                "every training image"
            )
        if split in ("selection", "val", "test") and 0 < len(labels) == len(rows):
            raise ValueError(f"{owner}: no image of {split} has a label, so there is nothing to measure")

    def require_examples(self, labels: Labels, owner: str) -> None:
        """Check that every class has a training image.

        Raises:
            ValueError: one has none; naming it.
        """
        wanted = {int(number) for number in self.numbers if number not in (DROPPED, -1)}
        if _are_values(labels):
            return
        found = set(np.flatnonzero((labels == 1).any(0))) if labels.ndim == 2 else set(labels.tolist())
        if self.is_binary:
            wanted, found = {0, 1}, set(labels.ravel().tolist())
        missing = sorted(wanted - found)
        if missing:
            raise ValueError(
                f"{owner} has no training image of {len(missing)} of its {len(wanted)} classes, the first of them "
                f"{self.classes[0 if self.is_binary else missing[0]]!r}: add images, or leave the class out with "
                "only_classes"
            )

    def _require_table(self, labels: Labels, owner: str, split: str) -> None:
        if labels.shape[1] != len(self.numbers) - 1:
            raise ValueError(
                f"{owner}: expected {len(self.numbers) - 1} labels per image of {split}, got {labels.shape[1]}"
            )
        if not _are_values(labels) and len(labels) and (labels.min() < -1 or labels.max() > 1):
            raise ValueError(f"{owner}: expected labels of 1, 0 or -1 (unknown) in {split}, got {labels.max()}")


def _are_values(labels: Labels) -> bool:
    return np.issubdtype(labels.dtype, np.floating)


def _require_classes(split: str, labels: Labels, owner: str, classes: int) -> None:
    wrong = np.flatnonzero((labels < -1) | (labels >= classes))
    if len(wrong):
        hint = ", and seem to count from 1" if labels.min() == 1 and labels.max() == classes else ""
        raise ValueError(
            f"{owner}: row {wrong[0]} of {split} has the label {labels[wrong[0]]}, expected 0 to {classes - 1} for "
            f"{classes} classes, or -1 where it is unknown ({len(wrong)} of {len(labels)} labels are outside{hint}): "
            "correct the labels, or set classes to all of them"
        )
