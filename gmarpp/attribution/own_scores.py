"""The layers' own scores: how the score would change with a layer's attention if the head read that layer.

The score of layer l is the head applied to the tokens that leave block l. Its gradient ends at the layer's attention
output O_l, and nothing passes from block to block: only what lies between O_l and the block's output matters, the
block's tail. Where the head reads prefix tokens alone, the tail runs once more for these few, with the recorded rows of
O_l as the answer to its attention call. Where it reads all tokens, the tail is that of the forward pass, if its graph
is kept, or else the whole block runs again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.forward import BlockRun, ForwardPass
from gmarpp.attribution.head import Head, reads_prefix
from gmarpp.attribution.tail import prefix_tail, whole_tail
from gmarpp.attribution.target import Score


class OwnScores:
    """The own scores of all layers of a forward pass.

    Args:
        passed: the forward pass, with the runs of its blocks.
        head: that makes the network's output of the last block's tokens.
    """

    def __init__(self, passed: ForwardPass, head: Head) -> None:
        self._passed, self._head = passed, head
        assert passed.last_tokens is not None
        may_run = passed.plan.tails_again and passed.attends_once and all(run.is_by_token for run in passed.runs)
        prefix = passed.plan.layout.prefix_at(0)
        self._by_prefix = may_run and reads_prefix(head, passed.last_tokens, prefix)

    def gradients(self, score: Score, scale: float) -> list[Tensor]:
        """Return the gradient of each layer's own score with respect to the first rows of its attention output.

        Args:
            score: of an output of the head.
            scale: factor of the score.

        Returns:
            by block, (B, H, R, dv), times the factor; R is the number of prefix tokens, or of all.
        """
        passed = self._passed
        calls = [[call for call in passed.calls if call.block == block] for block in range(len(passed.runs))]
        layers = list(zip(passed.runs, calls, passed.entered, passed.left, strict=True))
        if self._by_prefix:
            tails = [self._prefix_tail(*layer) for layer in layers]
            known = [tail for tail in tails if tail is not None]
            if len(known) == len(tails) and bool(torch.stack([alike for _, _, alike in known]).all()):
                # No tail depends on another, so one sum yields the gradients of all.
                total = torch.stack([self._score(own, score, scale) for _, own, _ in known]).sum()
                return list(torch.autograd.grad(total, [attended for attended, _, _ in known]))
            # Tokens mix outside attention, so the prefix tokens need the others.
            self._by_prefix = False
        return [self._of_all(*layer, score, scale) for layer in layers]

    def _prefix_tail(
        self, run: BlockRun, calls: Sequence[AttentionCall], entered: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Run the tail for the prefix tokens: return its start, its output, and whether that is the block's."""
        (call,) = calls
        assert call.prefix is not None
        attended = call.prefix.detach().requires_grad_()
        tokens, expected = (each[:, : attended.shape[2]].detach() for each in (entered, left))
        found = prefix_tail(run, attended, tokens, expected)
        return None if found is None else (attended, *found)

    def _of_all(
        self, run: BlockRun, calls: Sequence[AttentionCall], entered: Tensor, left: Tensor, score: Score, scale: float
    ) -> Tensor:
        """Differentiate through the tail of all tokens."""
        plan = self._passed.plan
        # A graph that is recomputed in part would also keep the rest of what it recomputed.
        if plan.gradients and not plan.recompute:
            starts = [start for call in calls if (start := self._passed.outputs[call.index]) is not None]
            total = self._score(left, score, scale)
            found = [torch.autograd.grad(total, start, retain_graph=True)[0] for start in starts]
            return torch.cat(found, dim=1)
        attended, own = whole_tail(run, entered)
        return torch.cat(torch.autograd.grad(self._score(own, score, scale), attended), dim=1)

    def _score(self, tokens: Tensor, score: Score, scale: float) -> Tensor:
        """Return the sum of the images' scores of a layer's tokens, times a factor."""
        return score(self._head(tokens)).float().sum() * scale
