"""What is made from stored explanations: tables, figures and the report."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gmarpp.figures import comparison_figure, figure_bytes
from gmarpp.files import write_atomically
from gmarpp.run.curve_figure import curves_figure
from gmarpp.run.reader import StoredRun
from gmarpp.run.report import write_report
from gmarpp.run.tables import write_csv


def write_results(
    explanations: StoredRun,
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


def _comparison(explanations: StoredRun, count: int, colormap: str, opacity: float) -> Any:
    spread = np.unique(np.linspace(0, len(explanations) - 1, min(count, len(explanations))).round().astype(int))
    rows = [explanations.rows[position] for position in spread]
    images = [explanations.picture(row["index"]) for row in rows]
    maps = {method: [explanations.map(row["index"], method).numpy() for row in rows] for method in explanations.methods}
    names = [explanations.class_name(row["target"]) for row in rows]
    boxes = [row.get("box") for row in rows]
    return comparison_figure(images, maps, names, [r["target_probability"] for r in rows], boxes, colormap, opacity)
