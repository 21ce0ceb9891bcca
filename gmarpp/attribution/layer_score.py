"""The layers' own scores, differentiated when the backward pass gets to the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.echo import Echo


class LayerScores:
    """What stands for the layers' own scores in the sum that is differentiated.

    Attributes:
        terms: one per layer: zero, with the gradient that the layer's own score has.
        score_tokens: gives the scores of tokens that left a block; needed when the backward pass runs.

    Args:
        blocks: number of the transformer blocks.
        tokens_left: gives again what left a block, by its position, if all but the last are recomputed.
    """

    def __init__(self, blocks: int, tokens_left: Callable[[int], Tensor] | None) -> None:
        self.terms: list[Tensor] = []
        self.score_tokens: Callable[[Tensor], Tensor] | None = None
        self._blocks = blocks
        self._tokens_left = tokens_left

    def add(self, echo: Echo, echoes: Tensor, position: int) -> None:
        """Add the term of a layer, by the echoes that left its block."""
        tokens_left, again = self._tokens_left, None
        # The last block, and its input, are never recomputed.
        if tokens_left is not None and position < self._blocks - 2:

            def again() -> Tensor:
                return echo.split(tokens_left(position))[1]

        self.terms.append(_LayerScore.apply(echoes, self, again))

    def clear(self) -> None:
        """Let go of what belongs to the graph."""
        self.terms.clear()
        self.score_tokens = None

    def gradient(self, echoes: Tensor, factor: Tensor) -> Tensor:
        """Give the gradient of a layer's own score, times a factor, with respect to the echoes that left the layer."""
        assert self.score_tokens is not None
        with torch.enable_grad():
            own = echoes.detach().requires_grad_()
            return torch.autograd.grad(self.score_tokens(own).sum() * factor, own)[0]


class _LayerScore(torch.autograd.Function):
    """Zero, with the gradient of a layer's own score: no layer keeps what its score is computed from."""

    @staticmethod
    def forward(ctx: Any, echoes: Tensor, scores: LayerScores, again: Callable[[], Tensor] | None) -> Tensor:
        device = echoes.device.type
        ctx.scores, ctx.again = scores, again
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        if again is None:
            ctx.save_for_backward(echoes)
        return torch.zeros((), device=echoes.device)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        echoes = ctx.saved_tensors[0] if ctx.again is None else ctx.again()
        with torch.autocast(*ctx.autocast):
            return ctx.scores.gradient(echoes, factors[0]), None, None
