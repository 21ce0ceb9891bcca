"""Tables that any program reads."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from gmarpp.files import atomic_file

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_csv(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    r"""Write records as a table: six significant digits, empty cells for None and NaN, the first record's columns.

    The file is UTF-8; a byte of a path that is not, such as ff, is written as ``\udcff``. Text that a spreadsheet would
    take for a formula follows an apostrophe.
    """
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        writer = csv.writer(_Lines(text))
        for number, record in enumerate(records):
            if number == 0:
                writer.writerow([_cell(name) for name in record])
            writer.writerow([_cell(value) for value in record.values()])
        text.detach()


class _Lines:
    """Ends rows with a line feed alone: csv's own option would leave carriage returns in fields without quotes."""

    def __init__(self, text: TextIO) -> None:
        self._text = text

    def write(self, row: str) -> int:
        return self._text.write(row.removesuffix("\r\n") + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if value == value else ""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return "" if value is None else str(value)
