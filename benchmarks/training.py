"""Throughput of `Trainer.fit` with the project's module against a bare PyTorch loop, and of the data loader alone.

    python benchmarks/training.py --root data [--config configs/vit_small_tiny_imagenet.yaml] [--rounds 5] [--steps 12]
    python benchmarks/training.py --in-memory --device cuda --config configs/vit_large_tiny_imagenet.yaml --steps 30
    python benchmarks/training.py --in-memory --tiny --precision 32-true --steps 200 --profile

Both train the recipe's network on the same batches, of Tiny-ImageNet or of noise in the device's memory, with the same
device, loader, precision, optimizer (fused on a GPU), mixing, schedule and clipping, from random weights, in turn in
one run. The Trainer is that of `train.py fit`, with TensorBoard and checkpoints. A round's time runs from the end of
its warm-up to the end of its last step, and nothing waits for the device in between.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from measure import Profile, add_device, add_profile, gpu_memory, machine, profiled, synchronize, trainer_device
from torch.utils.data import DataLoader

from gmarpp.callbacks import ModelCardCheckpoint
from gmarpp.callbacks.latest_checkpoint import LatestCheckpoint
from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.data import Augmentation, TinyImageNet
from gmarpp.training.hyperparameters import arguments
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import adamw, parameter_groups, warmup_cosine_schedule
from gmarpp.training.trainer import Trainer


class Stretch:
    """Times the steps between two waits for the device: the warm-up's end and the last step's.

    Args:
        warmup: steps before it.
        steps: steps in it.
        device: that trains.
        profile: covers the same steps.
    """

    def __init__(self, warmup: int, steps: int, device: torch.device, profile: Profile | None = None) -> None:
        self.first, self.last, self.device, self.profile = warmup, warmup + steps, device, profile
        self.seconds, self.done = 0.0, 0

    def step_ended(self) -> None:
        """Count a step."""
        self.done += 1
        if self.done == self.first:
            synchronize(self.device)
            if self.profile is not None:
                self.profile.__enter__()
            self.seconds -= time.perf_counter()
        elif self.done == self.last:
            synchronize(self.device)
            self.seconds += time.perf_counter()
            if self.profile is not None:
                self.profile.__exit__()


class Clock(L.Callback):
    """Tells a stretch of each step that the Trainer has ended."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Count the step."""
        self.stretch.step_ended()


@dataclass(frozen=True)
class Batches:
    """Batches of noise that are on the device before training starts.

    Args:
        batches: with `image` and `label`.
        number: of batches to give, by turns.
    """

    batches: list[dict[str, torch.Tensor]]
    number: int
    batch_size: int

    @classmethod
    def of(cls, module: ViTClassifier, batch_size: int, number: int, device: torch.device) -> "Batches":
        """Make two batches for a module."""
        shape, classes = (batch_size, 3, *module.hparams["image_size"]), module.hparams["num_classes"]
        return cls(
            [
                {
                    "image": torch.randn(shape, device=device),
                    "label": torch.randint(classes, (batch_size,), device=device),
                }
                for _ in range(2)
            ],
            number,
            batch_size,
        )

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.islice(itertools.cycle(self.batches), self.number)


def classifier(recipe: dict[str, Any]) -> ViTClassifier:
    """Make the recipe's module, with random weights that are always the same."""
    torch.manual_seed(0)
    return ViTClassifier(**arguments({**recipe["model"], "pretrained": False, "weights": None}))


def bare_loop(recipe: dict[str, Any], data: Any, stretch: Stretch) -> None:
    """Train without any framework, with the same optimizer, mixing, schedule and clipping."""
    module, clip, device = classifier(recipe), recipe["trainer"]["gradient_clip_val"], stretch.device
    options, model, mix = module.optimization, module.model.train().to(device), module.mix
    groups = parameter_groups(model, options.lr, options.weight_decay, options.layer_decay)
    optimizer = adamw(groups, options.betas)
    schedule = warmup_cosine_schedule(optimizer, stretch.last, int(stretch.last * options.warmup))
    bfloat16 = recipe["trainer"]["precision"] == "bf16-mixed"
    smoothing = 0.0 if mix else module.mixing.label_smoothing
    for batch in data if isinstance(data, Batches) else itertools.islice(data.train_dataloader(), stretch.last):
        images, labels = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        images, labels = (images, labels) if mix is None else mix(images, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        stretch.step_ended()


def trainer_fit(recipe: dict[str, Any], data: Any, stretch: Stretch) -> None:
    """Train as `train.py fit` does."""
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            **trainer_device(stretch.device),
            max_steps=stretch.last,
            precision=recipe["trainer"]["precision"],
            gradient_clip_val=recipe["trainer"]["gradient_clip_val"],
            log_every_n_steps=recipe["trainer"]["log_every_n_steps"],
            limit_val_batches=0,
            enable_model_summary=False,
            logger=TensorBoardLogger(folder, name=""),
            callbacks=[
                Termination(),
                ProgressLines(),
                Clock(stretch),
                ModelCardCheckpoint(filename="best", monitor="val/accuracy", mode="max"),
                LatestCheckpoint(filename="last", enable_version_counter=False),
            ],
        ).fit(classifier(recipe), data)


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


LOOPS = {"bare loop": bare_loop, "Trainer.fit": trainer_fit}


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """Read the recipe and change it as asked for."""
    recipe: dict[str, Any] = yaml.safe_load(Path(options.config).read_text())
    recipe["trainer"]["precision"] = options.precision or recipe["trainer"]["precision"]
    if options.tiny:
        small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        recipe["model"] |= {"architecture": "vit_tiny_patch16_224", "image_size": 32, "model_args": small}
    recipe["data"]["init_args"]["batch_size"] = options.batch or recipe["data"]["init_args"]["batch_size"]
    return recipe


def data_of(recipe: dict[str, Any], options: argparse.Namespace) -> TinyImageNet:
    """Make the recipe's data, ready to train."""
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
    return data


def options_of_command() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--root", help="folder of Tiny-ImageNet")
    data.add_argument("--in-memory", action="store_true", help="noise that is on the device already, no loader")
    parser.add_argument("--config", default="configs/vit_small_tiny_imagenet.yaml", help="a recipe for Tiny-ImageNet")
    parser.add_argument("--tiny", action="store_true", help="2 layers of 16 channels: what the loops themselves cost")
    parser.add_argument("--precision", help="in place of the recipe's, for example 32-true")
    parser.add_argument("--batch", type=int, help="images per step, in place of the recipe's")
    parser.add_argument("--workers", type=int, default=1, help="loader processes while training")
    parser.add_argument("--rounds", type=int, default=5, help="0 measures the loader alone")
    parser.add_argument("--steps", type=int, default=12, help="timed steps in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--loader-batches", type=int, default=16)
    add_device(parser)
    add_profile(parser)
    return parser.parse_args()


def main() -> None:
    """Measure and print JSON."""
    options = options_of_command()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device, recipe = options.device, recipe_of(options)
    batch_size, steps = recipe["data"]["init_args"]["batch_size"], options.warmup + options.steps
    data = Batches.of(classifier(recipe), batch_size, steps, device) if options.in_memory else data_of(recipe, options)
    rounds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(options.rounds):
        for name in list(LOOPS)[:: 1 if turn % 2 == 0 else -1]:
            stretch = Stretch(options.warmup, options.steps, device)
            LOOPS[name](recipe, data, stretch)
            rounds[name].append(stretch.seconds / options.steps)
    ratios = [bare / fit for bare, fit in zip(*rounds.values(), strict=True)]
    report: dict[str, Any] = {**machine(device), **vars(options), "device": str(device), **gpu_memory(device)}
    if options.rounds:
        report["seconds per step"] = {name: [round(each, 5) for each in times] for name, times in rounds.items()}
        report["images per second"] = {
            name: round(batch_size / statistics.median(times), 1) for name, times in rounds.items()
        }
        report["rate of Trainer.fit / bare loop, median of rounds"] = round(statistics.median(ratios), 4)
    if isinstance(data, TinyImageNet):
        report["loader alone, images per second"] = {
            f"{workers} worker(s)": round(loader_speed(data, workers, options.loader_batches), 1)
            for workers in sorted({1, 2, options.workers})
        }
    if options.profile:
        report["profile"] = {
            name: profiled(
                lambda profile, loop=loop: loop(recipe, data, Stretch(options.warmup, options.steps, device, profile)),
                device,
            )
            for name, loop in LOOPS.items()
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
