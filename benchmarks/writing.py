"""Speed and memory of the predict loop with its writer and without, on validation images of Tiny-ImageNet.

    python benchmarks/writing.py --root data [--images 10000] [--few 1000] [--output results/writing]
    python benchmarks/writing.py --root data --device cuda --precision bf16-mixed --batch 256 --workers 8 --rounds 1

Runs come in pairs, the writer first in every other pair, so that a drifting machine favors neither. Every run is a
process of its own, without faithfulness metrics. Times include tables, figures and report; those after the first
`--few` images leave the start out. Peak memory (VmHWM) is read there and at the end. Whole batches are explained: a few
images more than asked for may count. Where there are fewer files than images, they are read again and again.

For comparison: the same network and methods, the forward pass alone, and the loader alone, each with nothing beside it.

Results are kept until all runs are done: ext4 is slow to create files for minutes after it has deleted many, so do not
delete another large folder shortly before. Prints JSON.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from measure import (
    Profile,
    add_device,
    add_profile,
    gpu_memory,
    machine,
    profiled,
    resident_mebibytes,
    seconds,
    synchronize,
    trainer_device,
)
from typing_extensions import override

import gmarpp
from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import TinyImageNet
from gmarpp.explainer import Explainer
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.trainer import Trainer


class _Repeated(TinyImageNet):
    """Tiny-ImageNet's validation images, again and again until there are as many as asked for."""

    least = 0

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        images = self.datasets["predict"]
        number = max(self.least, len(images))
        images.rows, images.labels = np.resize(images.rows, number), np.resize(images.labels, number)


class _Early(L.Callback):
    """Reads clock and peak memory when some images are explained, and begins a profile there."""

    def __init__(self, batches: int, device: torch.device, profile: Profile | None = None) -> None:
        self.batches, self.device, self.profile = batches, device, profile
        self.mebibytes, self.time = 0.0, time.perf_counter()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx + 1 == self.batches:
            self.mebibytes = resident_mebibytes("VmHWM")
            synchronize(self.device)
            self.time = time.perf_counter()
            if self.profile is not None:
                self.profile.__enter__()


def _data(options: argparse.Namespace, model: Any) -> TinyImageNet:
    data = _Repeated(
        root=options.root, preprocessing=model.preprocessing, batch_size=options.batch, num_workers=options.workers
    )
    data.least = options.images
    return data


def _predict(options: argparse.Namespace, output: Path | None, images: int, profile: Profile | None = None) -> Any:
    """Explain images; return their number, seconds, seconds after the first few, and early peak memory."""
    model = load_classifier(options.ckpt_path)
    model.explainer = Explainer(methods=options.methods, metrics=[])
    data = _data(options, model)
    early = _Early(max(1, min(options.few, images // 2) // options.batch), options.device, profile)
    trainer = Trainer(
        **trainer_device(options.device),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        precision=options.precision,
        limit_predict_batches=-(-images // options.batch),
        callbacks=[early] if output is None else [early, ExplanationWriter(output)],
    )
    elapsed = seconds(lambda: trainer.predict(model, data, return_predictions=False), options.device)
    later = time.perf_counter() - early.time
    if profile is not None:
        profile.__exit__()
    explained = min(len(data.predict_dataloader().dataset), trainer.limit_predict_batches * options.batch)
    return explained, elapsed, (explained - early.batches * options.batch) / later, early.mebibytes


def measured(options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Explain images; return images per second and peak resident MiB."""
    explained, elapsed, later, mebibytes = _predict(options, output, options.images)
    return {
        "images": explained,
        "images per second": round(explained / elapsed, 2),
        "images per second after the first few": round(later, 2),
        "peak MiB after few images": round(mebibytes),
        "peak MiB": round(resident_mebibytes("VmHWM")),
        **gpu_memory(options.device),
    }


def profile(options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Profile the loop, without its start."""
    folders = iter(range(2))

    def run(around: Profile) -> None:
        _predict(options, output and output / str(next(folders)), 2 * options.few, around)

    return profiled(run, options.device)


def alone(options: argparse.Namespace, _: Path | None) -> dict[str, Any]:
    """Return the images per second of the methods, of the forward pass and of the loader, each with nothing beside."""
    model, device = load_classifier(options.ckpt_path), options.device
    data = _data(options, model)
    data.setup("predict")
    network = model.model.to(device).eval()
    batches = iter(data.predict_dataloader())
    images = next(batches)["image"].to(device)
    # What the workers have loaded ahead does not count.
    for _ in range(2 * options.workers):
        next(batches, None)
    start = time.perf_counter()
    loaded = sum(len(batch["image"]) for batch in batches)
    rates = {"loader": round(loaded / (time.perf_counter() - start), 1)} if loaded else {}

    def rate(run: Callable[[], object]) -> float:
        bfloat16 = options.precision == "bf16-mixed"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            once = min(seconds(run, device) for _ in range(3))
            number = max(1, round(3 / once))
            return round(number * len(images) / seconds(lambda: [run() for _ in range(number)], device), 1)

    def forward() -> None:
        with torch.no_grad():
            network(images)

    rates["methods"] = rate(lambda: gmarpp.explain(network, images, options.methods))
    return rates | {"forward pass": rate(forward)}


def _send(connection: Connection, job: Callable[..., Any], *arguments: Any) -> None:
    connection.send(job(*arguments))


def in_process(job: Callable[..., dict[str, Any]], options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Run a job in a fresh process, and add the MiB on disk that it leaves."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # The process is forked, and so are its workers: those of a spawned process would be spawned, and start slowly. Up
    # to then no GPU is in use, which a forked process could not use either.
    process = multiprocessing.get_context("fork").Process(target=_send, args=(sender, job, options, output))
    process.start()
    # With the parent's copy open, a child that died would leave `recv` waiting.
    sender.close()
    result: dict[str, Any] = receiver.recv()
    process.join()
    if output is not None:
        result["MiB on disk"] = round(sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 2**20)
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--ckpt_path", default="checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    parser.add_argument("--methods", nargs="+", default=["gmarpp_l1", "rollout"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=1_000, help="images of the early reading of peak memory")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="Lightning's, for example bf16-mixed")
    add_device(parser)
    add_profile(parser)
    parser.add_argument("--output", type=Path, help="keep the results of the last run here")
    options = parser.parse_args()
    kinds = ("with the writer", "without")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.rounds):
            for kind in kinds if pair % 2 == 0 else reversed(kinds):
                output = Path(scratch) / str(pair) if kind == "with the writer" else None
                runs[kind].append(in_process(measured, options, output))
        profiles = {
            kind: in_process(profile, options, Path(scratch) / "profile" if kind == "with the writer" else None)
            for kind in (kinds if options.profile else ())
        }
        if options.output is not None:
            shutil.move(Path(scratch) / str(options.rounds - 1), options.output)
    rates = {
        name: [statistics.mean(run[name] for run in runs[kind]) for kind in kinds]
        for name in ("images per second", "images per second after the first few")
    }
    by_itself = in_process(alone, options, None)
    report = {
        **machine(options.device),
        **vars(options),
        **runs,
        "alone, images per second": by_itself,
        "ratio": {name: round(written / unwritten, 3) for name, (written, unwritten) in rates.items()},
        "without the writer / methods alone": {
            name: round(unwritten / by_itself["methods"], 3) for name, (_, unwritten) in rates.items()
        },
        "profile": profiles,
    }
    print(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    main()
