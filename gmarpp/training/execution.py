"""How the network runs on the machine that trains it."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn


@dataclass(frozen=True)
class Execution:
    """How the network runs on a machine; a resumed run may have other values.

    Args:
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile the network with torch.compile for training.
        channels_last: keep images in channels-last memory order.
    """

    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False

    def prepare(self, model: nn.Module) -> None:
        """Make a network ready for training."""
        network: Any = model
        if self.gradient_checkpointing:
            network.set_grad_checkpointing(True)
        if self.compile:
            # In place: torch.compile(model) would put `_orig_mod.` in every key of the checkpoint.
            model.compile()


def require_whole_network(strategy: Strategy) -> None:
    """Refuse strategies that share a network out among devices.

    Raises:
        ValueError: the strategy does.
    """
    if strategy.restore_checkpoint_after_setup:
        raise ValueError(
            f"{type(strategy).__name__} shares the network out among the devices, but layer-wise learning rates and "
            "explanations need them whole: set --trainer.strategy ddp; --model.execution.gradient_checkpointing true "
            "saves memory"
        )
