"""What is made from stored explanations: tables, figures and the report."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gmarpp.figures import comparison_figure, figure_bytes
from gmarpp.files import write_atomically
from gmarpp.run.curve_figure import curves_figure
from gmarpp.run.reader import StoredRun
from gmarpp.run.report import write_report
from gmarpp.run.report_maps import ReportMaps
from gmarpp.run.shards import Shard
from gmarpp.run.tables import write_csv
from gmarpp.run.totals import Agreement
from gmarpp.visualize import DEFAULT_STYLE, MapStyle


def write_results(
    explanations: StoredRun,
    figure_images: int = 8,
    figure_formats: Sequence[str] = ("png",),
    style: MapStyle = DEFAULT_STYLE,
    report: bool = True,
) -> None:
    """Write the tables, the figures and the report of a run into its folder, having read each of its shards once.

    Args:
        explanations: the run; its values are read, not computed again.
        figure_images: columns of the comparison figure, images spread evenly over the run; 0 for no figure.
        figure_formats: ``png``, ``pdf``, ``svg``.
        style: how maps are drawn in the figure, and in the report to begin with.
        report: write ``report.html``.
    """
    folder = explanations.folder
    compared = _ComparedMaps(_spread(explanations.indices, figure_images))
    agreement = Agreement(explanations.methods)
    maps = ReportMaps(folder, len(explanations), explanations.signed_methods)
    needed = [compared.add, *([agreement.add, maps.add] if report else [])]
    shards = _passing(explanations.shards(), needed)
    write_csv(folder / "explanations.csv", (record for shard in shards for record in explanations.records(shard)))
    if explanations.metrics:
        write_csv(folder / "summary.csv", explanations.summary)
    figures = {}
    if figure_images:
        figures["comparison"] = _comparison(explanations, compared, style)
    insertion, deletion = explanations.mean_curves()
    if insertion:
        explainer = explanations.run["explainer"]
        figures["curves"] = curves_figure(insertion, deletion, explainer["score"], explainer.get("normalize", False))
    for name, figure in figures.items():
        for extension in figure_formats:
            write_atomically(folder / f"{name}.{extension}", figure_bytes(figure, extension))
    if report:
        write_report(explanations, agreement, maps, folder / "report.html", style)


def _passing(shards: Iterable[Shard], needed: Sequence[Callable[[Shard], None]]) -> Iterator[Shard]:
    """Yield the shards, and hand each of them to everything else that needs it."""
    for shard in shards:
        for add in needed:
            add(shard)
        yield shard


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Return `count` of the indices, evenly spread."""
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[position] for position in np.unique(positions)]


class _ComparedMaps:
    """The rows and maps of a few images."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.rows: list[Any] = []
        self.maps: dict[str, list[Any]] = {}
        self._indices = set(indices)

    def add(self, shard: Shard) -> None:
        """Keep what there is of the images in a shard."""
        for position, row in enumerate(shard.rows):
            if row["index"] in self._indices:
                self.rows.append(row)
                for method in shard.methods:
                    # A copy, because a view would keep the file open.
                    self.maps.setdefault(method, []).append(shard.tensors[method][position].numpy().copy())


def _comparison(explanations: StoredRun, compared: _ComparedMaps, style: MapStyle) -> Any:
    rows = compared.rows
    images = [explanations.picture(row["index"]) for row in rows]
    names = [explanations.class_name(row["target"]) for row in rows]
    boxes = [row.get("box") for row in rows]
    probabilities = [row["target_probability"] for row in rows]
    return comparison_figure(images, compared.maps, names, probabilities, boxes, explanations.signed_methods, style)
