"""Blocks that run for the prefix tokens alone, where these are all that the head reads.

Keys and values are all that the prefix tokens need of the patch tokens: once a block's attention call is known, the
block can run again for the prefix tokens, which costs next to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]


class _AttentionReached(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the block once its attention call has been reached."""


@dataclass
class LastBlock:
    """Runs a network's last block for all tokens up to its attention call, and for the prefix tokens from there on.

    What would leave it for the patch tokens is zero.

    Attributes:
        prefix: number of prefix tokens; 0 runs the block as it is.
        echoes: number of tokens appended to the block's input (see `Echo`), for which it runs too.
    """

    prefix: int = 0
    echoes: int = 0
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
                    output = forward(self.rows(tokens, dim=1), *others, **options)
            finally:
                self._running, self._call = False, None
            if isinstance(output, tuple):
                return (self._spread(output[0], tokens), *output[1:])
            return self._spread(output, tokens)

        return run

    def attention_call(self, *call: Any) -> tuple[tuple[Any, ...], bool]:
        """Give the arguments to attend with, and whether only `rows` of the queries are wanted.

        Inside the block, the first call ends the run for all tokens, and the second is answered with the first one's
        arguments.
        """
        if not self._running:
            return call, False
        if self._call is None:
            self._call = call
            raise _AttentionReached
        return self._call, True

    def rows(self, tensor: Tensor, dim: int) -> Tensor:
        """Keep prefix tokens and echoes."""
        size = tensor.shape[dim]
        return torch.cat(
            (tensor.narrow(dim, 0, self.prefix), tensor.narrow(dim, size - self.echoes, self.echoes)), dim=dim
        )

    def mask_rows(self, mask: Tensor | None) -> Tensor | None:
        """Keep a mask's rows for them, unless it has one row for all queries."""
        return mask if mask is None or mask.shape[-2] == 1 else self.rows(mask, dim=mask.dim() - 2)

    def _spread(self, rows: Tensor, tokens: Tensor) -> Tensor:
        prefix, echoes = torch.split(rows, [self.prefix, self.echoes], dim=1)
        missing = tokens.shape[1] - rows.shape[1]
        return torch.cat((prefix, rows.new_zeros(len(rows), missing, rows.shape[2]), echoes), dim=1)


@dataclass
class DetachedBlocks:
    """Runs each block without gradients, and again with gradients for the prefix tokens, from its attention output on.

    That is all that layers' own scores need, and no gradient passes from block to block.

    Attributes:
        prefix: number of prefix tokens; 0 runs the blocks as they are.
        repeating: whether a block runs for the second time.
        leave: takes the prefix tokens (B, P, D) that leave each block.
    """

    leave: Callable[[Tensor], None]
    prefix: int = 0
    repeating: bool = False

    def repeated(self, forward: Forward) -> Forward:
        """Wrap a block's `forward`."""

        def run(tokens: Tensor, *others: Any, **options: Any) -> Any:
            if not self.prefix:
                return forward(tokens, *others, **options)
            with torch.no_grad():
                output = forward(tokens, *others, **options)
            self.repeating = True
            try:
                again = forward(tokens[:, : self.prefix].detach(), *others, **options)
            finally:
                self.repeating = False
            self.leave(again[0] if isinstance(again, tuple) else again)
            return output

        return run
