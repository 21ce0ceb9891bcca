"""Time and peak memory of explaining, as multiples of the network's own forward pass, alternating in one run.

    python benchmarks/engine.py [--device cuda] [--network vit_large_patch16_224 --size 224 --batch 8 --classes 1 5]

Weights are random: neither time nor memory depends on them. Without --network, a GPU is measured on several. Peak
memory is above weights and images: on a CPU the resident set of a fresh process in float32 (Linux), on a GPU what
PyTorch allocates, in the row's precision. On a GPU the kernels of a call are counted, too, beside the plain gradient's,
and each call is also timed as a CUDA graph (`gmarpp.GraphedExplain`), by the same forward pass, which is none, beside
that pass as a graph.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measure import JOBS, add_device, alternate, autocast, gpu_peak, machine, network, peak, precisions, run_job
from torch.profiler import ProfilerActivity, profile

import gmarpp

BALANCED = ("token_relevance", "gmarpp_balanced")


@dataclass(frozen=True)
class Case:
    """A network, its images, and the precisions to measure; none for all that the device computes in."""

    name: str
    size: int
    batch: int
    precisions: tuple[str, ...] = ()


ON_CPU = (Case("vit_large_patch16_224", 224, 8),)
ON_GPU = (
    Case("vit_large_patch16_224", 224, 128, ("bfloat16",)),
    Case("vit_large_patch16_224", 224, 32),
    Case("vit_small_patch14_dinov2", 518, 8, ("float32", "bfloat16")),
    Case("vit_large_patch14_dinov2", 518, 8, ("bfloat16",)),
)


class Measured:
    """A network with images on a device, in one precision."""

    def __init__(self, case: Case, precision: str, device: torch.device) -> None:
        self.device, self.precision = device, precision
        self.model = network(case.name, case.size, device=device).requires_grad_(False)
        self.images = torch.randn(case.batch, 3, case.size, case.size, device=device)

    @torch.no_grad()
    def forward(self) -> None:
        """Run the network without gradients."""
        with autocast(self.precision, self.device):
            self.model(self.images)

    def job(self, job: str, classes: int = 1) -> None:
        """Run one of `JOBS`."""
        with autocast(self.precision, self.device):
            run_job(job, self.model, self.images, classes)

    def maps(self, *methods: str) -> None:
        """Make the maps of some methods."""
        with autocast(self.precision, self.device):
            gmarpp.explain(self.model, self.images, methods, 0)

    def graphed(self, *methods: str) -> gmarpp.GraphedExplain:
        """Capture the maps of some methods."""
        with autocast(self.precision, self.device):
            return gmarpp.GraphedExplain(self.model, self.images, methods, 0)

    def graphed_forward(self) -> Callable[[], None]:
        """Capture the forward pass."""
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.forward()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with torch.cuda.graph(graph):
            self.forward()
        return graph.replay

    def kernels(self, job: str) -> tuple[int, float]:
        """Count the kernels of a job, and the milliseconds that they keep the GPU busy."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.job(job)
            torch.cuda.synchronize(self.device)
        events = [each for each in profiled.events() if "CUDA" in str(each.device_type)]
        return len(events), sum(each.device_time for each in events) / 1000


def times(measured: Measured, classes: list[int], repeats: int) -> dict[str, str]:
    """Return medians of paired ratios to the forward pass, by job."""
    count = len(gmarpp.METHODS)
    jobs: dict[str, Callable[[], None]] = {"gradient": partial(measured.job, "gradient")}
    jobs |= {
        f"{count} methods" + (f", {each} classes" if each > 1 else ""): partial(measured.job, "kept", each)
        for each in classes
    }
    wanted = calls()
    jobs |= {name: partial(measured.maps, *methods) for name, methods in wanted.items() if name not in jobs}
    jobs[f"{count}, recomputed"] = partial(measured.job, "recomputed")
    timings = alternate(jobs, measured.forward, repeats, device=measured.device)
    forward = statistics.median(run.forward for runs in timings.values() for run in runs)
    row = {"forward, ms per image": f"{1000 * forward / len(measured.images):.3f}"}
    return row | {
        job: f"{statistics.median(run.seconds / run.forward for run in runs):.2f}" for job, runs in timings.items()
    }


def calls() -> dict[str, tuple[str, ...]]:
    """Return the methods of each call that is timed, by its name."""
    every = (*gmarpp.METHODS, *gmarpp.VARIANTS)
    alone = {f"`{method}`": (method,) for method in ("gmarpp_l1", "legrad", "rollout", *BALANCED)}
    return {
        f"{len(gmarpp.METHODS)} methods": gmarpp.METHODS,
        **alone,
        "both balanced": BALANCED,
        f"all {len(every)}": every,
    }


def graphed_times(measured: Measured, repeats: int) -> dict[str, str]:
    """Return medians of the ratios of calls captured as CUDA graphs, one after the other as each keeps its memory."""
    forward = alternate({"": measured.graphed_forward()}, measured.forward, repeats, device=measured.device)[""]
    found = {"forward, graphed": f"{statistics.median(run.seconds / run.forward for run in forward):.2f}"}
    for name, methods in calls().items():
        call = measured.graphed(*methods)
        runs = alternate({name: partial(call, measured.images)}, measured.forward, repeats, device=measured.device)
        found[f"{name}, graphed"] = f"{statistics.median(run.seconds / run.forward for run in runs[name]):.2f}"
        del call
    return found


def memory(measured: Measured, case: Case) -> dict[str, str]:
    """Return the peak MiB per image of all methods, kept and recomputed, and of the gradient alone."""
    if measured.device.type == "cuda":
        peaks = [gpu_peak(partial(measured.job, job), measured.device) / case.batch for job in JOBS]
    else:
        peaks = [peak(job, case.name, case.batch, case.size) for job in JOBS]
    return {"MiB per image: " + " / ".join(JOBS): " / ".join(f"{each:.1f}" for each in peaks)}


def kernels(measured: Measured) -> dict[str, str]:
    """Return how many kernels per block are launched beside those of the gradient, and their share of GPU time."""
    (all_launched, all_busy), (launched, busy) = (measured.kernels(job) for job in ("kept", "gradient"))
    blocks = len(gmarpp.architecture_of(measured.model).blocks)
    return {
        "kernels per block beside the gradient's": f"{(all_launched - launched) / blocks:.0f}",
        "their share of GPU time": f"{100 * (1 - busy / all_busy):.0f} %",
    }


def main() -> None:
    """Measure what was asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--network", help="a timm VisionTransformer")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=[], help="all that the device computes in by default")
    parser.add_argument("--classes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    print(json.dumps(machine(options.device)), flush=True)
    cases = ON_GPU if options.device.type == "cuda" else ON_CPU
    if options.network:
        cases = (Case(options.network, options.size, options.batch),)
    for case in cases:
        for precision in options.precision or case.precisions or precisions(options.device):
            measured = Measured(case, precision, options.device)
            row = {"network, pixels, batch": f"{case.name}, {case.size}, {case.batch}", "precision": precision}
            row |= times(measured, options.classes, options.repeats)
            row |= graphed_times(measured, options.repeats) if options.device.type == "cuda" else {}
            row |= {} if options.no_memory else memory(measured, case)
            row |= kernels(measured) if options.device.type == "cuda" else {}
            if case is cases[0] and precision == (options.precision or precisions(options.device))[0]:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
