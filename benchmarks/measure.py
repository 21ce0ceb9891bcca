"""Time, peak memory and the machine they belong to, for the other benchmarks."""

import argparse
import cProfile
import datetime
import math
import multiprocessing
import os
import platform
import pstats
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import timm
import torch

import gmarpp

CPU = torch.device("cpu")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
"""Those that every device computes in; a GPU also in tf32 and float16."""
GPU_PRECISIONS = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
JOBS = ("kept", "recomputed", "gradient")
"""All methods with the forward pass's activations kept or recomputed, and the plain gradient of the images."""


@dataclass(frozen=True)
class Timing:
    """One timed call.

    Attributes:
        seconds: of the call.
        forward: seconds of a forward pass without gradients, mean of the one before the call and the one after it.
    """

    seconds: float
    forward: float


def machine(device: torch.device | None = None) -> dict[str, object]:
    """Describe the machine and versions that the figures of a run belong to."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        **gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def add_device(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """Add the option `--device`, which every benchmark takes."""
    parser.add_argument("--device", type=torch.device, default=torch.device(default), help="for example cpu or cuda:0")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add the option `--profile`, of the benchmarks of the three loops."""
    parser.add_argument("--profile", action="store_true", help="also print what takes the time, host and device")


def trainer_device(device: torch.device) -> dict[str, object]:
    """Return the arguments by which a Trainer of Lightning runs on a device."""
    on_gpu = device.type == "cuda"
    return {"accelerator": "gpu" if on_gpu else "cpu", "devices": [device.index or 0] if on_gpu else 1}


def gpu_memory(device: torch.device) -> dict[str, int]:
    """Return the most MiB that PyTorch has allocated on a GPU so far; nothing on another device."""
    return {"peak MiB on the GPU": torch.cuda.max_memory_allocated(device) >> 20} if device.type == "cuda" else {}


def precisions(device: torch.device) -> list[str]:
    """Return the names of the precisions that a device computes in."""
    return list(GPU_PRECISIONS if device.type == "cuda" else PRECISIONS)


def network(name: str, size: int, depth: int | None = None, device: torch.device = CPU) -> torch.nn.Module:
    """Make a timm network with random weights and 200 classes, for images of `size` pixels, on a device."""
    torch.manual_seed(0)
    options = {} if depth is None else {"depth": depth}
    with device:
        return timm.create_model(name, img_size=size, num_classes=200, **options).eval()


@contextmanager
def autocast(precision: str, device: torch.device = CPU) -> Iterator[None]:
    """Compute in a precision, in a context that is new for each call, since autocast keeps converted weights."""
    dtype, tf32 = GPU_PRECISIONS[precision], precision == "tf32"
    if device.type == "cuda":
        # PyTorch 2.9 has new settings, and raises an error when the old ones are read after the new ones were set.
        matmul, convolution = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
        for each in (matmul, convolution):
            if hasattr(each, "fp32_precision"):
                each.fp32_precision = "tf32" if tf32 else "ieee"
            else:
                each.allow_tf32 = tf32
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Time one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    jobs: Mapping[str, Callable[[], object]],
    forward: Callable[[], object],
    rounds: int,
    once_above: float = math.inf,
    device: torch.device = CPU,
) -> dict[str, list[Timing]]:
    """Time jobs in turn, with a forward pass between each and the next, so that a drifting machine affects all alike.

    Args:
        jobs: what to time, by name.
        forward: the pass they are compared with.
        rounds: how often each job has its turn.
        once_above: seconds above which a job has only one turn.
        device: where the jobs run.
    """
    forward()
    if device.type == "cuda":
        # The first run compiles kernels.
        for run in jobs.values():
            run()
    timings: dict[str, list[Timing]] = {job: [] for job in jobs}
    before = seconds(forward, device)
    for _ in range(rounds):
        for job, run in jobs.items():
            if any(timing.seconds > once_above for timing in timings[job]):
                continue
            elapsed, after = seconds(run, device), seconds(forward, device)
            timings[job].append(Timing(elapsed, (before + after) / 2))
            before = after
    return timings


def resident_mebibytes(field: str) -> float:
    """Read this process's memory from the system (Linux): VmRSS in use, VmHWM at its peak."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def run_job(job: str, model: torch.nn.Module, images: torch.Tensor, classes: int = 1) -> None:
    """Run one of `JOBS` with a number of classes per image."""
    if job == "gradient":
        watched = images.detach().requires_grad_()
        torch.autograd.grad(model(watched)[:, 0].sum(), watched)
        return
    target = torch.arange(classes).repeat(len(images), 1)
    gmarpp.explain(model, images, gmarpp.METHODS, target=target, recompute=job == "recomputed")


def _peak_of(
    connection: Connection, job: str, name: str, batch: int, size: int, depth: int | None, classes: int
) -> None:
    # A first call imports modules and starts thread pools.
    gmarpp.explain(network("vit_tiny_patch16_224", 32, 1), torch.randn(1, 3, 32, 32))
    model, images = network(name, size, depth).requires_grad_(False), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        model(images[:1])
    before = resident_mebibytes("VmRSS")
    # Writing 5 resets the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    run_job(job, model, images, classes)
    connection.send(resident_mebibytes("VmHWM") - before)


def peak(job: str, name: str, batch: int, size: int, depth: int | None = None, classes: int = 1) -> float:
    """Measure the peak MiB per image of a job of `JOBS`, float32 on the CPU, above weights and images.

    The job runs in a fresh process.
    """
    # Freed tensors go back to the system at once, so that the resident set is the memory in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_peak_of, args=(sender, job, name, batch, size, depth, classes)
    )
    process.start()
    # With the parent's copy open, a child that died would leave `recv` waiting.
    sender.close()
    mebibytes: float = receiver.recv()
    process.join()
    return round(mebibytes / batch, 1)


def gpu_peak(run: Callable[[], object], device: torch.device) -> float:
    """Measure the peak MiB of a call on a GPU, above the memory in use before."""
    run()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


class Profile(Protocol):
    """What is measured between its beginning and its end."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...


class HostProfile:
    """The functions of the main thread that take the longest, by themselves."""

    def __enter__(self) -> "HostProfile":
        self._profile = cProfile.Profile()
        self._profile.enable()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.disable()

    def report(self, top: int) -> dict[str, object]:
        """Return calls and seconds by function."""
        found: Any = pstats.Stats(self._profile)
        # By file, line and name: calls, all and not recursive, and seconds, by itself and with what it calls.
        functions = sorted(found.stats.items(), key=lambda each: -each[1][2])[:top]
        return {
            "host, seconds": round(found.total_tt, 3),
            "host, calls and seconds by function": {
                f"{name} ({Path(file).name}:{line})": [calls, round(own, 4)]
                for (file, line, name), (_, calls, own, *_) in functions
            },
        }


class DeviceProfile:
    """The kernels and copies of a GPU, and the share of time in which it has any."""

    def __enter__(self) -> "DeviceProfile":
        torch.cuda.synchronize()
        self._trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._trace.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._start
        self._trace.__exit__(None, None, None)

    def report(self, top: int) -> dict[str, object]:
        """Return milliseconds by kernel, and the share of time that the device is busy."""
        kernels: Counter[str] = Counter()
        busy = end = 0.0
        spans = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in self._trace.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        for start, stop, name in sorted(spans):
            kernels[name] += stop - start
            # What runs side by side counts once.
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return {
            "device, share of time busy": round(busy / 1e6 / self._seconds, 4),
            "device, kernels": len(spans),
            "device, milliseconds by kernel": {name[:120]: round(us / 1e3, 2) for name, us in kernels.most_common(top)},
        }


def profiled(run: Callable[[Profile], object], device: torch.device, top: int = 15) -> dict[str, object]:
    """Run twice where there is a GPU, once for each profile, since the host's slows the host down.

    Args:
        run: enters and leaves the profile that it is given, around what counts.
        device: where it runs.
        top: most functions and kernels in the report.
    """
    report: dict[str, object] = {}
    for profile in (DeviceProfile(), HostProfile()) if device.type == "cuda" else (HostProfile(),):
        run(profile)
        report |= profile.report(top)
    return report
