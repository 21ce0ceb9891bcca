"""How large a run is: its number of steps, and the images that one step learns from."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info


def total_steps(trainer: L.Trainer) -> int:
    """Return the steps of a whole run.

    Raises:
        ValueError: nothing limits them.
    """
    if trainer.limit_train_batches == 0:
        raise ValueError("--trainer.limit_train_batches is 0, so there is nothing to train on")
    # By itself Lightning would do so here only for runs that epochs limit, and the batch size is needed for all.
    trainer.fit_loop.setup_data()
    total = trainer.estimated_stepping_batches
    # -1 where epochs are limited but the data has no length.
    if math.isinf(total) or total <= 0:
        raise ValueError(
            "the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps; streamed data has no "
            "length and needs --trainer.max_steps"
        )
    return int(total)


def scaled_lr(trainer: L.Trainer, lr: float, reference: int | None) -> float:
    """Return the peak learning rate of a run, and state its effective batch size.

    Args:
        trainer: with its data set up.
        lr: the rate for batches of `reference` images, or for any where that is None.
        reference: an effective batch size.

    Raises:
        ValueError: there is a reference, but the data loader has no batch size.
    """
    loader: Any = trainer.train_dataloader
    batch = getattr(loader, "batch_size", None)
    if batch is None:
        if reference is not None:
            raise ValueError(
                "--model.optimizer.lr_batch_size needs a data loader with a batch size: set --model.optimizer.lr alone"
            )
        rank_zero_info(f"Learning rate {lr:.3g}")
        return lr
    per_node = trainer.world_size // trainer.num_nodes
    effective = batch * trainer.world_size * trainer.accumulate_grad_batches
    scaled = lr * effective / reference if reference else lr
    rank_zero_info(
        f"Effective batch size {effective} = {batch} x {per_node} devices x {trainer.num_nodes} nodes x "
        f"{trainer.accumulate_grad_batches} accumulated; learning rate {scaled:.3g}"
        + (f" = {lr:.3g} x {effective} / {reference}" if reference else "")
    )
    return scaled
