"""Whether the head that an architecture describes makes the network's output of the last block's tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.narrow import close

DESCRIBE_HEAD = (
    "describe what follows the last block: architecture=dataclasses.replace(gmarpp.architecture_of(net.vit), "
    "head=lambda tokens: net.fc(net.vit.forward_head(net.vit.norm(tokens))))"
)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a network's output, its logits alone where it has the attribute."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [each for item in output for each in tensors_of(item)] if isinstance(output, tuple | list) else []


def agree(head_output: Any, output: Any) -> bool:
    """Tell whether a head's output is the network's: of the same form and, up to rounding, of the same values."""
    found, expected = tensors_of(head_output), tensors_of(output)
    if _form(head_output) != _form(output) or not expected or len(found) != len(expected):
        return False
    return all(a.shape == b.shape and close(a, b) for a, b in zip(found, expected, strict=True))


def _form(output: Any) -> object:
    # Logits may come alone where the network gives them a name: scores are handed both in the network's form.
    if isinstance(output, Tensor) or isinstance(getattr(output, "logits", None), Tensor):
        return Tensor
    if isinstance(output, Mapping):
        return {name: _form(each) for name, each in output.items()}
    return [_form(each) for each in output] if isinstance(output, tuple | list) else type(output)


def distinct_sum(output: Any) -> Tensor:
    """Return one number that every value of the output influences, each by a factor of its own.

    A plain sum has no gradient where the output is normalised.
    """
    total = torch.zeros(())
    for each in tensors_of(output):
        factors = torch.linspace(0.5, 1, each[0].numel(), device=each.device, dtype=torch.float32).view_as(each[0])
        total = total.to(each.device) + (each.float() * factors).sum()
    return total
