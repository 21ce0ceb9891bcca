"""A block's tail, what it computes from its attention's output and its tokens: run again for the rows that are needed.

Where tokens meet in attention alone, the tail of the prefix tokens needs no others, and costs next to nothing.
"""

from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.attend import Inputs
from gmarpp.attribution.forward import BlockRun, tokens_of
from gmarpp.attribution.head import rounding
from gmarpp.attribution.seam import answered_by


def alike(own: Tensor, expected: Tensor, tokens: Tensor) -> Tensor:
    """Return whether a block's output is the expected one, measured by what the block adds to its tokens."""
    own, norm = own.detach(), torch.linalg.vector_norm
    added, size = norm((expected - tokens.detach()).float()), norm(expected.float())
    alike: Tensor = norm((own - expected).float()) <= 1e-3 * added + 4 * rounding(own, expected) * size
    return alike


def tail(run: BlockRun, attended: Tensor, tokens: Tensor) -> Tensor:
    """Run a block again for its first R tokens, (B, R, D), with rows (B, H, R, d) as the answer to its attention."""
    with answered_by(lambda *_, **__: attended):
        return tokens_of(run(tokens))


def prefix_tail(run: BlockRun, attended: Tensor, tokens: Tensor, left: Tensor) -> tuple[Tensor, Tensor] | None:
    """Run the tail for prefix tokens alone.

    Args:
        run: of the block.
        attended: rows (B, H, P, d) of the attention's output.
        tokens: (B, P, D).
        left: what left the block for them when it ran for all tokens.

    Returns:
        the tail's output, (B, P, D), and whether it is `left`; `None` if the block cannot run for these tokens alone.
    """
    try:
        own = tail(run, attended, tokens)
    except Exception:
        # For example, a convolution needs all tokens; as the block's code is not ours, it may say so by any error. What
        # is wrong with it beside the missing tokens comes up again, and is raised, when the block runs for all.
        return None
    return None if own.shape != left.shape else (own, alike(own, left, tokens))


def whole_tail(run: BlockRun, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a block again for all tokens, (B, N, D), with a graph that starts at its attention's output.

    Returns:
        this output, (B, H, N, d), of each of its attention calls, and the block's own, (B, N, D).
    """
    attended: list[Tensor] = []

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        attended.append(Inputs.of(*args, **kwargs).attend().detach().requires_grad_())
        return attended[-1]

    with answered_by(answer):
        own = tokens_of(run(tokens))
    return attended, own
