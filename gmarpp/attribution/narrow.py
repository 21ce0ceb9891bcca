"""Blocks that run for the prefix tokens alone, where these are all that the head reads.

Keys and values are all that the prefix tokens need of the patch tokens: once a block's attention call is known, the
block can run again for the prefix tokens, which costs next to nothing. That is right only where each token goes its
own way outside attention (`goes_token_by_token`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]

# So many patch tokens show whether tokens mix; they make a square, for what lays tokens out in a grid.
_PATCHES_PROBED = 4


class _AttentionReached(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the block once its attention call has been reached."""


@dataclass
class LastBlock:
    """Runs a network's last block for all tokens up to its attention call, and for the prefix tokens from there on.

    The other tokens leave it as they came.

    Attributes:
        prefix: number of prefix tokens; 0 runs the block as it is.
    """

    prefix: int = 0
    _running: bool = False
    _call: tuple[Any, ...] | None = None

    def narrowed(self, forward: Forward) -> Forward:
        """Wrap the block's `forward`."""

        def run(tokens: Tensor, *others: Any, **options: Any) -> Any:
            if not self.prefix:
                return forward(tokens, *others, **options)
            self._running = True
            try:
                try:
                    return forward(tokens, *others, **options)
                except _AttentionReached:
                    output = forward(tokens[:, : self.prefix], *others, **options)
            finally:
                self._running, self._call = False, None
            # A network that reads other tokens after all is known by these: its output is not what the head says.
            left = torch.cat((tokens_of(output), tokens[:, self.prefix :].detach()), dim=1)
            return (left, *output[1:]) if isinstance(output, tuple) else left

        return run

    def attention_call(self, *call: Any) -> tuple[tuple[Any, ...], int | None]:
        """Return the arguments to attend with, and how many queries are wanted if not all.

        Inside the block, the first call ends the run for all tokens, and the second is answered with the first one's
        arguments.
        """
        if not self._running:
            return call, None
        if self._call is None:
            self._call = call
            raise _AttentionReached
        return self._call, self.prefix


@dataclass
class RepeatedBlocks:
    """Runs each block a second time for the prefix tokens, from its attention's output on.

    That is all that the layers' own scores need, and no gradient of theirs passes from block to block.

    Attributes:
        prefix: number of prefix tokens; 0 runs the blocks once.
        detached: whether the first run is without gradients.
        repeating: whether a block runs for the second time.
        left: prefix tokens (B, P, D) that left each block.
    """

    prefix: int = 0
    detached: bool = False
    repeating: bool = False
    left: list[Tensor] = field(default_factory=list)

    def repeated(self, run_once: Forward, forward: Forward) -> Forward:
        """Wrap `run_once`, what runs a block for all tokens; `forward` is the block's own."""

        def run(tokens: Tensor, *others: Any, **options: Any) -> Any:
            if not self.prefix:
                return run_once(tokens, *others, **options)
            with torch.no_grad() if self.detached else nullcontext():
                output = run_once(tokens, *others, **options)
            self.repeating = True
            try:
                again = forward(tokens[:, : self.prefix].detach(), *others, **options)
            finally:
                self.repeating = False
            self.left.append(tokens_of(again))
            return output

        return run


def tokens_of(output: Any) -> Tensor:
    """Return the tokens of a block's output, which is a tensor or a tuple that begins with them."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens


def goes_token_by_token(forward: Forward, tokens: Tensor, prefix: int) -> bool:
    """Tell whether a block, whose attention has to be passed over, treats prefix tokens alone as it does among others.

    Args:
        forward: of the block.
        tokens: that enter the first block, (B, N, D).
        prefix: number of prefix tokens.
    """
    few = tokens[:1, : prefix + _PATCHES_PROBED].detach()
    with torch.no_grad():
        try:
            among, alone = (tokens_of(forward(each))[:, :prefix] for each in (few, few[:, :prefix]))
        except Exception:
            # A block that cannot run for so few tokens does not go token by token: it lays them out in a grid.
            return False
    return among.shape == alone.shape and close(among, alone)


def close(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two results of the same computation agree, up to rounding in the precision that it ran in."""
    device = found.device.type
    dtypes = [found.dtype, expected.dtype]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    tolerance = max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))
    found, expected = found.detach().float(), expected.detach().float()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
