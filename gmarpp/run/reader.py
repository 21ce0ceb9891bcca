"""Reading what ``explain.py predict`` wrote, lazily."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmarpp.files import expand_path
from gmarpp.run.content import check_classes, check_index, damaged_file, read_json, require_file
from gmarpp.run.folder import IMAGES, MAPS, MAPS_INDEX, OVERLAYS, read_run
from gmarpp.run.shards import Shard, open_shard, read_shard
from gmarpp.run.summary import MeanCurve
from gmarpp.run.totals import RunTotals, summary


class StoredRun:
    """A complete run's output; nothing but its description is read before it is asked for.

    Attributes:
        folder: where it lies.
        run: content of ``run.json``.
        methods: names of the methods, in the order they were asked for.
        metrics: names of the metrics.
        signed_methods: names of the methods whose maps are signed; none in runs that do not say.
        indices: data set index of each image, ascending.

    Made by `load_explanations`.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = run
        about = _read_index(folder)
        self.methods: tuple[str, ...] = tuple(about["methods"])
        self.metrics: tuple[str, ...] = tuple(about["metrics"])
        self.signed_methods: tuple[str, ...] = tuple(run.get("signed_methods", ()))
        self._places: dict[int, tuple[str, int]] = {
            index: (shard["file"], place) for shard in about["shards"] for place, index in enumerate(shard["indices"])
        }
        self.indices: tuple[int, ...] = tuple(self._places)
        self._listed: dict[str, list[int]] = {shard["file"]: shard["indices"] for shard in about["shards"]}
        self._checked: set[str] = set()
        self._kind: Any = None
        self._totals: RunTotals | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def map(self, index: int, method: str) -> Tensor:
        """Return one raw map (h, w), float32.

        The first map of a file has the whole file read once and compared with its digest; others are read alone.

        Args:
            index: data set index of the image.
            method: one of `methods`.

        Raises:
            KeyError: for an image or method that the run does not hold.
            ValueError: if the file is damaged; the message names it.
        """
        if index not in self._places:
            raise KeyError(f"{self.folder} holds no image with index {index}")
        if method not in self.methods:
            raise KeyError(f"{self.folder} holds no maps of {method!r}: its methods are {', '.join(self.methods)}")
        name, place = self._places[index]
        if name not in self._checked:
            self._read(name)
        with open_shard(self.folder / MAPS / name) as file:
            part: Tensor = file.get_slice(method)[place : place + 1]
            return part[0]

    def maps(self, method: str) -> Tensor:
        """Return all raw maps of a method (n, h, w), float32, in the order of `indices`."""
        return torch.cat([shard.tensors[method] for shard in self.shards()])

    def shards(self) -> Iterator[Shard]:
        """Yield all that is stored, a bounded number of images at a time, in the order of `indices`.

        When the last has been taken, `rows`, `values`, `summary` and `mean_curves` need not read anything again.

        Raises:
            ValueError: if a file is damaged; the message names it.
        """
        totals = RunTotals(self.methods, self.metrics)
        for name in self._listed:
            shard = self._read(name)
            totals.add(shard)
            yield shard
        self._totals = totals

    @property
    def totals(self) -> RunTotals:
        """What one pass over all shards leaves in memory."""
        while self._totals is None:
            for _ in self.shards():
                pass
        return self._totals

    def _read(self, name: str) -> Shard:
        path = self.folder / MAPS / name
        shard = read_shard(path)
        indices = [row["index"] for row in shard.rows]
        if (shard.methods, shard.metrics, indices) != (self.methods, self.metrics, self._listed[name]):
            raise damaged_file(path, f"its images, methods or metrics are not those that {MAPS_INDEX} lists")
        if self._kind not in (None, shard.kind):
            raise damaged_file(path, "the sizes of its maps or curves are not those of the run's other files")
        try:
            check_classes(shard.rows, self.run["class_names"])
        except ValueError as error:
            raise damaged_file(path, str(error)) from error
        self._kind = shard.kind
        self._checked.add(name)
        return shard

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per image: index, path, label, target, predicted, probabilities, box if there is one."""
        return self.totals.rows

    @cached_property
    def values(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Metric values by method and metric, one per image (n,), float32; NaN where undefined."""
        return self.totals.values()

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dictionary per image and method, with the columns of ``explanations.csv``."""
        return [record for shard in self.shards() for record in self.records(shard)]

    def records(self, shard: Shard) -> Iterator[dict[str, Any]]:
        """Yield the table's records of one shard."""
        values = {
            method: {metric: shard.tensors[f"{method}/{metric}"].tolist() for metric in self.metrics}
            for method in self.methods
        }
        for position, row in enumerate(shard.rows):
            record: dict[str, Any] = {"path": row["path"], "index": row["index"], "method": ""}
            for role in ("label", "target", "predicted"):
                known = row[role] >= 0
                record[role] = row[role] if known else None
                record[f"{role}_name"] = self.class_name(row[role]) if known else None
                if role != "label":
                    record[f"{role}_probability"] = row[f"{role}_probability"]
            for method in self.methods:
                metrics = {metric: column[position] for metric, column in values[method].items()}
                overlay = f"{OVERLAYS}/{method}/{row['file']}.png" if self.run["writer"]["overlays"] else None
                yield {
                    **record,
                    "method": method,
                    **metrics,
                    "image": f"{IMAGES}/{row['file']}.jpg",
                    "overlay": overlay,
                }

    def class_name(self, number: int) -> str:
        """Return the name of a class for people, its number where the run knows no names; of -1, which is none, score.

        A target of -1 is a score of its own, such as a function of the network's output.
        """
        if number < 0:
            return "score"
        names = self.run["class_names"]
        return str(names[number]) if names else str(number)

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """One dictionary per method and metric: mean over images, its 95 % bootstrap interval, number of images."""
        return summary(self.values)

    def mean_curves(self) -> tuple[dict[str, MeanCurve], dict[str, MeanCurve]]:
        """Return the mean insertion and the mean deletion curve of each method; empty where there are no curves."""
        return self.totals.mean_curves()

    def image(self, index: int) -> Image.Image:
        """Open the image as the network saw it; its pixels are read when they are first used.

        Args:
            index: data set index of the image.

        Raises:
            KeyError: for an image that the run does not hold.
            FileNotFoundError: if its picture is missing.
            ValueError: if it is not an ordinary file of the run.
        """
        return Image.open(require_file(self.image_path(index), self.folder))

    def picture(self, index: int) -> np.ndarray[Any, Any]:
        """Return the image as the network saw it, uint8 pixels (H, W, 3).

        Args:
            index: data set index of the image.

        Raises:
            KeyError: for an image that the run does not hold.
            FileNotFoundError: if its picture is missing.
            ValueError: if its picture is damaged; the message names it.
        """
        return read_picture(self.image_path(index), self.folder)

    def image_path(self, index: int) -> Path:
        """Return the path of the image as the network saw it, with its normalization undone (JPEG)."""
        return self.folder / IMAGES / f"{self._row(index)['file']}.jpg"

    def overlay_path(self, index: int, method: str) -> Path:
        """Return the path of the map laid over its image (PNG)."""
        return self.folder / OVERLAYS / method / f"{self._row(index)['file']}.png"

    def _row(self, index: int) -> dict[str, Any]:
        if index not in self._row_of:
            raise KeyError(f"{self.folder} holds no image with index {index}")
        return self._row_of[index]

    @cached_property
    def _row_of(self) -> dict[int, dict[str, Any]]:
        return {row["index"]: row for row in self.rows}


def read_picture(path: Path, folder: Path) -> np.ndarray[Any, Any]:
    """Return the pixels of a picture, uint8 (H, W, 3).

    Args:
        path: of the picture.
        folder: of the run.

    Raises:
        FileNotFoundError: the picture is missing.
        ValueError: it is damaged, or no ordinary file of the run; the message names it.
    """
    require_file(path, folder)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for damaged files.
        raise damaged_file(path, str(error)) from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = require_file(folder / MAPS / MAPS_INDEX, folder)
    remedy = "delete it and run again with --resume"
    about = read_json(path, remedy)
    try:
        check_index(about)
    except ValueError as error:
        raise damaged_file(path, str(error), remedy) from error
    return about


def load_explanations(folder: str | Path) -> StoredRun:
    """Open the output of a complete predict run.

    Args:
        folder: what was given as ``--output``; ``~`` and environment variables are expanded.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the run was interrupted, or its description or index is damaged.
    """
    folder = expand_path(folder)
    run = read_run(folder)
    if run is None:
        raise FileNotFoundError(f"{folder} holds no explanations: give the output folder of a predict run")
    # While images are added to a run, its maps are taken apart, and have no index until they are merged again.
    if run["status"] != "complete" or not (folder / MAPS / MAPS_INDEX).exists():
        raise ValueError(f"the run in {folder} was interrupted: finish it by running it again with --resume")
    return StoredRun(folder, run)
