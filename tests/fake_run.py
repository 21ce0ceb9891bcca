"""A predict run without a network, in this process or, as a script, in one of its own."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gmarpp.callbacks import ExplanationWriter, writer
from gmarpp.explainer import ExplainedBatch, Explainer
from gmarpp.perturbation import Curves

METHODS = ("gmarpp_l1", "rollout")
METRICS = ("insertion_auc", "deletion_auc")


class Squares(Dataset):
    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 3, 16, 24, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path = ["a/same.jpg", "b/same.jpg", '"<b>&.jpg', "x" * 300][index % 4]
        return {"image": self.images[index], "label": index % 3 - 1, "index": index, "path": path}


class SquaresData(L.LightningDataModule):
    def __init__(self, count=11, batch_size=2):
        super().__init__()
        self.dataset = Squares(count)
        self.batch_size = batch_size

    def predict_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)


class FakeExplaining(L.LightningModule):
    """Explains without a network; `stop_at` names the image at which it fails."""

    def __init__(self, methods=METHODS, metrics=METRICS, stop_at=None):
        super().__init__()
        self.model = torch.nn.Linear(2, 2)
        self.explainer = Explainer(methods=methods, metrics=metrics, steps=4)
        self.classes, self.class_names = ("n1", "n2"), ("cat, moggy", "dog")
        self.stop_at, self.seen = stop_at, []

    def predict_step(self, batch, batch_idx):
        images, index = batch["image"], batch["index"]
        self.seen += index.tolist()
        if self.stop_at in index.tolist():
            raise RuntimeError("the network failed")
        share = images.mean((1, 2, 3)) + 1e-3 * len(images)  # depends on the batch as real arithmetic may
        curves = {
            method: Curves(torch.linspace(0, 1, 5), images[:, number, :5, 0], images[:, number, 0, :5])
            for number, method in enumerate(self.explainer.methods)
        }
        return ExplainedBatch(
            index=index,
            path=list(batch["path"]),
            label=batch["label"],
            target=index % 2,
            predicted=index % 2,
            target_probability=share,
            predicted_probability=share,
            maps={method: images[:, number, ::4, ::4] for number, method in enumerate(self.explainer.methods)},
            values={method: dict.fromkeys(self.explainer.metrics, share) for method in self.explainer.methods},
            inputs={},
            curves=curves if self.explainer.metrics else {},
            images=images,
        )


class Disturbed(FakeExplaining):
    """Has something happen before it explains the image `at`."""

    def __init__(self, at, event):
        super().__init__()
        self.at, self.event = at, event

    def predict_step(self, batch, batch_idx):
        if self.at in batch["index"]:
            self.event()
        return super().predict_step(batch, batch_idx)


class Stalled(FakeExplaining):
    """Explains one batch, and then waits to be killed."""

    def predict_step(self, batch, batch_idx):
        while batch_idx:
            signal.pause()
        return super().predict_step(batch, batch_idx)


def predict(folder, data=None, module=None, devices=1, limit=1.0, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExplanationWriter(folder, **options)],
        limit_predict_batches=limit,
    )
    module = module or FakeExplaining()
    trainer.predict(module, datamodule=data or SquaresData(), return_predictions=False)
    return module


def fail_at(stop_at, folder, **options):
    with pytest.raises(RuntimeError, match="the network failed"):
        predict(folder, module=FakeExplaining(stop_at=stop_at), **options)


def contents(folder, leave_out=("run.json", "report.html")):
    """Bytes of all files by relative path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def started(folder, devices, stalled=False, fatal_file=""):
    """Start this script in a process group of its own, of which nothing outlives the context."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder), str(devices), "stalled" * stalled, fatal_file]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _die_before(name):
    """Have this process killed when it is about to give a file its name."""
    original = Path.replace

    def replace(path, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    Path.replace = replace


if __name__ == "__main__":
    writer._FLUSH_SECONDS = 0
    _die_before(sys.argv[4])
    predict(sys.argv[1], module=Stalled() if sys.argv[3] else None, devices=int(sys.argv[2]), resume=True)
