"""The outputs that are made from stored explanations: tables, figures and the report."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gmarpp.curve_figure import curves_figure
from gmarpp.reader import Explanations
from gmarpp.report import write_report
from gmarpp.storage import atomic_file, write_atomically
from gmarpp.visualize import comparison_figure, figure_bytes

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_results(
    explanations: Explanations,
    figure_images: int = 8,
    figure_formats: Sequence[str] = ("png",),
    colormap: str = "inferno",
    opacity: float = 0.5,
    report: bool = True,
) -> None:
    """Write the tables, the figures and the report of a run into its folder.

    Args:
        explanations: the run; nothing of it is computed anew.
        figure_images: columns of the comparison figure, images spread evenly over the run; 0 for no figure.
        figure_formats: ``png``, ``pdf``, ``svg``.
        colormap: colour map of the figure and of the report.
        opacity: share of the maps' colours, 0 to 1.
        report: write ``report.html``.
    """
    folder = explanations.folder
    write_csv(
        folder / "explanations.csv", (record for s in explanations.shards() for record in explanations.records(s))
    )
    if explanations.metrics:
        write_csv(folder / "summary.csv", explanations.summary)
    figures = {}
    if figure_images:
        figures["comparison"] = _comparison(explanations, figure_images, colormap, opacity)
    insertion, deletion = explanations.mean_curves()
    if insertion:
        explainer = explanations.run["explainer"]
        figures["curves"] = curves_figure(insertion, deletion, explainer["score"], explainer.get("normalize", False))
    for name, figure in figures.items():
        for extension in figure_formats:
            write_atomically(folder / f"{name}.{extension}", figure_bytes(figure, extension))
    if report:
        write_report(explanations, folder / "report.html", colormap, opacity)


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
    """Ends rows with a line feed alone; told so itself, csv would leave carriage returns in fields without quotes."""

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


def _comparison(explanations: Explanations, count: int, colormap: str, opacity: float) -> Any:
    spread = np.unique(np.linspace(0, len(explanations) - 1, min(count, len(explanations))).round().astype(int))
    rows = [explanations.rows[position] for position in spread]
    images = [explanations.picture(row["index"]) for row in rows]
    maps = {method: [explanations.map(row["index"], method).numpy() for row in rows] for method in explanations.methods}
    names = [explanations.class_name(row["target"]) for row in rows]
    boxes = [row.get("box") for row in rows]
    return comparison_figure(images, maps, names, [r["target_probability"] for r in rows], boxes, colormap, opacity)
