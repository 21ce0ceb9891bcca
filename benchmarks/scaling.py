"""Cost of explaining against batch, tokens, depth and classes per image: all methods in one call.

    python benchmarks/scaling.py --output results/scaling.json [--network vit_small_patch16_224] [--precision bfloat16]

One of the four varies at a time; the others stay at batch 4, 224 pixels, depth 12 and one class. Time is a ratio to the
forward pass without gradients of the same images, by turns in one run: where it is flat, the cost grows as that of the
network does. Peak memory is per image, above weights and images, in float32, with the activations of the forward pass
kept or recomputed (Linux). Weights and images are random. Writes JSON and, beside it, a chart (.png).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from measure import GPU_PRECISIONS, add_device, alternate, autocast, gpu_peak, machine, network, peak, run_job

import gmarpp


@dataclass(frozen=True)
class Setting:
    """What is explained.

    Attributes:
        batch: number of images.
        size: side of the images in pixels.
        depth: number of blocks.
        classes: number of classes per image.
    """

    batch: int = 4
    size: int = 224
    depth: int = 12
    classes: int = 1


VARIED = {"batch": (1, 2, 4, 8, 16), "size": (112, 224, 336, 448, 592), "depth": (6, 12, 24), "classes": (1, 2, 5, 10)}
LABELS = {"batch": "images per batch", "size": "tokens", "depth": "blocks", "classes": "classes per image"}
MEMORY = ("kept", "recomputed")
BLUE, ORANGE, GRAY = "#1f5fa8", "#d9822b", "#8a8a8a"
PER_CLASS = "forward + a backward per class"

Row = dict[str, Any]


def cost(name: str, setting: Setting, precision: str, repeats: int, device: torch.device) -> Row:
    """Measure the time, as a median ratio to the forward pass, and the peak memory of one setting."""
    model = network(name, setting.size, setting.depth).requires_grad_(False).to(device)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)

    def explain(job: str = "kept", precision: str = precision) -> None:
        with autocast(precision, device):
            run_job(job, model, images, setting.classes)

    @torch.no_grad()
    def forward() -> None:
        with autocast(precision, device):
            model(images)

    (runs,) = alternate({"explain": explain}, forward, repeats, device=device).values()
    if device.type == "cuda":
        memory = {job: gpu_peak(partial(explain, job, "float32"), device) / setting.batch for job in MEMORY}
    else:
        memory = {job: peak(job, name, setting.batch, setting.size, setting.depth, setting.classes) for job in MEMORY}
    return asdict(setting) | {
        "tokens": model.patch_embed.num_patches + model.num_prefix_tokens,
        "forward, s per image": statistics.median(run.forward for run in runs) / setting.batch,
        "time / forward": statistics.median(run.seconds / run.forward for run in runs),
        "peak MiB per image": memory,
    }


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a column for each quantity that varies: time above, memory below."""
    figure, panels = plt.subplots(2, len(VARIED), figsize=(13, 6), sharex="col", layout="constrained")
    for varied, (time, memory) in zip(VARIED, panels.T, strict=True):
        rows = report[varied]
        positions = [row["tokens" if varied == "size" else varied] for row in rows]
        ratios = [row["time / forward"] for row in rows]
        time.plot(positions, ratios, "o-", color=BLUE, label="all methods")
        if varied == "classes":
            time.plot(
                positions, [1 + (ratios[0] - 1) * count for count in positions], "--", color=GRAY, label=PER_CLASS
            )
        for kind, color in zip(MEMORY, (BLUE, ORANGE), strict=True):
            memory.plot(positions, [row["peak MiB per image"][kind] for row in rows], "o-", color=color, label=kind)
        memory.set_xlabel(LABELS[varied])
        memory.set_xticks(positions)
        for axes in (time, memory):
            axes.set_ylim(0, 1.15 * axes.dataLim.ymax)
            axes.grid(axis="y", color="#e0e0e0")
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("time / forward pass")
    panels[1, 0].set_ylabel("peak MiB per image")
    panels[0, -1].legend(fontsize=8)
    panels[1, -1].legend(fontsize=8, title="activations")
    machine = report.get("gpu", f"{report['threads']} threads of {report['processor']}")
    figure.suptitle(f"{report['network']}, {report['precision']}, {machine}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, print JSON, and write it with the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_small_patch16_224", help="a timm VisionTransformer")
    parser.add_argument("--precision", choices=GPU_PRECISIONS, default="float32")
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/scaling.json"))
    options = parser.parse_args()

    report: dict[str, Any] = machine(options.device) | {"methods": len(gmarpp.METHODS)}
    report |= {name: value for name, value in vars(options).items() if name not in ("output", "device")}
    settings = {name: [replace(Setting(), **{name: value}) for value in values] for name, values in VARIED.items()}
    rows: dict[Setting, Row] = {}
    for setting in dict.fromkeys(setting for each in settings.values() for setting in each):
        rows[setting] = cost(options.network, setting, options.precision, options.repeats, options.device)
        print(json.dumps(rows[setting]), file=sys.stderr)
    report |= {name: [rows[setting] for setting in each] for name, each in settings.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2))
    draw(report, options.output.with_suffix(".png"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
