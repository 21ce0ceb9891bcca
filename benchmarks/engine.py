"""Time and peak memory of explaining, as ratios to the network's own forward pass, alternating in one run.

    python benchmarks/engine.py [--network vit_large_patch16_224] [--batch 8] [--classes 1 5] [--tokens]

Weights are random: neither time nor memory depends on them. Peak memory is the resident set of a fresh process (Linux),
above the same process with weights and images loaded.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import PRECISIONS, alternate, autocast, machine, network, peak

import gmarpp


def ratios(name: str, batch: int, size: int, classes: list[int], repeats: int) -> dict[str, dict[str, float]]:
    """Time all methods in one call against the forward pass without gradients; medians of paired ratios."""
    model, images = network(name, size).requires_grad_(False), torch.randn(batch, 3, size, size)
    watched = images.clone().requires_grad_()
    results: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:

        def explain(precision: str = precision, **options: Any) -> None:
            with autocast(precision):
                gmarpp.explain(model, images, **options)

        @torch.no_grad()
        def forward(precision: str = precision) -> None:
            with autocast(precision):
                model(images)

        def plain(precision: str = precision) -> None:
            with autocast(precision):
                torch.autograd.grad(model(watched)[:, 0].sum(), watched)

        methods = len(gmarpp.METHODS)
        jobs: dict[str, Callable[[], None]] = {
            f"{methods} methods, K = {count}": partial(
                explain, methods=gmarpp.METHODS, target=torch.arange(count).repeat(batch, 1)
            )
            for count in classes
        }
        jobs[f"{methods} methods, recomputed"] = partial(explain, methods=gmarpp.METHODS, recompute=True)
        jobs["no method, gradient of the images"] = plain
        jobs["rollout alone"] = partial(explain, methods="rollout")
        timings = alternate(jobs, forward, repeats)
        results[precision] = {
            job: round(statistics.median(run.seconds / run.forward for run in runs), 2) for job, runs in timings.items()
        }
        base = statistics.median(run.forward for runs in timings.values() for run in runs)
        results[precision]["forward, s per image"] = round(base / batch, 3)
    return results


def main() -> None:
    """Measure what was asked for and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_large_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--tokens", action="store_true", help="also 1,370 tokens: ViT-S/14 at 518 px, by depth")
    options = parser.parse_args()
    report: dict[str, object] = machine() | vars(options)
    if not options.no_time:
        report["time / forward"] = ratios(
            options.network, options.batch, options.size, options.classes, options.repeats
        )
    if not options.no_memory:
        report["peak MiB per image above the weights"] = {
            kind: peak(options.network, options.batch, options.size, recompute=recompute)
            for kind, recompute in {"kept": False, "recomputed": True}.items()
        }
    if options.tokens:
        report["peak MiB per image, 1,370 tokens, ViT-S/14, batch 2"] = {
            f"depth {depth}, {kind}": peak("vit_small_patch14_dinov2", 2, 518, depth, recompute)
            for depth in (6, 12, 24)
            for kind, recompute in {"kept": False, "recomputed": True}.items()
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
