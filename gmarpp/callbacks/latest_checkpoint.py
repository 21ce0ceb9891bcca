"""The checkpoint of the latest state."""

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmarpp.training.lightning_private import ObservedCheckpoint


class LatestCheckpoint(ObservedCheckpoint):
    """A ModelCheckpoint that saves the end of a run too, and on an error only where no rank has to wait for others.

    Weights that are not finite are not saved: no run could go on from them, and they would replace those it could.
    """

    _in_training = False

    def before_save(self, trainer: L.Trainer) -> None:
        """Keep the older checkpoint where the weights have become useless.

        Raises:
            FloatingPointError: weights are not finite.
        """
        if not _are_finite(trainer.lightning_module):
            raise FloatingPointError(
                f"weights are not finite after step {trainer.global_step}, so they are not saved: continue from the "
                "checkpoint before, with a lower --model.optimizer.lr, a longer --model.optimizer.warmup, "
                "--trainer.gradient_clip_val 1.0 or --trainer.precision bf16-mixed"
            )

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
        if self.wants_error_saved(trainer) and _are_finite(pl_module):
            path = self.format_checkpoint_name(self.metrics_for_name(trainer))
            self.save(trainer, path)
            rank_zero_info(f"Saved step {trainer.global_step}: continue with --ckpt_path {path}")


def _are_finite(module: L.LightningModule) -> bool:
    # What is not trained may hold -inf, as masks do.
    trained = [each.detach().isfinite().all() for each in module.parameters() if each.requires_grad]
    return not trained or bool(torch.stack(trained).all())
