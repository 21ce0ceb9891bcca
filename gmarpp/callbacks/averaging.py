"""Exponential moving average of the weights."""

from typing import Any

import lightning as L
from typing_extensions import override

from gmarpp.options import Range, require_ranges
from gmarpp.training.lightning_private import ObservedAveraging


class AveragedWeights(ObservedAveraging):
    """Lightning's EMAWeightAveraging, for runs that are saved whenever they end or are interrupted.

    Validates, and keeps in checkpoints as the network's own, an exponential moving average of the weights. The trained
    weights are kept beside it, so that a resumed run continues from them. Lightning's own callback confuses the
    two in a checkpoint made during validation, and saves the average alone at the end of a run.

    Args:
        decay: share of the average that a step keeps, in [0, 1).
        **options: of Lightning's EMAWeightAveraging.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, decay: float = 0.999, **options: Any) -> None:
        require_ranges({"decay": decay}, {"decay": Range(0, 1, high_open=True)}, "AveragedWeights.")
        super().__init__(decay=decay, **options)
        self._swapped = False

    @override
    def on_swap(self) -> None:
        self._swapped = not self._swapped

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Checkpoint callbacks come last, when the trained weights are overwritten.
        for callback in trainer.checkpoint_callbacks:
            callback.on_train_end(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
