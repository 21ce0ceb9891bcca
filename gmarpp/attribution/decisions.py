"""What Python decides by numbers on the device: the only places where a GPU is waited for.

A CUDA graph has no such places. While it is captured, each decision is taken as it was before, and the numbers are
left for a look after each replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Decisions:
    """The decisions of a call of `explain`, in their order.

    Attributes:
        taken: so far.
    """

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self._expected: Tensor | None = None
        self._flags: list[Tensor] = []

    def take(self, flags: Tensor) -> list[bool]:
        """Return the decisions by flags, (n,)."""
        if self._expected is None:
            found: list[bool] = flags.tolist()
            self.taken += found
            return found
        start = sum(map(len, self._flags))
        self._flags.append(flags)
        return self.taken[start : start + len(flags)]

    def repeat(self, device: torch.device) -> None:
        """From now on, take the same decisions once more without reading flags, which are on a device."""
        self._expected = torch.tensor(self.taken, device=device)

    def are_right(self) -> Tensor:
        """Return whether the flags say what was taken once more."""
        assert self._expected is not None
        return (torch.cat(self._flags) == self._expected).all()


# Calls of `explain` take turns, and the autograd engine's threads belong to them.
_current: Decisions | None = None


@contextmanager
def deciding(decisions: Decisions) -> Iterator[None]:
    """Have the decisions of this context taken by `decisions`."""
    global _current
    before, _current = _current, decisions
    try:
        yield
    finally:
        _current = before


def decide(*flags: Tensor) -> list[bool]:
    """Return whether each of some flags is set, which waits for the GPU."""
    stacked = torch.stack(flags)
    found: list[bool] = stacked.tolist() if _current is None else _current.take(stacked)
    return found
