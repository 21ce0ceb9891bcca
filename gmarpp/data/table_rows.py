"""Rows of a CSV, TSV or Parquet file as images with labels, boxes and masks."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmarpp.data.numbering import Labels

SUFFIXES = (".csv", ".tsv", ".parquet")
_UNKNOWN = ("", "nan", "none", "null")
_FLAGS = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "-1": -1}


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; see `gmarpp.data.Table`."""

    path: str
    label: str | None
    separator: str | None
    labels: Sequence[str]
    values: Sequence[str]
    boxes: Sequence[str]
    mask: str | None
    split: str


@dataclass(frozen=True)
class TableRows:
    """The images of a table.

    Attributes:
        paths: as written, one per image.
        classes: names of the labels' classes or columns; empty without labels.
        labels: as `gmarpp.data.numbering.Labels`.
        splits: what the split column says of each image; None where there is none.
        boxes: (n, 4) or (n, C, 4), x0, y0, x1, y1, zeros where there is none.
        masks: a path per image.
    """

    paths: list[str]
    classes: list[str]
    labels: Labels
    splits: list[str] | None = None
    boxes: NDArray[np.float32] | None = None
    masks: list[str] | None = None


def read_columns(path: Path) -> dict[str, list[Any]]:
    """Read a table's columns by name, of one length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or has rows of different lengths.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a table ({', '.join(SUFFIXES)}), got another kind of file")
    if not path.is_file():
        raise FileNotFoundError(f"table {path.absolute()} does not exist")
    if suffix == ".parquet":
        return _parquet_columns(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _csv_columns(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True), path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): write it again, text in UTF-8") from error


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    # Imported here, for runs with other data need not wait for it.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): write it again") from error
    return columns


def _csv_columns(rows: Any, path: Path) -> dict[str, list[Any]]:
    names: list[str] = next(rows, [])
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path}: expected a first line of different column names, got {','.join(names)[:80]!r}")
    content = []
    for row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(f"{path}, line {rows.line_num}: expected {len(names)} cells, got {len(row)}")
        content.append(row)
    if not content:
        raise ValueError(f"{path} has no rows below its first line")
    return {name: [row[number] for row in content] for number, name in enumerate(names)}


def table_rows(columns: dict[str, list[Any]], names: Columns, classes: Sequence[str] | None, origin: str) -> TableRows:
    """Make images with labels of a table's columns.

    Args:
        columns: from `read_columns`.
        names: which of them say what.
        classes: all classes in order; the sorted ones that occur, if not given.
        origin: the table's name in messages.

    Raises:
        ValueError: a column is missing, or a cell holds something else than expected; naming the row.
    """
    wanted = [names.path, *names.labels, *names.values, *names.boxes, *([names.mask] if names.mask else [])]
    for name in wanted:
        if name not in columns:
            known = ", ".join(columns)
            hint = ": separate columns by commas" if len(columns) == 1 and ";" in known else ""
            raise ValueError(f"{origin}: unknown column {name!r}: choose from {known}{hint}")
    written = [_text(cell) for cell in columns[names.path]]
    if "" in written:
        raise ValueError(f"{origin}, row {written.index('') + 1}: expected a path in column {names.path!r}, got none")
    paths = list(dict.fromkeys(written))
    number = {path: position for position, path in enumerate(paths)}
    image = [number[path] for path in written]
    found, labels, one_label = _labels(columns, names, classes, image, len(paths), origin)
    return TableRows(
        paths,
        found,
        labels,
        _of_images(columns.get(names.split), image, len(paths), f"{origin}: column {names.split!r}"),
        _boxes(columns, names, image, one_label, labels.shape, origin),
        _of_images(columns.get(names.mask or ""), image, len(paths), f"{origin}: column {names.mask!r}"),
    )


def _labels(
    columns: dict[str, list[Any]],
    names: Columns,
    classes: Sequence[str] | None,
    image: list[int],
    images: int,
    origin: str,
) -> tuple[list[str], Labels, list[int | None]]:
    """Return classes, labels, and the class of each row that has a single one."""
    nothing: list[int | None] = [None] * len(image)
    if names.values or names.labels:
        if images != len(image):
            raise ValueError(f"{origin}: expected every path once where a row has all labels of an image")
        chosen, parse = (names.values, _value) if names.values else (names.labels, _flag)
        table = [_parsed(columns[name], parse, f"{origin}: column {name!r}") for name in chosen]
        kind: Any = np.float32 if names.values else np.int8
        return list(chosen), np.array(table, dtype=kind).reshape(len(chosen), images).T.copy(), nothing
    if names.label is None or names.label not in columns:
        return [], np.full(images, -1), nothing
    cells = [_split_cell(cell, names.separator) for cell in columns[names.label]]
    found = {label for cell in cells for label in cell}
    if classes is not None and (unknown := sorted(found - set(classes))):
        raise ValueError(f"{origin}: unknown class {unknown[0]!r} in column {names.label!r}: classes has to list it")
    ordered = list(classes) if classes is not None else sorted(found, key=_numbers_first)
    index = {label: position for position, label in enumerate(ordered)}
    single: list[int | None] = [index[cell[0]] if len(cell) == 1 else None for cell in cells]
    lists = any(isinstance(cell, list | tuple) for cell in columns[names.label])
    if names.separator is None and not lists and images == len(image):
        return ordered, np.array([-1 if each is None else each for each in single]), single
    flags = np.zeros((images, len(ordered)), dtype=np.int8)
    for position, cell in zip(image, cells, strict=True):
        flags[position, [index[label] for label in cell]] = 1
    return ordered, flags, single


def _boxes(
    columns: dict[str, list[Any]],
    names: Columns,
    image: list[int],
    one_label: list[int | None],
    shape: tuple[int, ...],
    origin: str,
) -> NDArray[np.float32] | None:
    if not names.boxes:
        return None
    edges = [_parsed(columns[name], _value, f"{origin}: column {name!r}") for name in names.boxes]
    several = len(shape) == 2 and not names.values
    boxes = np.zeros((*shape, 4) if several else (shape[0], 4), dtype=np.float32)
    for row, box in enumerate(zip(*edges, strict=True)):
        if all(map(math.isnan, box)):
            continue
        label, where = one_label[row], f"{origin}, row {row + 1}"
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"{where}: expected a box x0 < x1, y0 < y1, got {', '.join(f'{edge:g}' for edge in box)}")
        if several and label is None:
            raise ValueError(f"{where}: expected one label in a row with a box: give every label a row of its own")
        place: Any = (image[row], label) if several else image[row]
        if boxes[place].any():
            raise ValueError(f"{where}: expected one box for each label of an image, got a second one: leave boxes out")
        boxes[place] = box
    return boxes


def _of_images(cells: list[Any] | None, image: list[int], images: int, where: str) -> list[str] | None:
    """Return the one text that all rows of an image have."""
    if cells is None:
        return None
    found = [""] * images
    for row, (position, cell) in enumerate(zip(image, map(_text, cells), strict=True)):
        if found[position] not in ("", cell) or not cell:
            raise ValueError(f"{where}, row {row + 1}: expected one text per image, got {cell!r}")
        found[position] = cell
    return found


def _parsed(cells: list[Any], parse: Callable[[str], float], where: str) -> list[float]:
    values = []
    for row, cell in enumerate(cells):
        try:
            values.append(parse(_text(cell).lower()))
        except ValueError as error:  # noqa: PERF203, it names the row
            raise ValueError(f"{where}, row {row + 1}: expected {error}, got {cell!r}") from None
    return values


def _value(text: str) -> float:
    try:
        value = math.nan if text in _UNKNOWN else float(text)
    except ValueError:
        raise ValueError("a number") from None
    if math.isinf(value):
        raise ValueError("a finite number")
    return value


def _flag(text: str) -> float:
    if text in _UNKNOWN:
        return -1
    if (flag := _FLAGS.get(text.removesuffix(".0"))) is None:
        raise ValueError("1, 0 or nothing")
    return flag


def _split_cell(cell: Any, separator: str | None) -> list[str]:
    """Return the labels of a cell."""
    if isinstance(cell, list | tuple):
        return [_text(each) for each in cell]
    text = _text(cell)
    labels = text.split(separator) if separator else [text]
    return [label.strip() for label in labels if label.strip()]


def _text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    # As Parquet stores whole numbers where some are missing.
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """Order labels by their numbers where they are such, else as texts."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)
