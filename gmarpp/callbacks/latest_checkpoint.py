"""The checkpoint of the latest state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LatestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves the end of a run too, and on an error only where no rank has to wait for others."""

    _in_training = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there is something to save."""
        super().on_train_start(trainer, pl_module)
        self._in_training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was learned since the last checkpoint, when they are made every so many steps."""
        super().on_train_end(trainer, pl_module)
        self._in_training = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name(trainer.callback_metrics))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if all ranks got here, as they do when they are stopped by a signal."""
        stopped = isinstance(exception, SIGTERMException)
        if not self._in_training or not (stopped or trainer.world_size == 1):
            return
        if stopped:
            # A checkpoint of this step may be older than the validation that was interrupted.
            self._last_global_step_saved = -1
        if self._should_save_on_exception(trainer):
            path = self.format_checkpoint_name(self._monitor_candidates(trainer))
            with _undisturbed():
                self._save_checkpoint(trainer, path)
            rank_zero_info(f"Saved step {trainer.global_step}: continue with --ckpt_path {path}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep torch from reporting a killed loader process, which it does by an exception wherever the program is."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
