"""One transformer block while its network is explained: everything that happens to it, in order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmarpp.attribution.forward import BlockRun, ForwardPass
from gmarpp.attribution.head import DescribedHead, reads_prefix
from gmarpp.attribution.recompute import narrowed, recomputed
from gmarpp.attribution.replay import Forward, forwards_replaced
from gmarpp.attribution.seam import is_intercepted
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
        run = BlockRun(self.forward, others, options)
        return self.passing.leave_block(self.position, run, tokens, self._run(run, tokens))

    def _run(self, run: BlockRun, tokens: Tensor) -> Any:
        passing, plan = self.passing, self.passing.plan
        last = len(plan.layout.blocks) - 1
        is_last, prefix = self.position == last, plan.layout.prefix_at(last)
        # Asked as soon as there are tokens like those that the head reads, when a GPU has little to do.
        first_alike = 0 if plan.layout.prefix_at(0) == prefix and not plan.steps else last
        if self.position == first_alike and plan.tails_again and plan.head_again:
            assert plan.layout.head is not None
            passing.reads_prefix = reads_prefix(DescribedHead(plan.layout.head), tokens, prefix)
        if not plan.gradients:
            # The graphs of the layers' own scores also start after the block has run.
            with torch.no_grad():
                return run(tokens)
        # The balanced rule follows the graph of the tail.
        may_narrow = passing.reads_prefix and passing.leaves_tokens and passing.attends_once and not plan.is_balanced
        if is_last and may_narrow and run.is_by_token:
            return narrowed(run, tokens, prefix, passing.attend, passing.descent)
        # The backward pass reaches the last block before it has freed anything.
        return run(tokens) if is_last or not plan.recompute else recomputed(run, tokens, passing.descent)


@contextmanager
def wrapped(blocks: Sequence[nn.Module], passing: ForwardPass) -> Iterator[None]:
    """Replace each block's `forward` by a `Block`, and restore it even after an error."""
    with forwards_replaced(blocks, [Block(block.forward, index, passing) for index, block in enumerate(blocks)]):
        yield
