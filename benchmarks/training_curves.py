"""Accuracy and attribution metrics over a training run that `AttributionMonitor` watched.

    python benchmarks/training_curves.py --logs logs/version_0 [logs/version_1] --output results/training.png

Takes TensorBoard folders of one run; for a run that was interrupted and resumed, give all of them, the later ones last.
Writes a chart, and prints its figures as JSON.
"""

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmarpp.labels import METHOD_LABELS, method_color, metric_label

ACCURACY = {"val/accuracy": "top 1", "val/accuracy_top5": "top 5"}
METRICS = ("insertion_auc", "deletion_auc")


def read(folders: list[Path]) -> dict[str, dict[int, float]]:
    """Return values by step of each scalar; where folders overlap, the later one's."""
    scalars: dict[str, dict[int, float]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            # Steps count from zero, and the value belongs to what has been learned after the step.
            scalars.setdefault(tag, {}).update({event.step + 1: event.value for event in events.Scalars(tag)})
    return scalars


def draw(scalars: dict[str, dict[int, float]], output: Path) -> None:
    """Draw accuracy, and each metric with a line per method."""
    figure = Figure(figsize=(11, 3.4), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    accuracy, *panels = figure.subplots(1, 1 + len(METRICS))
    for (tag, label), color in zip(ACCURACY.items(), ("#1f5fa8", "#9dc3ea"), strict=True):
        draw_line(accuracy, scalars[tag], label, color)
    accuracy.set_title("Accuracy", fontsize=10, loc="left")
    for axes, metric in zip(panels, METRICS, strict=True):
        for method, label in METHOD_LABELS.items():
            if (tag := f"attribution/{method}/{metric}") in scalars:
                draw_line(axes, scalars[tag], label, method_color(method))
        axes.set_title(metric_label(metric), fontsize=10, loc="left")
    accuracy.legend(fontsize=8, frameon=False, loc="lower right")
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (accuracy, *panels):
        axes.set_xlabel("training step", fontsize=9)
        axes.set_xlim(left=0)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(output)


def draw_line(axes: Axes, values: dict[int, float], label: str, color: str) -> None:
    """Draw one scalar over the steps."""
    steps = sorted(values)
    axes.plot(steps, [values[step] for step in steps], "o-", markersize=3.5, linewidth=1.4, label=label, color=color)


def main() -> None:
    """Read, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="TensorBoard folders, the later ones last")
    parser.add_argument("--output", type=Path, default=Path("results/training.png"))
    options = parser.parse_args()
    scalars = read(options.logs)
    if missing := [tag for tag in ACCURACY if tag not in scalars]:
        raise SystemExit(f"--logs: no {', '.join(missing)} in {', '.join(map(str, options.logs))}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(scalars, options.output)
    shown = {tag: values for tag, values in scalars.items() if tag in ACCURACY or tag.endswith(METRICS)}
    print(json.dumps({tag: dict(sorted(values.items())) for tag, values in sorted(shown.items())}, indent=2))


if __name__ == "__main__":
    main()
