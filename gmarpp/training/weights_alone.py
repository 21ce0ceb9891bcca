"""Checkpoints of weights alone, which hold nothing of the run that they are from."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging


def average_weights_alone(checkpoint: dict[str, Any], trainer: Any, module: L.LightningModule) -> None:
    """Replace the weights in a checkpoint of weights alone by their average, as Lightning does in whole ones only.

    Args:
        checkpoint: to be written; left as it is if it is a whole one.
        trainer: with the callback, if there is one; None without a trainer.
        module: that trains.
    """
    if trainer is None or "optimizer_states" in checkpoint:
        return
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, module, checkpoint)
            checkpoint.pop("current_model_state", None)
            checkpoint.pop("averaging_state", None)


def require_whole_run(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Refuse to resume a run from weights alone.

    Raises:
        ValueError: the checkpoint holds no more; with what to do.
    """
    if trainer is not None and trainer.training and "optimizer_states" not in checkpoint:
        path = trainer.ckpt_path
        raise ValueError(
            f"{path} holds weights alone, from which a run cannot go on: resume it from last.ckpt, or begin a new one "
            f"with --model.weights {path}"
        )
