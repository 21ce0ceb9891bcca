"""Time and peak memory of explaining, as ratios to the network's own forward pass, alternating in one run.

    python benchmarks/engine.py [--network vit_large_patch16_224] [--batch 8] [--classes 1 5] [--tokens]

Weights are random: neither time nor memory depends on them. Peak memory is the resident set of a fresh process (Linux),
above the same process with weights and images loaded.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

import gmarpp

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def network(name: str, size: int, depth: int | None = None) -> torch.nn.Module:
    """Make a network with random weights."""
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    return timm.create_model(name, img_size=size, num_classes=200, **options).eval()


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(name: str, batch: int, size: int, classes: list[int], repeats: int) -> dict[str, dict[str, float]]:
    """Time all methods in one call against the forward pass without gradients; medians of paired ratios."""
    model, images = network(name, size), torch.randn(batch, 3, size, size)
    results: dict[str, dict[str, float]] = {}
    for dtype, autocast in DTYPES.items():

        def explain(autocast: torch.dtype | None = autocast, **options: Any) -> None:
            # A context of its own: autocast must not keep converted weights from one call to the next.
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                gmarpp.explain(model, images, **options)

        @torch.no_grad()
        def forward(autocast: torch.dtype | None = autocast) -> None:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                model(images)

        methods = len(gmarpp.METHODS)
        jobs: dict[str, Callable[[], None]] = {
            f"{methods} methods, K = {count}": partial(
                explain, methods=gmarpp.METHODS, target=torch.arange(count).repeat(batch, 1)
            )
            for count in classes
        }
        jobs[f"{methods} methods, recomputed"] = partial(explain, methods=gmarpp.METHODS, recompute=True)
        jobs["rollout alone"] = partial(explain, methods="rollout")
        forward()
        times: dict[str, list[float]] = {job: [] for job in jobs}
        base: list[float] = []
        for _ in range(repeats):
            for job, run in jobs.items():
                before = seconds(forward)
                elapsed = seconds(run)
                base.append((before + seconds(forward)) / 2)
                times[job].append(elapsed / base[-1])
        results[dtype] = {job: round(statistics.median(each), 2) for job, each in times.items()}
        results[dtype]["forward, s per image"] = round(statistics.median(base) / batch, 3)
    return results


def _resident_mebibytes(field: str) -> float:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def _peak_of(connection: Connection, name: str, batch: int, size: int, depth: int | None, recompute: bool) -> None:
    gmarpp.explain(network("vit_tiny_patch16_224", 32, 1), torch.randn(1, 3, 32, 32))  # imports, thread pools
    model, images = network(name, size, depth), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        model(images[:1])
    before = _resident_mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    gmarpp.explain(model, images, gmarpp.METHODS, recompute=recompute)
    connection.send(_resident_mebibytes("VmHWM") - before)


def peak(name: str, batch: int, size: int, depth: int | None = None, recompute: bool = False) -> float:
    """Measure peak MiB per image above the weights, in a fresh process."""
    # Freed tensors go back to the system at once, so that the resident set is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_peak_of, args=(sender, name, batch, size, depth, recompute)
    )
    process.start()
    mebibytes: float = receiver.recv()
    process.join()
    return round(mebibytes / batch, 1)


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
    report: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(options)}
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
