"""Throughput of `Trainer.fit` with the project's module against a bare PyTorch loop, and of the data loader alone.

    python benchmarks/training.py --root data [--config configs/vit_small_tiny_imagenet.yaml] [--rounds 5] [--steps 12]

Both train the recipe's network on the same batches of Tiny-ImageNet, with the same device, loader, precision,
optimizer, schedule and clipping, from random weights, in turn in one run. The Trainer is that of `train.py fit`, with
TensorBoard, checkpoints, progress bar. A round's time runs from the end of its warm-up to the end of its last step, and
nothing else is waited for. With `--in-memory` one batch on the device is used for all steps, and no loader runs.

The loader alone has the recipe's augmentation and image size. For the 8-GPU recipe, which no CPU can train:

    python benchmarks/training.py --root data --config configs/vit_large_tiny_imagenet.yaml --rounds 0
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from measure import add_device, gpu_memory, machine, synchronize, trainer_device
from torch import Tensor
from torch.utils.data import DataLoader

from gmarpp.callbacks import ModelCardCheckpoint
from gmarpp.callbacks.latest_checkpoint import LatestCheckpoint
from gmarpp.data import Augmentation, TinyImageNet
from gmarpp.training.hyperparameters import arguments
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import adamw, parameter_groups, warmup_cosine_schedule
from gmarpp.training.trainer import Trainer


class Clock(L.Callback):
    """Times the steps after a warm-up; a GPU is waited for at the beginning and at the end."""

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.device, self.warmup, self.steps = device, warmup, steps
        self.done, self.start, self.seconds = 0, 0.0, 0.0

    def step(self) -> None:
        """Note that a step is done."""
        self.done += 1
        if self.done == self.warmup:
            synchronize(self.device)
            self.start = time.perf_counter()
        if self.done == self.warmup + self.steps:
            synchronize(self.device)
            self.seconds = (time.perf_counter() - self.start) / self.steps

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Note it for the Trainer."""
        self.step()


def classifier(recipe: dict[str, Any]) -> ViTClassifier:
    """Make the recipe's module, with random weights that are always the same."""
    torch.manual_seed(0)
    return ViTClassifier(**arguments({**recipe["model"], "pretrained": False, "weights": None}))


def bare_loop(recipe: dict[str, Any], data: TinyImageNet, clock: Clock) -> None:
    """Train without any framework."""
    steps, device = clock.warmup + clock.steps, clock.device
    module, clip = classifier(recipe), recipe["trainer"]["gradient_clip_val"]
    options, model = module.optimization, module.model.train().to(device)
    groups = parameter_groups(model, options.lr, options.weight_decay, options.layer_decay)
    optimizer = adamw(groups, options.betas)
    schedule = warmup_cosine_schedule(optimizer, steps, int(steps * options.warmup))
    bfloat16 = recipe["trainer"]["precision"] == "bf16-mixed"
    for batch in itertools.islice(data.train_dataloader(), steps):
        images, labels = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=module.mixing.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        clock.step()


def trainer_fit(recipe: dict[str, Any], data: TinyImageNet, clock: Clock) -> None:
    """Train as `train.py fit` does."""
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            **trainer_device(clock.device),
            max_steps=clock.warmup + clock.steps,
            precision=recipe["trainer"]["precision"],
            gradient_clip_val=recipe["trainer"]["gradient_clip_val"],
            log_every_n_steps=recipe["trainer"]["log_every_n_steps"],
            limit_val_batches=0,
            enable_model_summary=False,
            logger=TensorBoardLogger(folder, name=""),
            callbacks=[
                clock,
                ModelCardCheckpoint(filename="best", monitor="val/accuracy", mode="max"),
                LatestCheckpoint(filename="last", enable_version_counter=False),
            ],
        ).fit(classifier(recipe), data)


def keep_in_memory(data: TinyImageNet, steps: int, device: torch.device) -> None:
    """Have the data's training loader give one batch again and again, which is on a device."""
    first = next(iter(data.train_dataloader()))
    batch = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in first.items()}
    data.train_dataloader = lambda: DataLoader([batch] * steps, batch_size=None)  # type: ignore[method-assign]


def loader_speed(data: TinyImageNet, workers: int, batches: int) -> float:
    """Return the images per second of the training loader when nothing else runs."""
    data.num_workers = workers
    loader: DataLoader[Any] = data.train_dataloader()
    batch = iter(loader)
    next(batch)
    # Batches that the workers have prepared meanwhile do not count.
    for _ in range(2 * workers):
        next(batch)
    start = time.perf_counter()
    for _ in range(batches):
        next(batch)
    return batches * data.batch_size / (time.perf_counter() - start)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--config", default="configs/vit_small_tiny_imagenet.yaml", help="a recipe for Tiny-ImageNet")
    parser.add_argument("--workers", type=int, default=1, help="loader processes while training")
    parser.add_argument("--rounds", type=int, default=5, help="0 measures the loader alone")
    parser.add_argument("--steps", type=int, default=12, help="timed steps in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--loader-batches", type=int, default=16, help="0 does not measure the loader")
    parser.add_argument("--in-memory", action="store_true")
    add_device(parser)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    recipe = yaml.safe_load(Path(options.config).read_text())
    data_options = recipe["data"]["init_args"]
    data = TinyImageNet(
        root=options.root,
        batch_size=data_options["batch_size"],
        num_workers=options.workers,
        persistent_workers=False,
        preprocessing=classifier(recipe).preprocessing,
        augmentation=Augmentation(**data_options["augmentation"]),
    )
    data.setup("fit")
    if options.in_memory:
        keep_in_memory(data, options.warmup + options.steps, options.device)
    loops = {"bare loop": bare_loop, "Trainer.fit": trainer_fit} if options.rounds else {}
    rounds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(options.rounds):
        for name in list(loops)[:: 1 if turn % 2 == 0 else -1]:
            clock = Clock(options.device, options.warmup, options.steps)
            loops[name](recipe, data, clock)
            rounds[name].append(clock.seconds)
    ratios = [fit / bare for bare, fit in zip(*rounds.values(), strict=True)]
    report = {
        **machine(options.device),
        **vars(options),
        "device": str(options.device),
        **gpu_memory(options.device),
        "seconds per step": {name: [round(each, 4) for each in times] for name, times in rounds.items()},
        "images per second": {
            name: round(data.batch_size / statistics.median(times), 1) for name, times in rounds.items()
        },
        "Trainer.fit / bare loop, median of rounds": round(statistics.median(ratios), 3) if ratios else None,
        "loader alone, images per second": {
            f"{workers} worker(s)": round(loader_speed(data, workers, options.loader_batches), 1)
            for workers in ((1, 2) if options.loader_batches and not options.in_memory else ())
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
