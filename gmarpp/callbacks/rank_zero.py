"""What one process does for all."""

from collections.abc import Callable

import lightning as L


def on_rank_zero(trainer: L.Trainer, action: Callable[[], None]) -> None:
    """Act on rank 0 while the others wait, and have all ranks end with the error if there is one."""
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            action()
        except Exception as caught:
            error = caught
    error = trainer.strategy.broadcast(error)
    if error is not None:
        raise error
