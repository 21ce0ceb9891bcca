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
from gmarpp.attribution.forward import BlockRun, ForwardPass
from gmarpp.attribution.head import check_head, head_output
from gmarpp.attribution.tail import prefix_tail, whole_tail
from gmarpp.attribution.target import Score


class OwnScores:
    """The own scores of all layers of a forward pass.

    Args:
        passed: the forward pass, with the runs of its blocks.
        output: of the network.

    Raises:
        UnsupportedNetworkError: if the architecture's head does not reproduce the network's output.
    """

    def __init__(self, passed: ForwardPass, output: Any) -> None:
        self._passed, self._output = passed, output
        check_head(output, passed)
        self._by_prefix = passed.reads_prefix and all(run.is_by_token for run in passed.runs)

    def gradients(self, score: Score, scale: float) -> list[Tensor]:
        """Return the gradient of each layer's own score with respect to the first rows of its attention output.

        Args:
            score: of an output of the head.
            scale: factor of the score.

        Returns:
            by block, (B, H, R, dv), times the factor; R is the number of prefix tokens, or of all.
        """
        passed = self._passed
        layers = list(zip(passed.runs, passed.calls, passed.entered, passed.left, strict=False))
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
        self, run: BlockRun, call: AttentionCall, entered: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Run the tail for the prefix tokens: return its start, its output, and whether that is the block's."""
        assert call.prefix is not None
        attended = call.prefix.detach().requires_grad_()
        tokens, expected = (each[:, : attended.shape[2]].detach() for each in (entered, left))
        found = prefix_tail(run, attended, tokens, expected)
        return None if found is None else (attended, *found)

    def _of_all(
        self, run: BlockRun, call: AttentionCall, entered: Tensor, left: Tensor, score: Score, scale: float
    ) -> Tensor:
        """Differentiate through the tail of all tokens."""
        plan = self._passed.plan
        # A graph that is recomputed in part would also keep the rest of what it recomputed.
        if plan.gradients and not plan.recompute:
            start = self._passed.outputs[call.index]
            assert start is not None
            return torch.autograd.grad(self._score(left, score, scale), start, retain_graph=True)[0]
        attended, own = whole_tail(run, entered)
        return torch.autograd.grad(self._score(own, score, scale), attended)[0]

    def _score(self, tokens: Tensor, score: Score, scale: float) -> Tensor:
        """Return the sum of the images' scores of a layer's tokens, times a factor."""
        return score(head_output(self._passed.plan.layout, tokens, self._output)).float().sum() * scale
