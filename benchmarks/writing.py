"""Speed and memory of the predict loop with its writer and without, on validation images of Tiny-ImageNet.

    python benchmarks/writing.py --root data [--images 10000] [--few 1000] [--output results/writing]

Runs come in pairs, the writer first in every other pair, so that a drifting machine favors neither. Every run is a
process of its own, without faithfulness metrics. Times include tables, figures and report. Peak memory (VmHWM) is read
after the first `--few` images and at the end. Whole batches are explained: a few images more than asked for may count.
Results are kept until all runs are done: ext4 is slow to create files for minutes after it has deleted many, so do not
delete another large folder shortly before. Prints JSON.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
from measure import add_device, gpu_memory, machine, resident_mebibytes, seconds, trainer_device

from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import TinyImageNet
from gmarpp.explainer import Explainer
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.trainer import Trainer


class _EarlyPeak(L.Callback):
    """Reads the peak memory when some images are explained."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.mebibytes = 0.0

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx + 1 == self.batches:
            self.mebibytes = resident_mebibytes("VmHWM")


def _predict(connection: Connection, options: argparse.Namespace, output: Path | None) -> None:
    model = load_classifier(options.ckpt_path)
    model.explainer = Explainer(methods=options.methods, metrics=[])
    data = TinyImageNet(
        root=options.root, preprocessing=model.preprocessing, batch_size=options.batch, num_workers=options.workers
    )
    early = _EarlyPeak(-(-options.few // options.batch))
    trainer = Trainer(
        **trainer_device(options.device),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        precision=options.precision,
        limit_predict_batches=-(-options.images // options.batch),
        callbacks=[early] if output is None else [early, ExplanationWriter(output)],
    )
    elapsed = seconds(lambda: trainer.predict(model, data, return_predictions=False), options.device)
    explained = min(len(data.predict_dataloader().dataset), trainer.limit_predict_batches * options.batch)
    connection.send((explained, elapsed, early.mebibytes, resident_mebibytes("VmHWM"), gpu_memory(options.device)))


def predict(options: argparse.Namespace, output: Path | None) -> dict[str, float]:
    """Explain images in a fresh process; return images per second, peak resident MiB and MiB on disk."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # The process is forked, and so are its workers: those of a spawned process would be spawned, and start slowly. Up
    # to then no GPU is in use, which a forked process could not use either.
    process = multiprocessing.get_context("fork").Process(target=_predict, args=(sender, options, output))
    process.start()
    # With the parent's copy open, a child that died would leave `recv` waiting.
    sender.close()
    explained, elapsed, early, mebibytes, on_gpu = receiver.recv()
    process.join()
    result = {
        "images": explained,
        "images per second": round(explained / elapsed, 2),
        "peak MiB after few images": round(early),
        "peak MiB": round(mebibytes),
        **on_gpu,
    }
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
    parser.add_argument("--output", type=Path, help="keep the results of the last run here")
    options = parser.parse_args()
    kinds = ("with the writer", "without")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.rounds):
            for kind in kinds if pair % 2 == 0 else reversed(kinds):
                output = Path(scratch) / str(pair) if kind == "with the writer" else None
                runs[kind].append(predict(options, output))
        if options.output is not None:
            shutil.move(Path(scratch) / str(options.rounds - 1), options.output)
    rates = [[run["images per second"] for run in runs[kind]] for kind in kinds]
    ratio = round(sum(rates[0]) / sum(rates[1]), 3)
    print(json.dumps({**machine(options.device), **vars(options), **runs, "ratio": ratio}, indent=2, default=str))


if __name__ == "__main__":
    main()
