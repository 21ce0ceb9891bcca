"""The checkpoint of the latest state."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmarpp.training.finite_weights import are_finite, require_finite_weights
from gmarpp.training.lightning_private import ObservedCheckpoint


class LatestCheckpoint(ObservedCheckpoint):
    """A ModelCheckpoint that saves the end of a run too, and on an error only where no rank has to wait for others."""

    _in_training = False

    def before_save(self, trainer: L.Trainer) -> None:
        """Keep the older checkpoint where weights are not finite."""
        require_finite_weights(trainer.lightning_module, trainer.global_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there is something to save."""
        super().on_train_start(trainer, pl_module)
        self._in_training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was learned since the last checkpoint, where checkpoints are made after a number of steps."""
        super().on_train_end(trainer, pl_module)
        self._in_training = False
        if not self.is_saved(trainer):
            self.save(trainer, self.format_checkpoint_name(trainer.callback_metrics))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if all ranks got here, as they do when they are stopped by a signal."""
        stopped = isinstance(exception, SIGTERMException)
        if not self._in_training or not (stopped or trainer.world_size == 1):
            return
        if stopped:
            # A checkpoint of this step may be older than the validation that was interrupted.
            self.forget_step()
        if self.wants_error_saved(trainer) and are_finite(pl_module):
            path = self.format_checkpoint_name(self.metrics_for_name(trainer))
            self.save(trainer, path)
            rank_zero_info(f"Saved step {trainer.global_step}: continue with --ckpt_path {path}")
