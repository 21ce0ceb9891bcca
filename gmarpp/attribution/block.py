"""One transformer block while its network is explained: everything that happens to it, in order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmarpp.attribution.attend import repeated
from gmarpp.attribution.balanced import ruled
from gmarpp.attribution.forward import BlockRun, ForwardPass, tokens_of
from gmarpp.attribution.replay import Forward, forwards_replaced
from gmarpp.attribution.seam import answered_by, is_intercepted
from gmarpp.network.errors import UnsupportedNetworkError


@dataclass(frozen=True)
class Block:
    """Takes the place of a block's `forward`, once.

    Attributes:
        forward: the block's own.
        position: from the input upward.
        passing: the forward pass that it is part of.
    """

    forward: Forward
    position: int
    passing: ForwardPass

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Run the block with gradients, recomputation and a record of its tokens as the plan says."""
        if not is_intercepted():
            return self.forward(*inputs, **options)
        if not inputs:
            raise UnsupportedNetworkError(
                f"block {self.position} takes its tokens by keyword ({', '.join(options)}): pass them by position"
            )
        tokens, *others = inputs
        tokens = self.passing.enter_block(self.position, tokens)
        output = self._run(tokens, others, options)
        rest = output[1:] if isinstance(output, tuple) else None
        run = BlockRun(self.forward, tokens.detach(), others, options, tokens_of(output), rest)
        tokens = self.passing.leave_block(self.position, run)
        return tokens if rest is None else (tokens, *rest)

    def _run(self, tokens: Tensor, others: Sequence[Any], options: dict[str, Any]) -> Any:
        plan, forward = self.passing.plan, self.forward
        if not plan.gradients:
            # The graphs of the layers' own scores also start after the block has run.
            with torch.no_grad():
                return forward(tokens, *others, **options)
        # The backward pass reaches the last block before it has freed anything.
        if not plan.recompute or self.position == len(plan.layout.blocks) - 1:
            return forward(tokens, *others, **options)
        descent, first = self.passing.descent, True
        attend_again = repeated(descent)

        def run(tokens: Tensor) -> Any:
            nonlocal first
            if first:
                first = False
                return forward(tokens, *others, **options)
            # The backward pass may run this in another thread.
            with answered_by(attend_again), ruled(descent):
                return forward(tokens, *others, **options)

        # The recomputed function must not refer to the graph, not even through `self`.
        return checkpoint(run, tokens, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def wrapped(blocks: Sequence[nn.Module], passing: ForwardPass) -> Iterator[None]:
    """Replace each block's `forward` by a `Block`, and restore it even after an error."""
    with forwards_replaced(blocks, [Block(block.forward, index, passing) for index, block in enumerate(blocks)]):
        yield
