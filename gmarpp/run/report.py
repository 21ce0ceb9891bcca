"""``report.html``: one page about a run, readable without a network."""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gmarpp.files import atomic_file, write_atomically
from gmarpp.labels import method_color, method_dashes, method_label, metric_label
from gmarpp.maps import Array, normalize_map
from gmarpp.metrics.functional import rank_correlation
from gmarpp.run.content import require_file
from gmarpp.run.folder import REPORT_MAPS, make_folder
from gmarpp.run.reader import StoredRun
from gmarpp.run.summary import FEWEST_IMAGES, MeanCurve, higher_is_better, leaders
from gmarpp.visualize import COLORMAPS, colormap_table

TEMPLATE = Path(__file__).with_name("report.html")

_CHUNK_BYTES = 750_000
_EMBEDDED_MAPS = 8_000_000
_EMBEDDED_IMAGES = 4_000_000
_SEPARATOR = "<!-- data -->"
_CONTROL = "random"


def write_report(explanations: StoredRun, path: Path, colormap: str = "inferno", opacity: float = 0.5) -> None:
    """Write the report of a run.

    Maps are embedded as bytes and coloured by the page, so that their opacity and colours can be changed. The pictures
    of a small run are embedded too, and the page then needs no other file; those of a large one, and then its maps,
    are read from the run's folder when they come into view.

    Args:
        explanations: the run.
        path: the page, in the run's folder.
        colormap: colour map it starts with.
        opacity: opacity it starts with, 0 to 1.
    """
    head, tail = TEMPLATE.read_text(encoding="utf-8").split(_SEPARATOR)
    first = next(explanations.shards())
    grid = first.tensors[explanations.methods[0]].shape[-2:]
    map_bytes = len(explanations.methods) * math.prod(grid)
    chunk = max(1, _CHUNK_BYTES // map_bytes)
    chunks = math.ceil(len(explanations) / chunk)
    embed_maps = len(explanations) * map_bytes <= _EMBEDDED_MAPS
    if not embed_maps:
        make_folder(path.with_name(REPORT_MAPS))
    pictures = [require_file(explanations.image_path(index), explanations.folder) for index in explanations.indices]
    embed_pictures = sum(picture.stat().st_size for picture in pictures) <= _EMBEDDED_IMAGES
    data = _summary_data(explanations) | {
        "name": explanations.folder.resolve().name,
        "title": _title(explanations.run),
        "grid": list(grid),
        "size": list(explanations.picture(explanations.indices[0]).shape[:2]),
        "chunk": chunk,
        "mapFiles": None if embed_maps else [f"{REPORT_MAPS}/{number:05d}.js" for number in range(chunks)],
        "colormaps": {name: base64.b64encode(colormap_table(name).tobytes()).decode() for name in COLORMAPS},
        "colormap": colormap,
        "opacity": opacity,
        "images": _image_data(explanations),
        "thumbnails": [base64.b64encode(p.read_bytes()).decode() for p in pictures] if embed_pictures else None,
    }
    with atomic_file(path) as file:
        file.write(head.encode())
        file.write(_script("data", data))
        for number, encoded in enumerate(_map_chunks(explanations, chunk)):
            if embed_maps:
                file.write(_script(f"maps-{number}", encoded))
            else:
                script = f'receiveMaps({number},"{encoded}")\n'.encode()
                write_atomically(path.with_name(REPORT_MAPS) / f"{number:05d}.js", script, durable=False)
        file.write(tail.encode())


def _title(run: Mapping[str, Any]) -> str:
    """Say what was explained: the checkpoint's name, or the network's, on the data's."""
    checkpoint, data = run["checkpoint"]["path"], run["data"]
    network = PurePath(checkpoint).stem if checkpoint else run["model"]["architecture"] or run["model"]["name"]
    root = (data.get("options") or {}).get("root")
    folder = PurePath(root).name if isinstance(root, str) else ""
    names = [name for name in (data["name"] or "data loader", folder) if name]
    return f"{network} on {', '.join(names)}"


def _script(identifier: str, data: Any) -> bytes:
    """Embed data so that no text in it can end the element or start another one.

    What is not valid Unicode, as in file names of unknown encoding, becomes a question mark: browsers fail on it.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{identifier}">{text}</script>\n'.encode(errors="replace")


def _map_chunks(explanations: StoredRun, size: int) -> Iterator[str]:
    """Yield the maps of so many images at a time as base64 of bytes (image, method, row, column)."""
    images = (
        image
        for shard in explanations.shards()
        for image in (np.stack([normalize_map(shard.tensors[m]) for m in shard.methods], axis=1) * 255 + 0.5)
    )
    while chunk := list(islice(images, size)):
        yield base64.b64encode(np.stack(chunk).astype(np.uint8).tobytes()).decode()


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
            {"name": m, "label": method_label(m), "color": method_color(m), "dashes": method_dashes(m)} for m in methods
        ],
        "metrics": [{"name": m, "label": metric_label(m), "higher": higher_is_better(m)} for m in metrics],
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


def _image_data(explanations: StoredRun) -> dict[str, Any]:
    """Collect one column per fact about the images, which is several times smaller than one object per image."""
    rows = explanations.rows
    agreement, weakest, pair = _agreement(explanations)
    used = sorted({row[role] for row in rows for role in ("label", "target", "predicted") if row[role] >= 0})
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
        "agreement": agreement,
        "weakest": weakest,
        "weakestPair": pair,
    }


def _agreement(explanations: StoredRun) -> tuple[Any, Any, Any]:
    """Give the mean rank correlation of each two methods, and for each image the two that agree least and how little.

    The random control takes no part in the latter, or it would always be one of the two.
    """
    methods = explanations.methods
    pairs = list(combinations(range(len(methods)), 2))
    compared = [pair for pair in pairs if _CONTROL not in (methods[pair[0]], methods[pair[1]])]
    if not pairs:
        return None, None, None
    total, count = np.zeros(len(pairs)), 0
    weakest: list[float | None] = []
    weakest_pair: list[list[int] | None] = []
    for shard in explanations.shards():
        correlations = np.stack(
            [rank_correlation(shard.tensors[methods[a]], shard.tensors[methods[b]]).numpy() for a, b in pairs], axis=1
        )
        total += correlations.sum(axis=0)
        count += len(correlations)
        if compared:
            among = correlations[:, [pairs.index(pair) for pair in compared]]
            weakest += _numbers(among.min(axis=1))
            weakest_pair += [list(compared[choice]) for choice in among.argmin(axis=1)]
    matrix = np.eye(len(methods))
    for (a, b), mean in zip(pairs, total / count, strict=True):
        matrix[a, b] = matrix[b, a] = mean
    return [_numbers(row) for row in matrix], weakest or None, weakest_pair or None


def _number(value: float) -> float | None:
    """Nine significant digits, which tell all of float32 apart, so that the page alone rounds; None for NaN."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _numbers(values: Sequence[float] | Array) -> list[float | None]:
    return [_number(float(value)) for value in values]
