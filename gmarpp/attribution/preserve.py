"""A network in eval mode with frozen parameters and plain blocks for a while, and then exactly as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, freeze every parameter, and switch off timm's and open_clip's checkpointing.

    Each one's state is restored, also after an error. Checkpointed blocks would run a second time in the backward pass,
    without the hooks of the first.
    """
    training = [module for module in model.modules() if module.training]
    checkpointing: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for module in checkpointing:
        module.grad_checkpointing = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in checkpointing:
            module.grad_checkpointing = True
        for parameter in trainable:
            parameter.requires_grad_(True)
