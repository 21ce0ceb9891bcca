"""The layers' own scores: how the score would change with a layer's attention if the head read that layer.

The score of layer l is the head applied to the tokens that leave block l. Its gradient ends at the layer's attention
output O_l, and nothing passes from block to block: only what stands between O_l and the block's output matters, the
block's tail. Where the head reads prefix tokens alone, the tail runs once more for these few, with the recorded rows of
O_l as the answer to its attention call. Where it reads all tokens, the tail is that of the forward pass, if its graph
is kept, or else the whole block runs again.
"""

from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.attend import Inputs
from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.forward import BlockRun, ForwardPass
from gmarpp.attribution.head import check_head, head_output, reads_prefix, rounding
from gmarpp.attribution.seam import answered_by
from gmarpp.attribution.target import Score


class OwnScores:
    """The own scores of all layers of a forward pass.

    Args:
        passed: the forward pass, with the runs of its blocks.
        output: of the network.

    Raises:
        UnsupportedNetworkError: if the architecture's head does not give the network's output.
    """

    def __init__(self, passed: ForwardPass, output: Any) -> None:
        self._passed, self._output = passed, output
        self._layers = list(zip(passed.runs, passed.calls, strict=False))
        check_head(output, passed)
        by_token = all(run.is_by_token for run in passed.runs)
        self._by_prefix = passed.plan.tails_again and by_token and reads_prefix(passed, output)

    def gradients(self, score: Score, scale: float) -> list[Tensor]:
        """Return the gradient of each layer's own score with respect to the first rows of its attention output.

        Args:
            score: of an output of the head.
            scale: factor of the score.

        Returns:
            by block, (B, H, R, dv), times the factor; R is the number of prefix tokens, or of all.
        """
        if self._by_prefix:
            found = [self._of_prefix(*layer, score, scale) for layer in self._layers]
            alike = [layer[1] for layer in found if layer is not None]
            if len(alike) == len(found) and bool(torch.stack(alike).all()):
                return [layer[0] for layer in found if layer is not None]
            # Tokens mix outside of attention, so the prefix tokens cannot do without the others.
            self._by_prefix = False
        return [self._of_all(*layer, score, scale) for layer in self._layers]

    def _of_prefix(
        self, run: BlockRun, call: AttentionCall, score: Score, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        """Differentiate through the tail of the prefix tokens; with whether it gives what the block gave for them."""
        assert call.prefix is not None
        attended = call.prefix.detach().requires_grad_()
        tokens = run.tokens[:, : attended.shape[2]]
        try:
            with answered_by(lambda *_, **__: attended):
                own = run.again(tokens)
        except Exception:
            # Such as a convolution's: the block cannot run without its other tokens.
            return None
        expected = run.output.detach()[:, : tokens.shape[1]]
        if own.shape != expected.shape:
            return None
        return self._differentiated(own, attended, score, scale), _alike(own.detach(), expected, tokens)

    def _of_all(self, run: BlockRun, call: AttentionCall, score: Score, scale: float) -> Tensor:
        """Differentiate through the tail of all tokens."""
        plan = self._passed.plan
        # A graph that is recomputed in part would keep what it has recomputed of the rest.
        if plan.gradients and not plan.recompute:
            return self._differentiated(run.output, self._passed.outputs[call.index], score, scale)
        attended: list[Tensor] = []

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            attended.append(Inputs.of(*args, **kwargs).attend().detach().requires_grad_())
            return attended[-1]

        with answered_by(answer):
            own = run.again(run.tokens)
        return self._differentiated(own, attended[0], score, scale)

    def _differentiated(self, tokens: Tensor, start: Any, score: Score, scale: float) -> Tensor:
        made = score(head_output(self._passed.plan.layout, tokens, self._output))
        gradient: Tensor = torch.autograd.grad(made.sum() * scale, start, retain_graph=True)[0]
        return gradient


def _alike(own: Tensor, expected: Tensor, tokens: Tensor) -> Tensor:
    """Return whether a block's output is the expected one, measured by what the block adds to its tokens."""
    norm = torch.linalg.vector_norm
    added, size = norm((expected - tokens).float()), norm(expected.float())
    alike: Tensor = norm((own - expected).float()) <= 1e-3 * added + 4 * rounding(own, expected) * size
    return alike
