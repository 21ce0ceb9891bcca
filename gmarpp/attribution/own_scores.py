"""The layers' own scores: how the score would change with a layer's attention if the head read that layer.

The score of layer l is the head applied to the tokens that leave block l. Its gradient ends at the layer's attention
output O_l, and nothing passes from block to block: only what lies between O_l and the block's output matters, the
block's tail. Where the head reads prefix tokens alone, the tail runs once more for these few, with the recorded rows of
O_l as the answer to its attention call. Where it reads all tokens, the tail is that of the forward pass, if its graph
is kept, or else the whole block runs again.
"""

from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.decisions import decide
from gmarpp.attribution.forward import ForwardPass
from gmarpp.attribution.head import DescribedHead, Head, agreement, head_of
from gmarpp.attribution.scores import Scores
from gmarpp.attribution.tail import alike, prefix_tail, whole_tail
from gmarpp.attribution.target import Score


class OwnScores:
    """The own scores of all layers of a forward pass.

    Args:
        passed: the forward pass, with the runs of its blocks.
        output: of the network.
        scores: of the output.
        replay: the network with its blocks skipped, its head where the architecture describes no other.
        may_be_written: whether it attended otherwise than through the seam.
    """

    def __init__(self, passed: ForwardPass, output: Any, scores: Scores, replay: Head, may_be_written: bool) -> None:
        self._may_be_written = may_be_written
        self._passed, self._output, self._scores, self._replay = passed, output, scores, replay
        by_token = all(run.is_by_token for run in passed.runs)
        self._tails_may_run = passed.plan.tails_again and passed.attends_once and by_token
        self._known: tuple[Head, bool] | None = None
        self._described, self._agrees = self._quick_head() if self._tails_may_run else (None, None)

    def _quick_head(self) -> tuple[Head | None, Tensor | None]:
        """Return the architecture's head, if it may read prefix tokens alone, and whether these make the output."""
        described = self._passed.plan.layout.head
        if described is None or not self._passed.reads_prefix:
            return None, None
        head = DescribedHead(described, self._output)
        return head, self._of_prefix(head)

    def _of_prefix(self, head: Head) -> Tensor | None:
        """Return whether a head makes the network's output, of every image, from the last prefix tokens alone."""
        assert self._passed.last_tokens is not None
        tokens, prefix = self._passed.last_tokens.detach(), self._passed.plan.layout.prefix_at(0)
        try:
            with torch.no_grad():
                return agreement(head(tokens[:, :prefix]), self._output) if prefix else None
        except Exception:
            # For example, the head may arrange the patch tokens in a grid; as its code is not ours, it may fail by any
            # error. One that all tokens cause is raised where the head is needed (`head_of`).
            return None

    def gradients(self, score: Score, scale: float) -> tuple[list[Tensor], Tensor]:
        """Return the gradient of each layer's own score with respect to the first rows of its attention output.

        A GPU is not waited for: where the gradients turn out to be none of the network's own blocks and head,
        `carefully` makes them anew.

        Args:
            score: of an output of the head.
            scale: factor of the score.

        Returns:
            by block, (B, H, R, dv), times the factor, R the number of prefix tokens or of all; and whether they are
            right, a scalar on the network's device.
        """
        if self._described is not None and self._agrees is not None:
            found = self._by_prefix_tails(self._described, score, scale)
            if found is not None:
                gradients, is_alike = found
                return gradients, is_alike & self._agrees
        right = torch.ones((), dtype=torch.bool, device=self._passed.entered[0].device)
        return self.carefully(score, scale), right

    def carefully(self, score: Score, scale: float) -> list[Tensor]:
        """Return the gradients as `gradients` does, by a way that was made sure of first.

        Raises:
            ValueError: if the scores are not finite.
            UnsupportedNetworkError: if the network's head cannot be run alone.
        """
        # No head would make such an output again.
        self._scores.require_finite()
        passed = self._passed
        assert passed.last_tokens is not None
        self._agrees = None
        if self._known is None:
            agrees = self._of_prefix(self._replay) if self._tails_may_run else None
            if agrees is not None and decide(agrees)[0]:
                self._known = self._replay, True
            else:
                self._known = head_of(passed, self._output, self._replay), False
        head, by_prefix = self._known
        if by_prefix:
            found = self._by_prefix_tails(head, score, scale)
            if found is not None and decide(found[1])[0]:
                return found[0]
            # Tokens mix outside attention, so the prefix tokens need the others.
            self._known = head, False
        return [self._of_all(head, block, score, scale) for block in range(len(passed.runs))]

    def _calls(self, block: int) -> list[AttentionCall]:
        return [call for call in self._passed.calls if call.block == block]

    def _by_prefix_tails(self, head: Head, score: Score, scale: float) -> tuple[list[Tensor], Tensor] | None:
        """Differentiate through the tails of the prefix tokens, and return whether these are the blocks' own.

        `None` if they cannot run without the others.
        """
        passed, starts, made = self._passed, [], []
        for block in range(len(passed.runs)):
            (call,) = self._calls(block)
            assert call.prefix is not None
            starts.append(call.prefix.detach().requires_grad_())
        prefix = starts[0].shape[2]
        entered, left = ([each[:, :prefix].detach() for each in tokens] for tokens in (passed.entered, passed.left))
        for layer in zip(passed.runs, starts, entered, left, strict=True):
            own = prefix_tail(*layer, self._may_be_written)
            if own is None:
                return None
            made.append(own)
        is_alike = alike(made, left, entered)
        # No tail depends on another, so one sum yields the gradients of all.
        total = torch.stack([score(output).float().sum() for output in head.of_layers(made)]).sum()
        return list(torch.autograd.grad(total * scale, starts)), is_alike

    def _of_all(self, head: Head, block: int, score: Score, scale: float) -> Tensor:
        """Differentiate through the tail of all tokens."""
        passed, plan = self._passed, self._passed.plan
        # A graph that is recomputed in part would also keep the rest of what it recomputed.
        if plan.gradients and not plan.recompute:
            starts = [start for call in self._calls(block) if (start := passed.outputs[call.index]) is not None]
            total = score(head(passed.left[block])).float().sum() * scale
            found = [torch.autograd.grad(total, start, retain_graph=True)[0] for start in starts]
            return torch.cat(found, dim=1)
        attended, own = whole_tail(passed.runs[block], passed.entered[block])
        return torch.cat(torch.autograd.grad(score(head(own)).float().sum() * scale, attended), dim=1)
