"""Lines of progress for logs, where a bar would be noise."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from gmarpp.training.trainer import is_watched


class ProgressLines(Callback):
    """Prints how far fit, validate, test or predict is, at intervals, where there is no progress bar.

    It prints only where the standard output is no terminal, on rank 0, at the end of a batch:
    `fit: step 120 of 2100, loss 1.234, 85.3 images/s, 0:12:34 left`.

    Args:
        seconds: least time from one line to the next.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether anybody would read it."""
        self._prints = trainer.is_global_zero and trainer.progress_bar_callback is None and not is_watched()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, unless training does."""
        if trainer.state.fn != "fit":
            self._begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step and the loss."""
        if self._is_due(trainer, batch):
            done, total = trainer.global_step, trainer.estimated_stepping_batches
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            text = f", loss {float(loss):.4g}" if isinstance(loss, torch.Tensor) else ""
            # Steps of an earlier run, which this one resumes, took none of its time.
            steps = self._batches / trainer.accumulate_grad_batches
            self._print("fit: step", done, total, text, (total - done) / max(steps, 1))

    def on_validation_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Print the batch; within training, the rate is training's."""
        if trainer.state.fn != "fit":
            self._print_evaluation("validate", trainer, trainer.num_val_batches, *arguments)
        elif self._prints and not trainer.sanity_checking and self._seconds_passed():
            self._say(f"fit: validating at step {trainer.global_step}, batch {arguments[3] + 1}")

    def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Print the batch."""
        self._print_evaluation("test", trainer, trainer.num_test_batches, *arguments)

    def on_predict_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Print the batch."""
        self._print_evaluation("predict", trainer, trainer.num_predict_batches, *arguments)

    def _begin(self) -> None:
        self._began = self._printed = time.monotonic()
        self._images = self._batches = 0

    def _print_evaluation(
        self, name: str, trainer: L.Trainer, batches: Any, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self._is_due(trainer, batch):
            total = sum(batches)
            self._print(f"{name}: batch", self._batches, total, "", (total - self._batches) / self._batches)

    def _is_due(self, trainer: L.Trainer, batch: Any) -> bool:
        images = batch.get("image") if isinstance(batch, Mapping) else batch
        self._images += len(images) * trainer.world_size if isinstance(images, torch.Tensor) else 0
        self._batches += 1
        return self._prints and self._seconds_passed()

    def _seconds_passed(self) -> bool:
        return time.monotonic() - self._printed >= self.seconds

    def _print(self, what: str, done: int, total: float, text: str, left: float) -> None:
        """Print a line; `left` is the work that is left, as a multiple of what has been done."""
        passed = time.monotonic() - self._began
        rate = f", {self._images / passed:.1f} images/s" if self._images else ""
        if total == float("inf"):
            self._say(f"{what} {done}{text}{rate}")
            return
        minutes, seconds = divmod(round(left * passed), 60)
        hours, minutes = divmod(minutes, 60)
        self._say(f"{what} {done} of {int(total)}{text}{rate}, {hours}:{minutes:02}:{seconds:02} left")

    def _say(self, line: str) -> None:
        self._printed = time.monotonic()
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def show_rate(trainer: L.Trainer, images_per_second: float) -> None:
    """Show the rate of prediction in the progress bar, if there is one."""
    bar, rate = trainer.progress_bar_callback, f"{images_per_second:.1f} images/s"
    if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        bar.predict_progress_bar.set_postfix_str(rate, refresh=False)
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.predict_progress_bar_id is not None:
        bar.progress.update(bar.predict_progress_bar_id, description=f"{bar.predict_description}, {rate}")
