"""Time of maps and faithfulness metrics: gmarpp, other libraries, and the procedure first published for GMAR++.

    pip install -e '.[bench]'
    python benchmarks/speed.py --output results/speed.json [--network vit_large_patch16_224] [--precision bfloat16]

Everything runs on one network, one set of images, one precision and the same threads, by turns in one run; weights and
images are random, since time does not depend on them. Writes JSON, after every part of the run, and beside it a chart
(.png). `forwards` is a time as a multiple of a forward pass without gradients of the same network, image for image,
taken right before and after. Jobs above 20 s are timed once.

Where a library accepts no timm network, gmarpp runs beside it on a network of the same shape: for torchcam's LeGrad a
torchvision ViT, for legrad-torch an open_clip tower, which gmarpp gets as a timm network of equal weights and outputs.
captum's Layer Grad-CAM is left out: it averages over the channels of tokens instead of over the tokens.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import first_procedure
import matplotlib.pyplot as plt
import outside_cams
import outside_maps
import outside_metrics
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from measure import PRECISIONS, add_device, alternate, autocast, gpu_peak, machine, network
from torch import Tensor, nn

import gmarpp
from gmarpp.labels import METHOD_LABELS
from gmarpp.perturbation import road_scores, score_perturbations

LIBRARIES = ("captum", "grad-cam", "torchcam", "legrad-torch", "quantus")
STEPS = 28
FRACTIONS = (0.2, 0.4, 0.6, 0.8)
BATCH = 32
ONCE_ABOVE = 20.0
OURS, THEIRS = ("#1f5fa8", "#9dc3ea"), ("#6b6b6b", "#c4c4c4")

FIRST_MAP = "first procedure: GMAR++ (L1)"
FIVE = f"gmarpp: {STEPS} steps"
FIVE_OF_ALL = f"gmarpp: {STEPS} steps, {len(gmarpp.METHODS)} methods at once, per method"
FIVE_DROPPED = f"gmarpp: {STEPS} steps, tokens dropped"
FIVE_LONG = f"gmarpp: {first_procedure.STEPS} steps"
FIRST_FIVE = f"first procedure: {first_procedure.STEPS} steps"
# The row of gmarpp that each job is compared with; the five metrics are equal work only at equally many steps.
SAME_TASK = {
    "maps": (
        (FIRST_MAP, "gmarpp: GMAR++ (L1)"),
        ("torchcam: LeGrad", "gmarpp: LeGrad, torchvision"),
        ("legrad-torch: LeGrad", "gmarpp: LeGrad, CLIP"),
    ),
    "metrics": (
        *((FIRST_FIVE, ours) for ours in (FIVE_LONG, FIVE, FIVE_OF_ALL, FIVE_DROPPED)),
        ("torchcam: insertion and deletion", "gmarpp: insertion and deletion"),
        ("torchcam: Average Drop, Increase", "gmarpp: Average Drop, Increase, Gain"),
        ("grad-cam: ROAD", "gmarpp: ROAD"),
    ),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Something to time.

    Attributes:
        group: heading in the chart.
        name: library and task.
        call: runs it once.
        share: what its time is divided by: the images for maps, the methods for metrics.
    """

    group: str
    name: str
    call: Callable[[], object]
    share: int = 1


def time_jobs(
    jobs: Sequence[Job], model: nn.Module, images: Tensor, precision: str, repeats: int, skip: Sequence[str]
) -> dict[str, Row]:
    """Time jobs, except those to skip, by turns with a network's forward pass over the images.

    Returns:
        By name of the job: group, seconds and forward passes per share (medians), and number of runs; on a GPU also the
        peak MiB of the call.
    """
    device = images.device

    def within(call: Callable[[], object]) -> None:
        with autocast(precision, device):
            call()

    @torch.no_grad()
    def forward() -> None:
        model(images)

    jobs = [job for job in jobs if job.name not in skip]
    calls = {job.name: partial(within, job.call) for job in jobs}
    timings = alternate(calls, partial(within, forward), repeats, ONCE_ABOVE, device)
    rows: dict[str, Row] = {}
    for job in jobs:
        runs = timings[job.name]
        rows[job.name] = {
            "group": job.group,
            "seconds": statistics.median(run.seconds for run in runs) / job.share,
            "forwards": statistics.median(run.seconds / run.forward for run in runs) * len(images) / job.share,
            "runs": len(runs),
        }
        if device.type == "cuda":
            rows[job.name]["peak MiB"] = gpu_peak(calls[job.name], device)
    return rows


def maps_of_timm(model: nn.Module, images: Tensor, precision: str, repeats: int, skip: Sequence[str]) -> dict[str, Row]:
    """Time maps of the network itself, per image."""
    batch, one = len(images), images[:1]
    target = model(images).detach().argmax(dim=1)
    calls = {f"gmarpp: {len(gmarpp.METHODS)} methods in one call": partial(gmarpp.explain, methods=gmarpp.METHODS)}
    calls |= {
        f"gmarpp: {METHOD_LABELS[method]}": partial(gmarpp.explain, methods=method)
        for method in (*gmarpp.METHODS, *gmarpp.VARIANTS)
    }
    calls |= {
        "captum: Saliency": outside_maps.saliency,
        "grad-cam: Grad-CAM": outside_maps.grad_cam,
        "torchcam: Grad-CAM": outside_cams.torchcam_grad_cam,
    }
    integrated_gradients = partial(IntegratedGradients(model).attribute, one, target=target[:1])
    group = "Maps of a timm ViT"
    jobs = [Job(group, name, partial(call, model, images, target=target), batch) for name, call in calls.items()]
    jobs += [
        Job(group, "captum: Integrated Gradients, 50 steps", partial(integrated_gradients, internal_batch_size=batch)),
        Job(group, "captum: Occlusion by patches", partial(outside_maps.occlusion, model, one, target[:1])),
        Job(group, FIRST_MAP, partial(first_procedure.gmarpp, model, one, int(target[0]))),
    ]
    return time_jobs(jobs, model, images, precision, repeats, skip)


def maps_of_torchvision(
    model: nn.Module, images: Tensor, precision: str, repeats: int, skip: Sequence[str]
) -> dict[str, Row]:
    """Time LeGrad of a torchvision network of the same shape, per image."""
    group, batch = "LeGrad of a torchvision ViT", len(images)
    twin = outside_cams.torchvision_twin(model, images.shape[-1]).to(images.device)
    target = twin(images).detach().argmax(dim=1)
    jobs = [
        Job(group, "gmarpp: LeGrad, torchvision", partial(gmarpp.explain, twin, images, "legrad", target), batch),
        Job(group, "torchcam: LeGrad", partial(outside_cams.torchcam_legrad, twin, images, target), batch),
    ]
    return time_jobs(jobs, twin, images, precision, repeats, skip)


def maps_of_clip(model: nn.Module, images: Tensor, precision: str, repeats: int, skip: Sequence[str]) -> dict[str, Row]:
    """Time LeGrad of a CLIP image tower of the same shape for a prompt and one image, as legrad-torch takes them."""
    image, group = images[:1], "LeGrad of a CLIP image tower, one image"
    clip, twin = outside_cams.clip_twins(model, image.shape[-1], image)
    text = F.normalize(torch.randn(1, twin.num_classes, device=image.device), dim=-1)

    def score(features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) @ text[0]

    legrad = outside_cams.legrad_torch
    jobs = [
        Job(group, "gmarpp: LeGrad, CLIP", partial(gmarpp.explain, twin, image, "legrad", score)),
        Job(group, "legrad-torch: LeGrad", legrad(clip, image, text, first_layer=0)),
        Job(group, "legrad-torch: LeGrad, last two layers", legrad(clip, image, text, first_layer=-2)),
    ]
    return time_jobs(jobs, twin, image, precision, repeats, skip)


def metrics(model: nn.Module, images: Tensor, precision: str, repeats: int, skip: Sequence[str]) -> dict[str, Row]:
    """Time metrics of the first image, per method, and count the images that pass through the network."""
    image = images[:1]
    explanation = gmarpp.explain(model, image, gmarpp.METHODS)
    target, map_ = explanation.target, explanation.maps["gmarpp_l1"]
    score = partial(score_perturbations, model, image, {"gmarpp_l1": map_}, target, steps=STEPS, batch_size=BATCH)
    score_all = partial(score_perturbations, model, image, explanation.maps, target, steps=STEPS, batch_size=BATCH)
    score_first = partial(first_procedure.faithfulness, model, image, map_[0], int(target[0]))
    road = partial(road_scores, model, image, {"gmarpp_l1": map_}, target, fractions=FRACTIONS, batch_size=BATCH)
    given = (model, image, map_, target)
    five, curves, kept, imputed = "Five metrics", "Curves", "Kept region", f"ROAD, {len(FRACTIONS)} shares"
    jobs = [
        Job(five, FIVE, score),
        Job(five, FIVE_OF_ALL, score_all, len(gmarpp.METHODS)),
        Job(five, FIVE_DROPPED, partial(score, baseline="drop")),
        Job(five, FIVE_LONG, partial(score, steps=first_procedure.STEPS)),
        Job(five, FIRST_FIVE, score_first),
        Job(curves, "gmarpp: insertion and deletion", partial(score, kept=False)),
        Job(curves, "torchcam: insertion and deletion", partial(outside_metrics.torchcam_curves, *given, STEPS)),
        Job(curves, "quantus: deletion", partial(outside_metrics.quantus_deletion, *given, STEPS)),
        Job(kept, "gmarpp: Average Drop, Increase, Gain", partial(score, curves=False, mask="soft", baseline="mean")),
        Job(kept, "torchcam: Average Drop, Increase", partial(outside_metrics.torchcam_drop_and_increase, *given)),
        Job(imputed, "gmarpp: ROAD", road),
        Job(imputed, "grad-cam: ROAD", partial(outside_metrics.grad_cam_road, *given, FRACTIONS)),
    ]
    scored: dict[str, int] = {}

    def counting(job: Job) -> None:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            scored[job.name] += len(args[0])

        scored[job.name] = 0
        handle = model.blocks[0].register_forward_pre_hook(add)
        job.call()
        handle.remove()

    rows = time_jobs(
        [replace(job, call=partial(counting, job)) for job in jobs], model, images, precision, repeats, skip
    )
    for job in jobs:
        if job.name in rows:
            rows[job.name]["scored images"] = scored[job.name] / job.share
    return rows


def theirs_over_ours(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the time of others as a multiple of gmarpp's: above 1, gmarpp is faster.

    In one precision both count in multiples of the forward passes beside them, which are robust against a drifting
    machine.
    """
    ratios = {}
    precisions = [(precision, precision) for precision in PRECISIONS if precision in report]
    if len(precisions) == len(PRECISIONS):
        precisions.append(("float32", "bfloat16"))
    for theirs_in, ours_in in precisions:
        for kind, pairs in SAME_TASK.items():
            for theirs, ours in pairs:
                measured = theirs in report[theirs_in][kind] and ours in report[ours_in][kind]
                if measured and (theirs_in == ours_in or theirs.startswith("first procedure")):
                    unit = "forwards" if theirs_in == ours_in else "seconds"
                    ratio = report[theirs_in][kind][theirs][unit] / report[ours_in][kind][ours][unit]
                    ratios[f"{theirs}, {theirs_in} / {ours}, {ours_in}"] = round(ratio, 2)
    return ratios


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw maps above and metrics below, a bar per job and precision."""
    tables = [report[report["precision"][0]][kind] for kind in SAME_TASK]
    heights = [len(table) + len({row["group"] for row in table.values()}) for table in tables]
    figure, panels = plt.subplots(2, figsize=(10, 0.3 * sum(heights) + 2), height_ratios=heights, layout="constrained")
    draw_bars(panels[0], report, "maps", "forwards", "time per image, in forward passes without gradients")
    draw_bars(panels[1], report, "metrics", "seconds", "seconds per image and method")
    place = report.get("gpu", f"{report['threads']} threads of {report['processor']}")
    figure.suptitle(f"{report['network']}, {report['size']} px; {place}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bars(axes: Axes, report: Mapping[str, Any], kind: str, value: str, label: str) -> None:
    """Draw the rows of one kind by group, the fastest of each group first."""
    precisions: list[str] = report["precision"]
    table: dict[str, Row] = report[precisions[0]][kind]
    groups = list(dict.fromkeys(row["group"] for row in table.values()))
    names = sorted(table, key=lambda name: (groups.index(table[name]["group"]), table[name][value]))
    lines = [line for group in groups for line in (group, *(name for name in names if table[name]["group"] == group))]
    colors = [OURS if name.startswith("gmarpp") else THEIRS for name in names]
    height = 0.8 / len(precisions)
    for index, precision in enumerate(precisions):
        bars = axes.barh(
            [lines.index(name) + (index - (len(precisions) - 1) / 2) * height for name in names],
            [report[precision][kind][name][value] for name in names],
            0.9 * height,
            color=[color[index] for color in colors],
        )
        axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=7)
    scored = {name: f"  ({row['scored images']:.3g} scored)" for name, row in table.items() if "scored images" in row}
    axes.set_yticks(range(len(lines)), [line + scored.get(line, "") for line in lines], fontsize=8)
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line in groups else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.margins(x=0.06)
    if value == "forwards":
        axes.set_xlim(
            left=min(1.0, *(0.9 * report[precision][kind][name][value] for precision in precisions for name in names))
        )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{label} (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(color=color, label=f"{who}, {precision}")
            for who, shades in (("gmarpp", OURS), ("others", THEIRS))
            for color, precision in zip(shades, precisions, strict=False)
        ],
        fontsize=8,
        loc="lower right",
    )


def main() -> None:
    """Measure, print JSON, and write it with the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_large_patch16_224", help="a timm VisionTransformer")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=4, help="batch of the maps; the metrics take its first image")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    parser.add_argument("--skip", nargs="*", default=[], metavar="JOB", help="names in the output to leave out")
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"))
    options = parser.parse_args()

    report: dict[str, Any] = machine(options.device) | {library: version(library) for library in LIBRARIES}
    report |= {name: value for name, value in vars(options).items() if name != "output"} | {
        "device": str(options.device)
    }
    model = network(options.network, options.size).to(options.device)
    images = torch.randn(options.images, 3, options.size, options.size, device=options.device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for precision in options.precision:
        run = (model, images, precision, options.repeats, options.skip)
        report[precision] = {kind: {} for kind in SAME_TASK}
        for kind, measure in (
            ("maps", maps_of_timm),
            ("maps", maps_of_torchvision),
            ("maps", maps_of_clip),
            ("metrics", metrics),
        ):
            print(precision, measure.__name__, file=sys.stderr)
            report[precision][kind] |= measure(*run)
            options.output.write_text(json.dumps(report, indent=2))
    report["theirs / ours"] = theirs_over_ours(report)
    options.output.write_text(json.dumps(report, indent=2))
    draw(report, options.output.with_suffix(".png"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
