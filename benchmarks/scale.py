"""Fit and predict on as many images as ImageNet-1k has: seconds, memory and files.

    python benchmarks/scale.py [--trained 1281167] [--explained 50000] [--output results/scale]

The images are hard links to two thousand JPEG files of noise in a thousand class folders, and the network is tiny, so
that what grows with their number is what is seen. `fit` ends after twenty steps. Each part runs in a process of its
own. Prints JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from measure import add_device, machine, resident_mebibytes, seconds, trainer_device
from PIL import Image
from writing import in_process

from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import ImageFolder
from gmarpp.explainer import Explainer
from gmarpp.training.module import ViTClassifier
from gmarpp.training.trainer import Trainer

CLASSES, FILES, STEPS = 1000, 2000, 20
METHODS = ("gmarpp_l1", "rollout")


def make_images(root: Path, trained: int, explained: int) -> None:
    """Write a few files, and link to them from class folders of `train` and `val`."""
    generator, files = np.random.default_rng(0), root / "files"
    files.mkdir(parents=True)
    for number in range(FILES):
        noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(files / f"{number}.jpg")
    for split, images in (("train", trained), ("val", explained)):
        for label in range(CLASSES):
            (root / split / f"n{label:08}").mkdir(parents=True)
        for number in range(images):
            name = f"n{number % CLASSES:08}_{number}.jpg"
            os.link(files / f"{number % FILES}.jpg", root / split / name.partition("_")[0] / name)


def _network() -> ViTClassifier:
    small = {"depth": 2, "patch_size": 8}
    return ViTClassifier("vit_tiny_patch16_224", CLASSES, 64, pretrained=False, model_args=small)


class _Clock(L.Callback):
    """Notes when the first batch of training begins, and what the loader's processes hold by themselves at the end."""

    first, workers = 0.0, ()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self.first = self.first or time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what each of this process's children shares with nobody, in MiB (Linux)."""
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.workers = [_private_mebibytes(child) for child in children]


def _private_mebibytes(process: str) -> int:
    lines = Path("/proc", process, "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) // 1024


def fitted(options: argparse.Namespace, _: Path | None) -> dict[str, Any]:
    """Train for a few steps."""
    data = ImageFolder(str(options.folder), labelled=True, batch_size=64, num_workers=options.workers)
    clock, before = _Clock(), resident_mebibytes("VmRSS")
    trainer = Trainer(
        **trainer_device(options.device),
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0},
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[clock],
    )
    start = time.perf_counter()
    trainer.fit(_network(), data)
    return {
        "images": len(data.datasets["train"]),
        "seconds to the first batch": round(clock.first - start, 2),
        "MiB that it added": round(resident_mebibytes("VmHWM") - before),
        "MiB that each loading process has for itself": clock.workers,
    }


class _Early(L.Callback):
    """Reads the peak memory after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches, self.mebibytes, self.end = batches, 0.0, 0.0

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *others: Any) -> None:
        """Read it, and the time."""
        if others[2] + 1 == self.batches:
            self.mebibytes = resident_mebibytes("VmHWM")
        self.end = time.perf_counter()


def explained(options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """Explain all images, with everything that is written."""
    assert output is not None
    network = _network()
    network.explainer = Explainer(methods=METHODS, metrics=[])
    data = ImageFolder(str(options.folder / "val"), batch_size=64, num_workers=options.workers)
    early = _Early(16)
    trainer = Trainer(
        **trainer_device(options.device),
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        callbacks=[early, ExplanationWriter(output)],
    )
    start = time.perf_counter()
    elapsed = seconds(lambda: trainer.predict(network, data, return_predictions=False), options.device)
    files = [file for file in output.rglob("*") if file.is_file()]
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.relative_to(output).parts[0]] += file.stat().st_size
    return {
        "images": options.explained,
        "images per second": round(options.explained / elapsed, 1),
        "seconds after the last batch": round(start + elapsed - early.end, 2),
        "peak MiB after 1,024 images": round(early.mebibytes),
        "peak MiB": round(resident_mebibytes("VmHWM")),
        "files": len(files),
        "most files in a folder": max(Counter(file.parent for file in files).values()),
        "shards": len(list((output / "maps").glob("*.safetensors"))),
        "MiB by file or folder": {name: round(size / 2**20, 1) for name, size in sizes.most_common()},
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=int, default=1_281_167)
    parser.add_argument("--explained", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="keep the results of the prediction here")
    add_device(parser)
    options = parser.parse_args()
    report = machine(options.device) | vars(options)
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch) / "images"
        make_images(options.folder, options.trained, options.explained)
        report |= {"fit": in_process(fitted, options, None)}
        report |= {"predict": in_process(explained, options, Path(scratch) / "results")}
        if options.output is not None:
            shutil.move(Path(scratch) / "results", options.output)
    print(json.dumps(report, indent=2, default=str))


if __name__ == "__main__":
    main()
