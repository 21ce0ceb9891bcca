"""Weights that have become useless in training."""

import torch
from torch import nn


def are_finite(module: nn.Module) -> bool:
    """Return whether all weights that are trained are finite; others may hold -inf, as masks do."""
    trained = [each.detach().isfinite().all() for each in module.parameters() if each.requires_grad]
    return not trained or bool(torch.stack(trained).all())


def require_finite_weights(module: nn.Module, step: int) -> None:
    """Keep useless weights from taking the place of those that a run could go on from.

    Raises:
        FloatingPointError: weights that are trained are not finite.
    """
    if not are_finite(module):
        raise FloatingPointError(
            f"weights are not finite after step {step}, so they are not saved: continue from the checkpoint before, "
            "with a lower --model.optimizer.lr, a longer --model.optimizer.warmup, --trainer.gradient_clip_val 1.0 or "
            "--trainer.precision bf16-mixed"
        )
