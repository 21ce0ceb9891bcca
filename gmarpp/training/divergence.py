"""The end of a run whose loss is not finite."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor


def require_finite(loss: Tensor, batch: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Stop all ranks together: one that stopped alone would leave the others waiting for its gradients.

    Args:
        loss: this rank's, a scalar.
        batch: with `path`, the files that the loss is of.
        trainer: that trains.

    Raises:
        FloatingPointError: a rank's loss is not finite; naming the step and the files.
    """
    finite = torch.isfinite(loss)
    ranks: Any = trainer.strategy.reduce(finite.float(), reduce_op="sum")
    if ranks == trainer.world_size:
        return
    files = "" if finite else ", ".join(map(str, batch.get("path", ["unknown"])))
    if trainer.world_size > 1:
        gathered = [""] * trainer.world_size
        torch.distributed.all_gather_object(gathered, files)
        files = ", ".join(filter(None, gathered))
    raise FloatingPointError(
        f"the loss is not finite at step {trainer.global_step}; the batch's files: {files}; look at them, "
        "lower --model.optimizer.lr, raise --model.optimizer.warmup, set --trainer.gradient_clip_val 1.0, or train "
        "with --trainer.precision bf16-mixed"
    )
