"""Faithfulness of gmarpp's methods beside other libraries', and how far the ranking depends on the baseline.

    pip install -e '.[bench]'
    python benchmarks/faithfulness.py --ckpt_path checkpoints/X --data TinyImageNet --data.root data

All methods explain the predicted class; maps are computed in float32 on the network's patch grid (see
`outside_maps.py`). Each map is scored under several baselines, which replace removed patches: `blur`, `drop` (the
token leaves the sequence), `mean` and `black`. Images are spread evenly over the classes; `--images` says how many for
each baseline, smaller numbers being the first of the larger. Those on which `study.py` chose `gmarpp_sum` are omitted.
Differences between methods are paired by image.

Writes into the output folder `scores.csv` (a row per image, baseline and method; a second run adds what is missing),
`faithfulness.json`, `faithfulness.md` and `faithfulness.png`. None of them shows an image.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import gpu_memory, machine
from outside_maps import OUTSIDE_METHODS
from score_table import CRITERION, ScoreTable, cell, fill, markdown_table, open_images, verdict
from torch import Tensor, nn

import gmarpp
from gmarpp.data.probe import spread_over_classes
from gmarpp.figures import figure_bytes
from gmarpp.files import write_atomically
from gmarpp.labels import METHOD_LABELS, metric_label
from gmarpp.metrics.functional import rank_correlation
from gmarpp.run.summary import bootstrap, higher_is_better, leaders

OURS = ("gmarpp_l1", "gmarpp_l2", "gmarpp_sum", "gmarpp_balanced", "token_relevance")
METHODS = (*OURS, "gmar_l1", "rollout", "legrad", "chefer", "attention", "random", *OUTSIDE_METHODS)
REFERENCES = ("gmarpp_l1", "token_relevance")
IMAGES = {"blur": 500, "drop": 500, "mean": 200, "black": 200}

Indices = Mapping[str, Sequence[int]]
"""Images scored under each baseline."""


def explain(model: nn.Module, images: Tensor, methods: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Compute maps (B, h, w) by method, and the predicted classes (B,)."""
    explanation = gmarpp.explain(model, images, methods)
    return explanation.maps, explanation.target


def means_table(table: ScoreTable, indices: Sequence[int], baseline: str, methods: Sequence[str]) -> str:
    """Tabulate means with intervals; the best, and those that tie with it, in bold."""
    cells: dict[str, list[str]] = {method: [METHOD_LABELS[method]] for method in methods}
    for metric in table.metrics:
        columns = {method: table.values(indices, baseline, method, metric) for method in methods}
        best = leaders(columns, bool(higher_is_better(metric)))
        for method, interval in zip(methods, bootstrap(np.stack(list(columns.values()), axis=1)), strict=True):
            mean, bounds = cell(interval, metric).split(" ", 1)
            cells[method].append(f"**{mean}** {bounds}" if method in best else f"{mean} {bounds}")
    head = [f"{metric_label(metric)} {'↑' if higher_is_better(metric) else '↓'}" for metric in table.metrics]
    return markdown_table(["", *head], cells.values())


def differences_table(
    table: ScoreTable, indices: Sequence[int], baseline: str, reference: str, methods: Sequence[str]
) -> str:
    """Tabulate the difference between one method and each other, and whether the interval separates the two."""
    rows = []
    for method in methods:
        if method != reference:
            intervals = {m: table.difference(indices, baseline, reference, method, m) for m in table.metrics}
            row = [f"{cell(each, metric, signed=True)} {verdict(each, metric)}" for metric, each in intervals.items()]
            rows.append([METHOD_LABELS[method], *row])
    return markdown_table([f"{METHOD_LABELS[reference]} minus …", *map(metric_label, table.metrics)], rows)


def mean_values(table: ScoreTable, indices: Indices, methods: Sequence[str], metric: str) -> dict[str, Tensor]:
    """Return the methods' means under each baseline, shape (methods,), on the images that all baselines share."""
    shared = min(indices.values(), key=len)
    return {
        baseline: torch.tensor([np.nanmean(table.values(shared, baseline, method, metric)) for method in methods])
        for baseline in indices
    }


def ranks_table(table: ScoreTable, indices: Indices, methods: Sequence[str]) -> str:
    """Tabulate each method's rank by insertion AUC minus deletion AUC under each baseline, 1 for the best."""
    means = mean_values(table, indices, methods, CRITERION)
    ranks = {baseline: (-values).argsort().argsort() + 1 for baseline, values in means.items()}
    rows = [[METHOD_LABELS[m], *(str(int(rank[place])) for rank in ranks.values())] for place, m in enumerate(methods)]
    return markdown_table(["", *ranks], rows)


def agreement_table(table: ScoreTable, indices: Indices, methods: Sequence[str]) -> str:
    """Tabulate Spearman's rank correlation of the methods' means between each pair of baselines, by metric."""
    pairs = list(itertools.combinations(indices, 2))
    rows = []
    for metric in table.metrics:
        means = mean_values(table, indices, methods, metric)
        correlations = [rank_correlation(means[a][None, None], means[b][None, None]).item() for a, b in pairs]
        rows.append([metric_label(metric), *(f"{value:.2f}" for value in correlations)])
    return markdown_table(["", *(f"{a}, {b}" for a, b in pairs)], rows)


def figure_of(table: ScoreTable, indices: Indices, methods: Sequence[str]) -> Figure:
    """Draw insertion AUC minus deletion AUC of each method, a panel for each baseline."""
    first, chosen = next(iter(indices.items()))
    order = sorted(methods, key=lambda method: table.values(chosen, first, method, CRITERION).mean())
    figure = Figure(figsize=(2.2 + 1.75 * len(indices), 0.26 * len(methods) + 1.0), dpi=200, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(indices), sharey=True, squeeze=False)[0]
    for axes, (baseline, chosen) in zip(panels, indices.items(), strict=True):
        for place, method in enumerate(order):
            (interval,) = bootstrap(table.values(chosen, baseline, method, CRITERION)[:, None])
            color = "#d7263d" if method in OURS else "#2a62c9" if method in OUTSIDE_METHODS else "#444444"
            axes.plot((interval.low, interval.high), (place, place), color=color, linewidth=1.4)
            axes.plot(interval.mean, place, "o", color=color, markersize=4)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_title(f"{baseline}, {len(chosen)} images", fontsize=8.5, loc="left")
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=0)
    panels[0].set_yticks(range(len(order)), [METHOD_LABELS[method] for method in order], fontsize=8)
    figure.supxlabel(
        "insertion AUC minus deletion AUC, with 95 % intervals; higher is better\n"
        "red: GMAR++, gray: gmarpp's other methods, blue: other libraries",
        fontsize=8.5,
    )
    return figure


def benchmark(
    data: L.LightningDataModule,
    ckpt_path: str = "checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors",
    output: str = "results/benchmark_faithfulness",
    methods: Sequence[str] = METHODS,
    images: dict[str, int] = IMAGES,
    skip: int = 160,
    steps: int = 8,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
) -> None:
    """Score all methods under all baselines and write the tables and the chart.

    Args:
        data: data module; the images are those it predicts on.
        ckpt_path: checkpoint of a timm Vision Transformer, as for `explain.py`.
        output: folder of the results.
        methods: names of methods of gmarpp and other libraries.
        images: number of images under each baseline.
        skip: number of images left out before those, the development images of `study.py`.
        steps: of the insertion and deletion curves.
        precision: of the scores.
        device: that computes, for example `cpu` or `cuda:0`.
    """
    unknown = [method for method in methods if method not in METHOD_LABELS]
    if unknown:
        raise SystemExit(f"--methods: {', '.join(unknown)} unknown: choose from {', '.join(METHOD_LABELS)}")
    computing = torch.device(device)
    model, dataset = open_images(ckpt_path, data, computing)
    order = spread_over_classes(dataset.labels, skip + max(images.values())).tolist()[skip:]
    indices = {baseline: order[:count] for baseline, count in images.items()}
    options = {"ckpt_path": Path(ckpt_path).name, "steps": steps, "precision": precision}
    table = ScoreTable(Path(output), options)
    fill(table, model, dataset, indices, methods, explain, steps, precision)

    parts = []
    values: dict[str, object] = {}
    references = [method for method in REFERENCES if method in methods]
    for baseline, chosen in indices.items():
        parts += [f"## {baseline}, {len(chosen)} images", means_table(table, chosen, baseline, methods)]
        parts += [differences_table(table, chosen, baseline, reference, methods) for reference in references]
        values[baseline] = {
            metric: {
                method: {
                    "mean": dataclasses.asdict(bootstrap(table.values(chosen, baseline, method, metric)[:, None])[0]),
                    **{
                        f"{reference} minus this": dataclasses.asdict(
                            table.difference(chosen, baseline, reference, method, metric)
                        )
                        for reference in references
                    },
                }
                for method in methods
            }
            for metric in table.metrics
        }
    shared = min(images.values())
    parts += [f"## Ranks by insertion AUC minus deletion AUC, {shared} images", ranks_table(table, indices, methods)]
    parts += ["## Rank correlation between baselines", agreement_table(table, indices, methods)]
    folder = Path(output)
    report = {
        **machine(computing),
        **gpu_memory(computing),
        **options,
        "skip": skip,
        "images": images,
        "baselines": values,
    }
    write_atomically(folder / "faithfulness.json", (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(folder / "faithfulness.md", ("\n\n".join(parts) + "\n").encode())
    write_atomically(folder / "faithfulness.png", figure_bytes(figure_of(table, indices, methods)))
    print("\n\n".join(parts))


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
