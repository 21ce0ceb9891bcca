"""The Trainer of all commands."""

import sys
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges
from gmarpp.training.checkpoint_io import AtomicCheckpointIO
from gmarpp.training.lightning_private import replace_checkpoint_io, replace_launcher
from gmarpp.training.ranks import RankLauncher

# the trainer's numbers that Lightning takes unchecked, or refuses without naming them
TRAINER_RANGES = {
    "gradient_clip_val": Range(0),
    "accumulate_grad_batches": Range(1),
    "check_val_every_n_epoch": Range(1),
    "log_every_n_steps": Range(0),
    "num_sanity_val_steps": Range(-1),
    "min_epochs": Range(0),
    "min_steps": Range(0),
}


def is_watched() -> bool:
    """Return whether the standard output is a terminal; a process may have no standard output at all."""
    return sys.stdout is not None and sys.stdout.isatty()


class Trainer(L.Trainer):
    """A Trainer that reads checkpoints without running code, writes them atomically, and ends with its ranks.

    For it `--trainer.limit_train_batches 1` means one batch: Lightning's own annotation makes the parser read 1 as 1.0,
    all batches; so for the other three limits.
    """

    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        require_ranges(kwargs, TRAINER_RANGES, "--trainer.")
        if kwargs.get("val_check_interval") == 0:
            raise ValueError("--trainer.val_check_interval: expected batches, a share of an epoch or a time, got 0")
        root = kwargs.get("default_root_dir")
        if root is not None and "://" not in str(root):
            kwargs["default_root_dir"] = expand_path(root)
        if kwargs.get("enable_progress_bar") is None and not is_watched():
            kwargs["enable_progress_bar"] = False
        try:
            super().__init__(
                *args,
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                **kwargs,
            )
        except MisconfigurationException as error:
            if "backend found" not in str(error):
                raise
            raise ValueError(f"--trainer.accelerator {kwargs.get('accelerator')}: {error}") from error
        except TypeError as error:
            devices, time = kwargs.get("devices"), kwargs.get("max_time")
            raise ValueError(f"--trainer.devices {devices}, --trainer.max_time {time}: {error}") from error
        replace_checkpoint_io(self.strategy, AtomicCheckpointIO())
        replace_launcher(self.strategy, RankLauncher)

    @property
    @override
    def log_dir(self) -> str | None:
        # Loggers of databases and servers, such as MLflow's, have no folder, where Lightning would write the options.
        return super().log_dir or self.default_root_dir
