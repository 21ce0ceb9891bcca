"""Search of the largest batch that a GPU holds, before training."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from gmarpp.options import Range, require_ranges


class LargestBatchFinder(BatchSizeFinder):
    """Finds the largest batch that the memory of one GPU holds, and trains with it.

    The data module's `batch_size` is doubled until memory runs out, and bisected then. Weights and data are afterwards
    as they were; learning rate and schedule are those of a run that begins with the size found, and with
    `--model.optimizer.lr_batch_size` the rate grows with it. With Lightning's own finder they stay those of the first
    size, and a resumed run searches again: this one goes on with what was found.

    Args:
        init_val: first size, at least 1.
        max_val: largest size, above `init_val`.
        steps_per_trial: steps with each size, at least 1.
        margin: share that is left of the largest size, in [0, 1).

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, init_val: int = 16, max_val: int = 4096, steps_per_trial: int = 3, margin: float = 0.05) -> None:
        require_ranges(
            {"init_val": init_val, "max_val": max_val, "steps_per_trial": steps_per_trial, "margin": margin},
            {
                "init_val": Range(1),
                "max_val": Range(init_val, low_open=True),
                "steps_per_trial": Range(1),
                "margin": Range(0, 1, high_open=True),
            },
            "LargestBatchFinder.",
        )
        super().__init__("binsearch", steps_per_trial, init_val, margin=margin, max_val=max_val)
        self._data: Any = None
        self._found: int | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str | None = None) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
            self._data = trainer.datamodule  # type: ignore[attr-defined]

    @override
    def scale_batch_size(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.ckpt_path is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        super().scale_batch_size(trainer, pl_module)
        self._found = self.optimal_batch_size
        trainer.strategy.setup_optimizers(trainer)
        rank_zero_info(f"Found the batch size {self._found}: the same as --data.batch_size {self._found}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"batch_size": self._found}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._found = state_dict["batch_size"]
        if self._data is not None and self._found is not None:
            self._data.batch_size = self._found
