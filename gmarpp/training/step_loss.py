"""The loss of a training step: logged, and the end of a run where it is not finite."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor


class StepLoss:
    """The loss of one batch, on its way to the host.

    Its copy is queued behind the forward pass. To wait for it when the backward pass is queued, too, costs no time: a
    GPU has enough to do meanwhile, and has not reached the weights.

    Args:
        loss: this rank's, a scalar.
        batch: with `path`, the files that the loss is of.
        trainer: that trains.
    """

    def __init__(self, loss: Tensor, batch: Mapping[str, Any], trainer: L.Trainer) -> None:
        self._files, self.trainer = batch.get("path", ["unknown"]), trainer
        finite_ranks: Any = trainer.strategy.reduce(torch.isfinite(loss).float(), reduce_op="sum")
        # Other devices than CUDA's could be read before the copy is there.
        self._copy = torch.stack([loss.float(), finite_ranks]).to("cpu", non_blocking=loss.is_cuda)
        self._copied = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def log(self, module: L.LightningModule, stops_at_divergence: bool) -> None:
        """Log loss and learning rate, both on the host, where neither loggers nor progress bars wait for a GPU.

        All ranks stop together: one that stopped alone would leave the others waiting for it.

        Raises:
            FloatingPointError: a rank's loss is not finite; naming the step and the files.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, finite_ranks = self._copy
        if stops_at_divergence and finite_ranks != self.trainer.world_size:
            raise self._divergence(loss)
        module.log("train/loss", loss, prog_bar=True)
        module.log("train/lr", torch.tensor(max(group["lr"] for group in self.trainer.optimizers[0].param_groups)))

    def _divergence(self, loss: Tensor) -> FloatingPointError:
        trainer = self.trainer
        files = "" if loss.isfinite() else ", ".join(map(str, self._files))
        if trainer.world_size > 1:
            gathered = [""] * trainer.world_size
            torch.distributed.all_gather_object(gathered, files)
            files = ", ".join(filter(None, gathered))
        return FloatingPointError(
            f"the loss is not finite at step {trainer.global_step}; the batch's files: {files}; look at them, "
            "lower --model.optimizer.lr, raise --model.optimizer.warmup, set --trainer.gradient_clip_val 1.0, or train "
            "with --trainer.precision bf16-mixed"
        )
