"""A table of paths and labels: CSV, TSV or Parquet."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gmarpp.data.dataset import Files
from gmarpp.data.module import ImageDataModule, Split
from gmarpp.data.names import readable_names
from gmarpp.data.numbering import Labels
from gmarpp.data.splits import find_split, held_out
from gmarpp.data.table_rows import SUFFIXES, Columns, TableRows, read_columns, table_rows
from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges

_KINDS = ("train", "val", "test")


class Table(ImageDataModule):
    """Images that a table lists, with a class, several labels, or values to predict; and with boxes or masks.

    Every row has a path. A class is a cell of `label_column`. Several labels of an image are a cell with a separator, a
    list in a Parquet file, rows with the same path, or a column each. Empty cells are unknown labels, except in
    a list of labels. Unreadable images are errors, or skipped by `on_error`.

    Args:
        table: the file (.csv, .tsv, .parquet), or a folder with one for each split: train.csv, val.csv, test.csv. Here
            and in `root`, `~` and environment variables are expanded.
        root: folder from which paths start; the table's own by default.
        path_column: column of paths.
        label_column: column of classes or labels. A table without it can be explained, not trained on.
        separator: what stands between the labels in a cell, such as "|".
        label_columns: a column for each label: 1, 0, or nothing where unknown.
        value_columns: columns of numbers, the targets of a regression.
        box_columns: columns x0, y0, x1, y1 in pixels, right and bottom edges exclusive, or nothing: an image's box, or,
            where images have several labels, that of the label in the row.
        mask_column: column of paths of segmentation masks; everything but black, or palette index 0, is object.
        split_column: column of splits, if the table has it: train or training; val, valid, validation or dev; test.
        predict_split: what `predict` explains: val, train or test.
        val_share: share of the training images held out for validation, where there is no such split: of every class
            alike, the same ones in every run; in (0, 1).
        classes: all classes in order; the sorted ones that occur by default.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        table: str,
        root: str | None = None,
        path_column: str = "path",
        label_column: str | None = "label",
        separator: str | None = None,
        label_columns: list[str] | None = None,
        value_columns: list[str] | None = None,
        box_columns: list[str] | None = None,
        mask_column: str | None = None,
        split_column: str = "split",
        predict_split: Literal["val", "train", "test"] = "val",
        val_share: float = 0.1,
        classes: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        ranges = {"val_share": Range(0, 1, low_open=True, high_open=True)}
        require_ranges({"val_share": val_share}, ranges, "data: ")
        if predict_split not in _KINDS:
            raise ValueError(f"data: predict_split: unknown split {predict_split!r}: choose from {', '.join(_KINDS)}")
        if box_columns is not None and len(box_columns) != 4:
            raise ValueError(f"data: box_columns: expected columns of x0, y0, x1, y1, got {', '.join(box_columns)}")
        if value_columns and (label_columns or separator):
            raise ValueError("data: value_columns: cannot be used with label_columns or separator: leave these out")
        if box_columns and label_columns:
            raise ValueError("data: box_columns: expected a row for each label: use label_column, not label_columns")
        self.table = expand_path(table)
        self.root = (self.table if self.table.is_dir() else self.table.parent) if root is None else expand_path(root)
        self.path_column, self.label_column, self.separator = path_column, label_column, separator
        self.label_columns, self.value_columns, self.box_columns = label_columns, value_columns, box_columns
        self.mask_column, self.split_column, self.val_share = mask_column, split_column, val_share
        self.predict_split = predict_split
        self.expected_classes = classes

    @property
    def options(self) -> dict[str, Any]:
        """See `ImageDataModule`."""
        return {**super().options, "classes": self.expected_classes}

    @property
    def masks(self) -> str | None:
        """Where masks come from: with them, `predict` measures what needs them."""
        return self.mask_column

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the classes, or the names of the columns of labels or values."""
        return self._rows.classes, readable_names(self._rows.classes)

    def read_split(self, split: Split) -> tuple[Files, Labels]:
        """See `ImageDataModule`."""
        rows = self._rows
        if not rows.classes and split != "predict":
            raise ValueError(f"{self.table}: {split} needs labels: there is no column {self.label_column!r}")
        chosen = np.flatnonzero(self._chosen_rows(self.predict_split if split == "predict" else split))
        masks = None if rows.masks is None else [str(self.root / rows.masks[row]) for row in chosen]
        boxes = None if rows.boxes is None else rows.boxes[chosen]
        return Files(self.root, [rows.paths[row] for row in chosen], boxes, masks), rows.labels[chosen]

    def _chosen_rows(self, split: str) -> NDArray[np.bool_]:
        """Return which images belong to a split; all of a table without splits and labels."""
        rows = self._rows
        if rows.splits is None and not rows.classes:
            return np.ones(len(rows.paths), dtype=bool)
        names = list(dict.fromkeys(rows.splits or ["train"]))
        of_split = {kind: np.array([each == find_split(kind, names) for each in rows.splits or []]) for kind in _KINDS}
        train = of_split["train"] if rows.splits else np.ones(len(rows.paths), dtype=bool)
        if split == "test" and find_split("test", names):
            return of_split["test"]
        if find_split("val", names):
            return train if split == "train" else of_split["val"]
        if not train.any():
            raise ValueError(
                f"{self.table}: expected the splits {' and '.join(_KINDS)} in column {self.split_column!r}, got "
                f"{', '.join(names)}"
            )
        validation = np.zeros(len(train), dtype=bool)
        validation[train] = held_out(rows.labels[train], self.val_share)
        return train & ~validation if split == "train" else validation

    @cached_property
    def _rows(self) -> TableRows:
        names = Columns(
            self.path_column,
            self.label_column,
            self.separator,
            self.label_columns or (),
            self.value_columns or (),
            self.box_columns or (),
            self.mask_column,
            self.split_column,
        )
        return table_rows(self._columns(), names, self.expected_classes, str(self.table))

    def _columns(self) -> dict[str, list[Any]]:
        """Read the table, or a folder's tables with their names as the splits."""
        if not self.table.is_dir():
            return read_columns(self.table)
        files = {path.stem: path for path in sorted(self.table.iterdir()) if path.suffix.lower() in SUFFIXES}
        found = {kind: name for kind in _KINDS if (name := find_split(kind, files)) is not None}
        if not found:
            raise ValueError(f"{self.table}: expected tables such as train.csv and val.csv, got {', '.join(files)}")
        parts = {kind: read_columns(files[name]) for kind, name in found.items()}
        first = next(iter(parts.values()))
        for kind, columns in parts.items():
            if columns.keys() != first.keys():
                raise ValueError(f"{files[found[kind]]}: expected the columns {', '.join(first)}, as in the others")
        joined = {name: [cell for part in parts.values() for cell in part[name]] for name in first}
        splits = [kind for kind, part in parts.items() for _ in next(iter(part.values()))]
        return {**joined, self.split_column: splits}
