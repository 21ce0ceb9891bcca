"""``report.html``: one page about a run, readable without a network."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gmarpp.colormaps import COLORMAPS, colormap_table, diverging_cover, diverging_table
from gmarpp.files import atomic_file
from gmarpp.labels import method_color, method_dashes, method_label, metric_label
from gmarpp.maps import Array
from gmarpp.run.content import require_file
from gmarpp.run.reader import StoredRun
from gmarpp.run.report_maps import ReportMaps
from gmarpp.run.summary import FEWEST_IMAGES, MeanCurve, higher_is_better, leaders
from gmarpp.run.totals import Agreement
from gmarpp.visualize import DEFAULT_STYLE, MapStyle

TEMPLATE = Path(__file__).with_name("report.html")

_EMBEDDED_IMAGES = 4_000_000
_SEPARATOR = "<!-- data -->"
_PERCENT = frozenset(("average_drop", "average_increase", "average_gain"))


def write_report(
    explanations: StoredRun,
    agreement: Agreement,
    maps: ReportMaps,
    path: Path,
    style: MapStyle = DEFAULT_STYLE,
) -> None:
    """Write the report of a run.

    Maps are embedded as bytes and colored by the page, so that opacity and colors can be changed. The pictures
    of a small run are embedded too, and the page then needs no other file; those of a large one, and then its maps,
    are read from the run's folder when they come into view.

    Args:
        explanations: the run.
        agreement: of all its shards.
        maps: of all its shards.
        path: the page, in the run's folder.
        style: how it draws the maps to begin with.
    """
    head, tail = TEMPLATE.read_text(encoding="utf-8").split(_SEPARATOR)
    pictures = [require_file(explanations.image_path(index), explanations.folder) for index in explanations.indices]
    embed_pictures = sum(picture.stat().st_size for picture in pictures) <= _EMBEDDED_IMAGES
    data = _summary_data(explanations) | {
        "name": explanations.folder.resolve().name,
        "title": _title(explanations.run),
        "grid": list(maps.grid),
        "size": list(explanations.picture(explanations.indices[0]).shape[:2]),
        "chunk": maps.chunk,
        "mapFiles": maps.files or None,
        "colormaps": {name: base64.b64encode(colormap_table(name).tobytes()).decode() for name in COLORMAPS},
        "colormap": style.colormap,
        "opacity": style.opacity,
        "signedMaps": style.signed_maps,
        "diverging": base64.b64encode(_diverging_pixels().tobytes()).decode() if explanations.signed_methods else None,
        "images": _image_data(explanations, agreement),
        "thumbnails": [base64.b64encode(p.read_bytes()).decode() for p in pictures] if embed_pictures else None,
    }
    with atomic_file(path) as file:
        file.write(head.encode())
        file.write(_script("data", data))
        for number, encoded in enumerate(maps.embedded):
            file.write(_script(f"maps-{number}", encoded))
        file.write(tail.encode())


def _title(run: Mapping[str, Any]) -> str:
    """Say what was explained: the checkpoint's name, or the network's, on the data's."""
    checkpoint, data = run["checkpoint"]["path"], run["data"]
    network = PurePath(checkpoint).stem if checkpoint else run["model"]["architecture"] or run["model"]["name"]
    root = (data.get("options") or {}).get("root")
    folder = PurePath(root).name if isinstance(root, str) else ""
    names = [name for name in (data["name"] or "data loader", folder) if name]
    return f"{network} on {', '.join(names)}"


def _diverging_pixels() -> Array:
    """Return red, green, blue and alpha of each level of the diverging color map, uint8, shape (256, 4)."""
    alpha = (255 * diverging_cover() + 0.5).astype(np.uint8)
    return np.column_stack((diverging_table(), alpha))


def _script(identifier: str, data: Any) -> bytes:
    """Embed data so that no text in it can end the element or start another one.

    What is not valid Unicode, as in file names of unknown encoding, becomes a question mark: browsers fail on it.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{identifier}">{text}</script>\n'.encode(errors="replace")


def _summary_data(explanations: StoredRun) -> dict[str, Any]:
    """Collect what the page says about the run as a whole."""
    methods, metrics, values = explanations.methods, explanations.metrics, explanations.values
    intervals: dict[str, Any] = {method: {} for method in methods}
    for row in explanations.summary:
        bounds = (_number(row[key]) for key in ("mean", "low", "high"))
        intervals[row["method"]][row["metric"]] = [*bounds, row["n"]]
    best: dict[str, list[str]] = {}
    for metric in metrics:
        columns = {method: values[method][metric] for method in methods}
        higher = higher_is_better(metric)
        best[metric] = [] if higher is None or len(methods) < 2 else leaders(columns, higher)
    insertion, deletion = explanations.mean_curves()
    return {
        "run": explanations.run,
        "methods": [
            {
                "name": method,
                "label": method_label(method),
                "color": method_color(method),
                "dashes": method_dashes(method),
                "signed": method in explanations.signed_methods,
            }
            for method in methods
        ],
        "metrics": [
            {"name": m, "label": metric_label(m), "higher": higher_is_better(m), "unit": "%" if m in _PERCENT else ""}
            for m in metrics
        ],
        "summary": intervals,
        "leaders": best,
        "fewestImages": FEWEST_IMAGES,
        "curves": {"insertion": _curves(insertion), "deletion": _curves(deletion)} if insertion else None,
    }


def _curves(curves: dict[str, MeanCurve]) -> dict[str, Any]:
    return {
        method: {
            "auc": _number(curve.auc),
            **{key: _numbers(getattr(curve, key)) for key in ("fractions", "mean", "low", "high")},
        }
        for method, curve in curves.items()
    }


def _image_data(explanations: StoredRun, agreement: Agreement) -> dict[str, Any]:
    """Collect one column per fact about the images, which is several times smaller than one object per image."""
    rows = explanations.rows
    matrix = agreement.matrix()
    roles = {role: {row[role] for row in rows} for role in ("label", "target", "predicted")}
    used = sorted(
        roles["target"] | {number for role in ("label", "predicted") for number in roles[role] if number >= 0}
    )
    return {
        "classNames": {number: explanations.class_name(number) for number in used},
        **{key: [row[key] for row in rows] for key in ("index", "path", "file", "label", "target", "predicted")},
        "targetProbability": _numbers([row["target_probability"] for row in rows]),
        "predictedProbability": _numbers([row["predicted_probability"] for row in rows]),
        "box": [row["box"] for row in rows] if rows and "box" in rows[0] else None,
        "values": {
            method: {metric: _numbers(column) for metric, column in metrics.items()}
            for method, metrics in explanations.values.items()
        },
        "agreement": None if matrix is None else [_numbers(row) for row in matrix],
        "weakest": _numbers(agreement.weakest) or None,
        "weakestPair": agreement.weakest_pair or None,
    }


def _number(value: float) -> float | None:
    """Return nine significant digits, which tell all of float32 apart, so that the page alone rounds; None for NaN."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _numbers(values: Sequence[float | None] | Array) -> list[float | None]:
    return [None if value is None else _number(float(value)) for value in values]
