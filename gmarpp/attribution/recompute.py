"""Blocks that run again in the backward pass, from the inputs of a few of them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]

# Beyond so many tokens most of the time goes to attention matrices, and to run blocks once more costs little.
_LONG_SEQUENCE = 512
_KEPT_INPUTS = 6


class RecomputedBlocks:
    """Keeps inputs of blocks instead of their activations, and runs each block again in the backward pass.

    It wraps all blocks but the last, which the backward pass reaches before it frees anything. For short sequences
    every block's input is kept. For long ones it is that of six blocks at a time, whatever the depth: the others follow
    from the nearest one below, by blocks that run without gradients. With 24 blocks this takes 0.7 forward passes more.

    Source: Griewank & Walther, "Algorithm 799: Revolve", ACM TOMS 26, 2000, for which inputs are best kept.
    """

    def __init__(self) -> None:
        self._runs: list[Forward] = []
        self._kept: dict[int, Tensor] = {}
        # Inputs that are not what left the block below cannot be made again.
        self._given: set[int] = set()
        self._wanted: set[int] = set()
        self._left: tuple[Tensor, int] | None = None
        # The input given last, with its position.
        self._last: tuple[int, Tensor] | None = None

    def recomputed(self, forward: Forward) -> Forward:
        """Wrap the `forward` of the next block from below."""
        position = len(self._runs)
        self._runs.append(forward)

        def run(tokens: Tensor, *others: Any, **options: Any) -> Any:
            self._runs[position] = lambda tokens: forward(tokens, *others, **options)
            differentiable = tokens.requires_grad
            self._enter(position, tokens)
            first: Tensor | None = tokens

            def again(_: Tensor) -> Any:
                nonlocal first
                own, first = first, None
                if own is None:
                    own = self._input(position).detach().requires_grad_(differentiable)
                return forward(own, *others, **options)

            # Nothing is to hold the tokens, but what they are computed on tells which autocast to restore.
            output = checkpoint(again, tokens.new_empty(0), use_reentrant=False, preserve_rng_state=False)
            leaving = _tokens(output).detach()
            self._left = (leaving, leaving._version) if position < len(self._runs) - 1 else None
            return output

        return run

    def left(self, position: int) -> Tensor:
        """Give the tokens that left a block again; at no cost if the input of the next one was needed just before."""
        if self._last is not None and self._last[0] == position + 1 and position + 1 not in self._given:
            return self._last[1]
        with torch.no_grad():
            return _tokens(self._runs[position](self._input(position)))

    def _enter(self, position: int, tokens: Tensor) -> None:
        """Keep a block's input if it is worth it."""
        if position == 0:
            blocks = len(self._runs) + 1
            kept = _KEPT_INPUTS if tokens.shape[1] > _LONG_SEQUENCE else blocks
            self._wanted = set(_positions(0, blocks, kept - 1))
        if not self._follows(tokens):
            self._given.add(position)
        if position in self._wanted | self._given:
            self._kept[position] = tokens.detach()

    def _follows(self, tokens: Tensor) -> bool:
        """Whether a block's input is what left the block below, perhaps seen through a view, and unchanged."""
        if self._left is None:
            return False
        left, version = self._left
        return (
            tokens.data_ptr() == left.data_ptr()
            and (tokens.shape, tokens.stride(), tokens.dtype) == (left.shape, left.stride(), left.dtype)
            and left._version == version
        )

    def _input(self, position: int) -> Tensor:
        """Give a block's input again. What is kept of the blocks above it goes, unless there is room for all."""
        if len(self._wanted) < len(self._runs):
            self._kept = {at: tokens for at, tokens in self._kept.items() if at <= position or at in self._given}
        below = [at for at in self._kept if at <= position]
        start = max(below)
        free = len(self._wanted) - sum(at not in self._given for at in below)
        wanted = set(_positions(start, position - start + 1, free))
        tokens = self._kept[start]
        with torch.no_grad():
            for at in range(start, position):
                tokens = _tokens(self._runs[at](tokens))
                if at + 1 in wanted:
                    self._kept[at + 1] = tokens
        self._last = position, tokens
        return tokens


def _tokens(output: Any) -> Tensor:
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens


def _positions(start: int, blocks: int, free: int) -> Iterator[int]:
    """Yield the blocks from `start` on whose inputs to keep beside its own, for the fewest runs without gradients."""
    while free > 0 and blocks > 1:
        step = min(range(1, blocks), key=lambda step: step + _runs(blocks - step, free - 1) + _runs(step, free))
        start, blocks, free = start + step, blocks - step, free - 1
        yield start


@cache
def _runs(blocks: int, free: int) -> int:
    """Count the runs without gradients that visiting blocks from the top down takes, from the lowest one's input."""
    if free == 0:
        return blocks * (blocks - 1) // 2
    return min((step + _runs(blocks - step, free - 1) + _runs(step, free) for step in range(1, blocks)), default=0)
