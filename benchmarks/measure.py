"""Time, peak memory and the machine they belong to, for the benchmarks beside this file."""

import datetime
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch

import gmarpp

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """One timed call.

    Attributes:
        seconds: of the call.
        forward: seconds of a forward pass without gradients, mean of the one before the call and the one after it.
    """

    seconds: float
    forward: float


def machine() -> dict[str, object]:
    """Say what the figures of a run belong to."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def network(name: str, size: int, depth: int | None = None) -> torch.nn.Module:
    """Make a timm network with random weights and 200 classes, for images of `size` pixels."""
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    return timm.create_model(name, img_size=size, num_classes=200, **options).eval()


def autocast(precision: str) -> torch.autocast:
    """Give a context that computes in a precision: a new one for each call, since it keeps converted weights."""
    dtype = PRECISIONS[precision]
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(
    jobs: Mapping[str, Callable[[], object]],
    forward: Callable[[], object],
    rounds: int,
    once_above: float = math.inf,
) -> dict[str, list[Timing]]:
    """Time jobs in turn, with a forward pass between each and the next, so that a drifting machine drifts for all.

    Args:
        jobs: what to time, by name.
        forward: the pass they are compared with.
        rounds: how often each job has its turn.
        once_above: a job that takes longer than so many seconds has one turn only.
    """
    forward()
    timings: dict[str, list[Timing]] = {job: [] for job in jobs}
    before = seconds(forward)
    for _ in range(rounds):
        for job, run in jobs.items():
            if any(timing.seconds > once_above for timing in timings[job]):
                continue
            elapsed, after = seconds(run), seconds(forward)
            timings[job].append(Timing(elapsed, (before + after) / 2))
            before = after
    return timings


def resident_mebibytes(field: str) -> float:
    """Read this process's memory from the system (Linux): VmRSS in use, VmHWM at its peak."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def _peak_of(
    connection: Connection, name: str, batch: int, size: int, depth: int | None, recompute: bool, classes: int
) -> None:
    gmarpp.explain(network("vit_tiny_patch16_224", 32, 1), torch.randn(1, 3, 32, 32))  # imports, thread pools
    model, images = network(name, size, depth), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        model(images[:1])
    before = resident_mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    gmarpp.explain(model, images, gmarpp.METHODS, target=torch.arange(classes).repeat(batch, 1), recompute=recompute)
    connection.send(resident_mebibytes("VmHWM") - before)


def peak(
    name: str, batch: int, size: int, depth: int | None = None, recompute: bool = False, classes: int = 1
) -> float:
    """Measure the peak MiB per image of all methods in one call, above weights and images, in a fresh process."""
    # Freed tensors go back to the system at once, so that the resident set is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_peak_of, args=(sender, name, batch, size, depth, recompute, classes)
    )
    process.start()
    # The parent's copy has to go, or a child that died would leave `recv` waiting.
    sender.close()
    mebibytes: float = receiver.recv()
    process.join()
    return round(mebibytes / batch, 1)
