"""The layers' own scores: how the score would change with a layer's attention if the head read that layer.

The score of layer l is the head applied to the tokens that leave block l. Its gradient ends at the layer's attention
output O_l, and nothing passes from block to block: only what lies between O_l and the block's output matters, the
block's tail. Where the head reads prefix tokens alone, the tail runs once more for these few, with the recorded rows of
O_l as the answer to its attention call. Where it reads all tokens, the tail is that of the forward pass, if its graph
is kept, or else the whole block runs again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.attend import Inputs
from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.forward import BlockRun, ForwardPass
from gmarpp.attribution.head import Head, reads_prefix, rounding
from gmarpp.attribution.seam import answered_by
from gmarpp.attribution.target import Score


class OwnScores:
    """The own scores of all layers of a forward pass.

    Args:
        passed: the forward pass, with the runs of its blocks.
        head: that makes the network's output of the last block's tokens.
    """

    def __init__(self, passed: ForwardPass, head: Head) -> None:
        self._passed, self._head = passed, head
        of_block = [[call for call in passed.calls if call.block == block] for block in range(len(passed.runs))]
        self._layers = list(zip(passed.runs, of_block, strict=True))
        assert passed.last_tokens is not None
        by_token = all(run.is_by_token and len(calls) == 1 for run, calls in self._layers)
        self._by_prefix = (
            passed.plan.tails_again
            and by_token
            and reads_prefix(head, passed.last_tokens, passed.plan.layout.prefix_tokens)
        )

    def gradients(self, score: Score, scale: float) -> list[Tensor]:
        """Return the gradient of each layer's own score with respect to the first rows of its attention output.

        Args:
            score: of an output of the head.
            scale: factor of the score.

        Returns:
            by block, (B, H, R, dv), times the factor; R is the number of prefix tokens, or of all.
        """
        if self._by_prefix:
            tails = [self._prefix_tail(*layer) for layer in self._layers]
            known = [tail for tail in tails if tail is not None]
            if len(known) == len(tails) and bool(torch.stack([alike for _, _, alike in known]).all()):
                # No tail depends on another, so one sum yields the gradients of all.
                total = torch.stack([self._score(own, score, scale) for _, own, _ in known]).sum()
                return list(torch.autograd.grad(total, [attended for attended, _, _ in known]))
            # Tokens mix outside attention, so the prefix tokens need the others.
            self._by_prefix = False
        return [self._of_all(*layer, score, scale) for layer in self._layers]

    def _prefix_tail(self, run: BlockRun, calls: Sequence[AttentionCall]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Run the tail for the prefix tokens: return its start, its output, and whether that is the block's."""
        (call,) = calls
        assert call.prefix is not None
        attended = call.prefix.detach().requires_grad_()
        tokens = run.tokens[:, : attended.shape[2]]
        try:
            with answered_by(lambda *_, **__: attended):
                own = run.again(tokens)
        except Exception:
            # The block cannot run without its other tokens, for example because of a convolution.
            return None
        expected = run.output.detach()[:, : tokens.shape[1]]
        return None if own.shape != expected.shape else (attended, own, _alike(own.detach(), expected, tokens))

    def _of_all(self, run: BlockRun, calls: Sequence[AttentionCall], score: Score, scale: float) -> Tensor:
        """Differentiate through the tail of all tokens."""
        plan = self._passed.plan
        # A graph that is recomputed in part would also keep the rest of what it recomputed.
        if plan.gradients and not plan.recompute:
            starts = [start for call in calls if (start := self._passed.outputs[call.index]) is not None]
            total = self._score(run.output, score, scale)
            found = [torch.autograd.grad(total, start, retain_graph=True)[0] for start in starts]
            return torch.cat(found, dim=1)
        attended: list[Tensor] = []

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            attended.append(Inputs.of(*args, **kwargs).attend().detach().requires_grad_())
            return attended[-1]

        with answered_by(answer):
            own = run.again(run.tokens)
        return torch.cat(torch.autograd.grad(self._score(own, score, scale), attended), dim=1)

    def _score(self, tokens: Tensor, score: Score, scale: float) -> Tensor:
        """Return the sum of the images' scores of a layer's tokens, times a factor."""
        return score(self._head(tokens)).float().sum() * scale


def _alike(own: Tensor, expected: Tensor, tokens: Tensor) -> Tensor:
    """Return whether a block's output is the expected one, measured by what the block adds to its tokens."""
    norm = torch.linalg.vector_norm
    added, size = norm((expected - tokens).float()), norm(expected.float())
    alike: Tensor = norm((own - expected).float()) <= 1e-3 * added + 4 * rounding(own, expected) * size
    return alike
