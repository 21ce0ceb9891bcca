"""A block's tail, what it computes from its attention's output and its tokens: run again for the rows that are needed.

Where tokens meet in attention alone, the tail of the prefix tokens needs no others, and costs next to nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmarpp.attribution.attend import Inputs
from gmarpp.attribution.forward import BlockRun, tokens_of
from gmarpp.attribution.precision import rounding
from gmarpp.attribution.seam import answered_by


def alike(own: Sequence[Tensor], expected: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Return whether all blocks' outputs are the expected ones, measured by what each block adds to its tokens."""
    made, wanted, given = (torch.stack(tuple(each)).detach() for each in (own, expected, tokens))
    differences = (made - wanted, wanted - given, wanted)
    error, added, size = (torch.linalg.vector_norm(each.float().flatten(1), dim=1) for each in differences)
    alike: Tensor = (error <= 1e-3 * added + 4 * rounding(made, wanted) * size).all()
    return alike


def prefix_tail(
    run: BlockRun, attended: Tensor, tokens: Tensor, left: Tensor, may_be_written: bool = True
) -> Tensor | None:
    """Run the tail for prefix tokens alone.

    Args:
        run: of the block.
        attended: rows (B, H, P, d) of the attention's output, the answer to its attention call.
        tokens: (B, P, D).
        left: what left the block for them when it ran for all tokens.
        may_be_written: see `answered_by`.

    Returns:
        the tail's output, (B, P, D), which may be another than `left`; `None` if the block cannot run for these tokens
        alone.
    """
    try:
        with answered_by(lambda *_, **__: attended, may_be_written):
            own = tokens_of(run(tokens))
    except Exception:
        # For example, a convolution needs all tokens; as the block's code is not ours, it may say so by any error. What
        # is wrong with it beside the missing tokens comes up again, and is raised, when the block runs for all.
        return None
    return None if own.shape != left.shape else own


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
