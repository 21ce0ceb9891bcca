"""Search of the peak learning rate before training."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from gmarpp.options import Range, require_ranges


class PeakLearningRateFinder(LearningRateFinder):
    """Finds the peak learning rate by a range test (Smith 2017) and trains with it, layer decay and schedule kept.

    The rate rises step by step from `min_lr` to `max_lr` while every parameter group keeps its share of it; the one at
    which the loss falls fastest becomes the peak. Weights, data and progress are then as they were. Lightning's own
    finder searches with one rate for all groups, and what it finds lasts until the schedule's first step.

    A resumed run keeps the rate that it has.

    Args:
        min_lr: first learning rate of the head, > 0.
        max_lr: last one, > `min_lr`.
        num_training_steps: steps from the first to the last, at least 13: the search ignores 11 of them.
        mode: `exponential` or `linear` growth.
        early_stop_threshold: ends the search when the loss exceeds its minimum by this factor, > 1; None for never.

    Raises:
        ValueError: an option is out of range, or no rate stands out in the losses seen.
    """

    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 1e-1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
    ) -> None:
        require_ranges(
            {
                "min_lr": min_lr,
                "max_lr": max_lr,
                "num_training_steps": num_training_steps,
                "early_stop_threshold": early_stop_threshold,
            },
            {
                "min_lr": Range(0, low_open=True),
                "max_lr": Range(min_lr, low_open=True),
                "num_training_steps": Range(13),
                "early_stop_threshold": Range(1, low_open=True),
            },
            "PeakLearningRateFinder.",
        )
        super().__init__(min_lr, max_lr, num_training_steps, mode, early_stop_threshold, update_attr=False)

    @override
    def lr_find(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        (optimizer,) = trainer.optimizers
        peaks = [group["initial_lr"] for group in optimizer.param_groups]
        head = peaks.index(max(peaks))

        def share_out(optimizer: Optimizer, *_: Any) -> None:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = optimizer.param_groups[head]["lr"] * peak / peaks[head]

        hook = optimizer.register_step_pre_hook(share_out)
        pl_module.stops_at_divergence = False
        epochs, trainer.fit_loop.max_epochs = trainer.fit_loop.max_epochs, -1
        try:
            super().lr_find(trainer, pl_module)
        finally:
            trainer.fit_loop.max_epochs = epochs
            pl_module.stops_at_divergence = True
            hook.remove()
        assert self.optimal_lr is not None
        found = self.optimal_lr.suggestion()
        if found is None:
            raise ValueError(
                f"no learning rate stands out in the {len(self.optimal_lr.results['loss'])} losses of the search: "
                "raise its num_training_steps, or lower its min_lr"
            )
        factor = found / peaks[head]
        for group in optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
        options = pl_module.hparams["optimizer"]
        options["lr"] *= factor
        rank_zero_info(
            f"Found the peak learning rate {found:.3g}: the same as --model.optimizer.lr {options['lr']:.3g}"
        )
