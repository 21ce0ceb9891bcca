"""The layers' own scores, differentiated when the backward pass gets to the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gmarpp.attribution.scale import gradients

ScoreTokens = Callable[[Tensor], Tensor]
"""Takes tokens that left a block, (B, N, D) or the prefix tokens alone; returns their scores, (B,)."""


class LayerScores:
    """Gradients of the layers' own scores with respect to their attention's output, for heads that read any tokens.

    The gradient is asked for just before the backward pass of the network's score goes through the block: from what
    left the block to its attention and no further, so that no layer keeps what its score is computed from.

    Attributes:
        score_tokens: set before the backward pass runs.

    Args:
        take: takes the position of a block and the gradient, float32.
    """

    def __init__(self, take: Callable[[int, Tensor], None]) -> None:
        self.score_tokens: ScoreTokens | None = None
        self._take = take
        self._handles: dict[int, tuple[Tensor, GradientEdge]] = {}
        self._scale: Tensor | None = None
        self._running = False

    def watch(self, position: int, tokens: Tensor, attended: GradientEdge, again: Callable[[], Tensor] | None) -> None:
        """Ask for the gradient of a layer's own score when the gradient of its tokens is there.

        Args:
            position: of the block.
            tokens: what left it, (B, N, D).
            attended: of its attention's output.
            again: returns the tokens again, where the block is recomputed and they are not to be kept.
        """
        self._handles[position] = _Score.apply(tokens, self, again), attended
        tokens.register_hook(lambda _: self._differentiate(position))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Let go of what belongs to the graph."""
        self._handles.clear()
        self.score_tokens = None
        del self._take

    def _differentiate(self, position: int) -> None:
        # The tokens' hook is also called on the way from the handle to the attention.
        if self._running or self.score_tokens is None:
            return
        handle, attended = self._handles[position]
        self._running = True
        try:
            (local,) = torch.autograd.grad(handle, (attended,), retain_graph=True)
        finally:
            self._running = False
        assert self._scale is not None
        self._take(position, local.float() / self._scale)

    def gradient(self, tokens: Tensor) -> Tensor:
        """Return the gradient of the layer's own score with respect to the tokens, scaled to their dtype."""
        assert self.score_tokens is not None
        with torch.enable_grad():
            own = tokens.detach().requires_grad_()
            (gradient,), self._scale = gradients(self.score_tokens(own), [own])
        assert gradient is not None
        self._scale = self._scale.view(-1, *[1] * 3)
        return gradient


class _Score(torch.autograd.Function):
    """Zero, with the gradient of a layer's own score."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scores: LayerScores, again: Callable[[], Tensor] | None) -> Tensor:
        device = tokens.device.type
        ctx.scores, ctx.again = scores, again
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        if again is None:
            ctx.save_for_backward(tokens)
        return torch.zeros((), device=tokens.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        tokens = ctx.saved_tensors[0] if ctx.again is None else ctx.again()
        with torch.autocast(*ctx.autocast):
            return ctx.scores.gradient(tokens), None, None
