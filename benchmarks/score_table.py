"""Metric values per image, method and baseline, in a table that an interrupted benchmark can continue."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from measure import autocast
from torch import Tensor, nn
from torch.utils.data import default_collate

from gmarpp.explainer import FAITHFULNESS_METRICS, metric_inputs
from gmarpp.files import write_atomically
from gmarpp.metrics import functional
from gmarpp.metrics.functional import boxes_to_masks
from gmarpp.perturbation import score_perturbations
from gmarpp.run.summary import FEWEST_IMAGES, Interval, higher_is_better, paired_difference
from gmarpp.run.tables import write_csv
from gmarpp.training.network_choice import load_classifier

CRITERION = "insertion_deletion_gap"
FAITHFULNESS = (*FAITHFULNESS_METRICS, CRITERION)
LOCALIZATION = ("pointing_game", "energy_inside")
BATCH = 20

Record = dict[str, Any]
Explain = Callable[[nn.Module, Tensor, Sequence[str]], tuple[dict[str, Tensor], Tensor]]
"""Takes network, images (B, 3, H, W) and names of methods; returns maps (B, h, w) by method, and the classes (B,)."""


def open_images(ckpt_path: str, data: L.LightningDataModule, device: torch.device) -> tuple[nn.Module, Any]:
    """Load a network to a device, and open the images that a data module predicts on, as the network expects them."""
    module = load_classifier(ckpt_path)
    data.preprocessing = module.preprocessing
    data.prepare_data()
    data.setup("predict")
    return module.model.to(device), data.datasets["predict"]


def evaluate(
    model: nn.Module, batch: Mapping[str, Any], maps: Mapping[str, Tensor], target: Tensor, baseline: str, steps: int
) -> list[Record]:
    """Score one batch's maps by all metrics, localization where there are boxes or masks.

    Args:
        model: the network.
        batch: `image` (B, 3, H, W), `index` (B,), and `box` (B, 4) or `mask` (B, H, W) if there are any.
        maps: raw maps (B, h, w) by method.
        target: class scored, (B,).
        baseline: what replaces a removed patch.
        steps: of the insertion and deletion curves.

    Returns:
        a record per method and image.
    """
    images, masks = batch["image"], batch.get("mask")
    if masks is None and "box" in batch:
        masks = boxes_to_masks(batch["box"], (images.shape[2], images.shape[3]))
    scores = score_perturbations(model, images, maps, target, steps=steps, baseline=baseline)
    records = []
    for method, values in maps.items():
        inputs = {
            "maps": values,
            "masks": masks,
            "full": scores.full,
            "kept": scores.kept[method],
            "fractions": scores.fractions,
            "insertion": scores.insertion[method],
            "deletion": scores.deletion[method],
        }
        columns = {
            metric: getattr(functional, metric)(*(inputs[name] for name in metric_inputs(metric)), reduction="none")
            for metric in FAITHFULNESS + (() if masks is None else LOCALIZATION)
        }
        for position, index in enumerate(batch["index"].tolist()):
            cells = {metric: float(column[position]) for metric, column in columns.items()}
            records.append({"index": index, "baseline": baseline, "method": method, **cells})
    return records


class ScoreTable:
    """Records of `evaluate` in `scores.csv`, complete after every batch.

    Args:
        folder: its folder; what an earlier run wrote is read.
        options: everything else that the values depend on, besides images, baselines and methods.

    Raises:
        ValueError: if the folder holds values made with other options.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "scores.csv"
        self._records: dict[tuple[int, str, str], Record] = {}
        described = folder / "options.json"
        if described.is_file() and json.loads(described.read_text()) != options:
            raise ValueError(f"{folder} holds values made with other options, see {described}: choose another output")
        write_atomically(described, (json.dumps(options, indent=2) + "\n").encode())
        if self.path.is_file():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    key = int(row.pop("index")), row.pop("baseline"), row.pop("method")
                    cells = {metric: float(cell) if cell else np.nan for metric, cell in row.items()}
                    self._records[key] = dict(zip(("index", "baseline", "method"), key, strict=True)) | cells

    def missing(self, indices: Sequence[int], baseline: str, methods: Iterable[str]) -> list[str]:
        """Return the methods that lack a record of one of the images under a baseline."""
        return [m for m in methods if any((index, baseline, m) not in self._records for index in indices)]

    def add(self, records: Iterable[Record]) -> None:
        """Add records, and rewrite the file."""
        self._records |= {(row["index"], row["baseline"], row["method"]): row for row in records}
        write_csv(self.path, self._records.values())

    def values(self, indices: Sequence[int], baseline: str, method: str, metric: str) -> npt.NDArray[np.float64]:
        """Return one metric of some images, in their order, shape (n,); NaN where it is undefined."""
        return np.array([self._records[index, baseline, method][metric] for index in indices])

    def difference(self, indices: Sequence[int], baseline: str, first: str, second: str, metric: str) -> Interval:
        """Return the mean of a method's values minus another's on the same images."""
        return paired_difference(*(self.values(indices, baseline, method, metric) for method in (first, second)))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the table."""
        first = next(iter(self._records.values()))
        return [name for name in first if name not in ("index", "baseline", "method")]


def fill(
    table: ScoreTable,
    model: nn.Module,
    dataset: Any,
    indices: Mapping[str, Sequence[int]],
    methods: Sequence[str],
    explain: Explain,
    steps: int,
    precision: str,
) -> None:
    """Compute what a table lacks, and print the progress.

    Args:
        table: values of earlier runs, to which the missing ones are added batch by batch.
        model: the network, on the device that computes.
        dataset: data set of a data module.
        indices: images scored under each baseline.
        methods: names that `explain` knows.
        explain: computes maps.
        steps: of the insertion and deletion curves.
        precision: `float32` or `bfloat16`, of the scores.
    """
    begin, device = time.perf_counter(), next(model.parameters()).device
    images = list(dict.fromkeys(index for each in indices.values() for index in each))
    for start in range(0, len(images), BATCH):
        own = images[start : start + BATCH]
        missing = {
            baseline: table.missing([index for index in own if index in chosen], baseline, methods)
            for baseline, chosen in indices.items()
        }
        wanted = [method for method in methods if any(method in names for names in missing.values())]
        if wanted:
            collated = default_collate([dataset[index] for index in own])
            batch = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in collated.items()}
            maps, target = explain(model, batch["image"], wanted)
            for baseline, names in missing.items():
                if names:
                    with autocast(precision, device):
                        table.add(evaluate(model, batch, {m: maps[m] for m in names}, target, baseline, steps))
        print(
            f"{min(start + BATCH, len(images))} of {len(images)} images, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )


def cell(interval: Interval, metric: str, signed: bool = False) -> str:
    """Format a mean with its interval: percentages with one decimal, areas and shares with three."""
    form = f"{'+' if signed else ''}.{1 if metric.startswith('average') else 3}f"
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def verdict(difference: Interval, metric: str) -> str:
    """Return whether the first of two methods is `better`, `worse` or `tied` by the interval of their difference.

    Fewer images than `FEWEST_IMAGES` are `too few`.
    """
    if difference.n < FEWEST_IMAGES:
        return "too few"
    low, high = (difference.low, difference.high) if higher_is_better(metric) else (-difference.high, -difference.low)
    return "better" if low > 0 else "worse" if high < 0 else "tied"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
