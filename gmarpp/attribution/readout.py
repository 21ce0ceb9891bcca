"""Where a map starts: the tokens that the head reads, found by the score's gradient."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.attribution.call import CUT
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import distinct_sum
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.output import check_finite


class Readout:
    """Equal shares for the tokens that a score reads.

    They are the tokens that the score depends on: the class token, all patches under average pooling, both tokens of a
    distilled network, the queries of an attention-pool head. Where a score's gradient is zero, for example because
    the weights of its class are, they are the tokens that any output depends on. A head that reads several layers (of
    segmentation, for example) gives equal shares to the tokens of all.

    Args:
        scores: of each image, (B,), with the network's graph.
        output: of the network.
        passed: the forward pass.
        scale: factor of the score.

    Raises:
        UnsupportedNetworkError: if the score does not depend on the last layer.
    """

    def __init__(self, scores: Tensor, output: Any, passed: ForwardPass, scale: float) -> None:
        gradients = _gradients_by_token(scores.float().sum() * scale, passed)
        if gradients is None:
            raise UnsupportedNetworkError(
                "the score does not depend on the last attention layer by any gradient: explain a score of the "
                f"network's output; {CUT}"
            )
        self._output, self._passed, self._gradients = output, passed, gradients
        self._read = [_is_read(gradient) for gradient in gradients]

    def is_plain(self) -> Tensor:
        """Return whether all gradients are finite and none is zero for all tokens of an image."""
        finite = [gradient.isfinite().all() for gradient in self._gradients]
        return torch.stack([*finite, (_count(self._read) > 0).all()]).all()

    def require_plain(self, needs_gradient: bool) -> None:
        """Find the tokens where a gradient is zero.

        Args:
            needs_gradient: whether a method needs a score with a gradient.

        Raises:
            ValueError: for gradients that are not finite, or zero where they are needed.
        """
        for gradient in self._gradients:
            check_finite(gradient.flatten(1), "gradients")
        without = _count(self._read) == 0
        images = without.nonzero().flatten().tolist()
        if images and needs_gradient:
            raise ValueError(
                f"the score of images {images} has a gradient of exactly zero, from which methods that use gradients "
                "cannot make a map: explain another class or score, or ask for methods without gradients (rollout, "
                "attention)"
            )
        # What the head reads for other classes, it also reads for this one.
        general = [_is_read(each) for each in _gradients_by_token(distinct_sum(self._output), self._passed) or ()]
        if not general or (_count(general)[without] == 0).any():
            raise ValueError(
                f"no output of the network depends on the tokens of images {images}, so they have no readout"
            )
        self._read = [torch.where(without[:, None], *pair) for pair in zip(general, self._read, strict=True)]

    def rows(self) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the row above the top layer, and those of other layers that are read, of which an image's sum is 1.

        Returns:
            float32, (B, Q), and by position of the blocks in `ForwardPass.read`, (B, N).
        """
        top, *others = (each / _count(self._read)[:, None] for each in self._read)
        return top, dict(zip(self._passed.read, others, strict=True))


def _is_read(gradient: Tensor) -> Tensor:
    """Return 1 for the tokens with any gradient, (B, N, D) or (B, H, N, d), and 0 for others."""
    read = (gradient != 0).any(dim=-1)
    return (read.any(dim=1) if gradient.dim() == 4 else read).float()


def _gradients_by_token(total: Tensor, passed: ForwardPass) -> list[Tensor] | None:
    """Return the gradient of a number where the graph of the score begins, (B, N, D) or (B, H, Q, d), and at the taps.

    `None` where it does not depend on the first of these places.
    """
    starts: list[Any] = [passed.score_start, *(passed.chain.taps[block] for block in passed.read)]
    if starts[0] is None or not total.requires_grad:
        return None
    first, *others = torch.autograd.grad(total, starts, retain_graph=True, allow_unused=True)
    if first is None:
        return None
    top = passed.calls[-1]
    if top.is_class and top.block is None:
        first = F.pad(first, (0, 0, 0, top.keys - first.shape[2]))
    elif any(starts[0] is each for each in (passed.last_tokens, passed.top)):
        first = _by_token(first, passed)
    # A part of the score alone, such as one image's, may not read them.
    return [first, *(first.new_zeros(first.shape) if each is None else _by_token(each, passed) for each in others)]


def _by_token(gradient: Tensor, passed: ForwardPass) -> Tensor:
    # Some networks lay out tokens as (B, h, w, D) or (B, D, h, w).
    return (gradient.movedim(1, -1) if passed.plan.layout.channels_first else gradient).flatten(1, -2)


def _count(read: Sequence[Tensor]) -> Tensor:
    """Return how many tokens of an image are read, (B,), of all layers."""
    return torch.stack([each.sum(dim=1) for each in read]).sum(dim=0)
