"""Blocks of which little is kept for the backward pass, because it runs them again.

The last block is one whenever the head reads prefix tokens only: its tail has no gradient for the others.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gmarpp.attribution.attend import repeated
from gmarpp.attribution.balanced import ruled
from gmarpp.attribution.decisions import decide
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.forward import BlockRun
from gmarpp.attribution.seam import Handler, answered_by
from gmarpp.attribution.tail import alike, prefix_tail, whole_tail
from gmarpp.network.errors import UnsupportedNetworkError


def recomputed(run: Callable[[Tensor], Any], tokens: Tensor, descent: Descent) -> Any:
    """Run a block without keeping its activations; the backward pass runs it again."""
    attend_again, first = repeated(descent), True

    def run_either_time(tokens: Tensor) -> Any:
        nonlocal first
        if first:
            first = False
            return run(tokens)
        # The backward pass may run this in another thread.
        with answered_by(attend_again), ruled(descent):
            return run(tokens)

    # The recomputed function must not refer to the graph.
    return checkpoint(run_either_time, tokens, use_reentrant=False, preserve_rng_state=False)


def narrowed(run: BlockRun, tokens: Tensor, prefix: int, attend: Handler, descent: Descent) -> Any:
    """Run the last block; the backward pass runs it again up to its attention, and its tail for the prefix tokens.

    Args:
        run: of the block, which returns tokens alone.
        tokens: with a graph, (B, N, D).
        prefix: number of prefix tokens; the tail runs again for all tokens if a gradient reaches others, too.
        attend: answers the block's attention call.
        descent: the way down.
    """
    answers: list[tuple[Tensor, Tensor]] = []

    dropping = ExitStack()

    def attend_and_drop(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = attend(*args, **kwargs)
        answers.append((_Place.apply(output), output[:, :, :prefix].detach().clone()))
        # What the tail would keep goes. Its graph stays, so that a gradient which comes by another way than the tokens
        # that the block returns is an error, and not lost.
        dropping.enter_context(saved_tensors_hooks(_drop, _refuse))
        return output

    def run_and_drop(tokens: Tensor) -> Any:
        with dropping:
            return run(tokens)

    with answered_by(attend_and_drop):
        left = recomputed(run_and_drop, tokens, descent)
    if len(answers) != 1:
        # Refused when the forward pass is over.
        return left
    if not isinstance(left, Tensor):
        raise UnsupportedNetworkError(
            f"the last block returns {type(left).__name__}, the one below it a tensor: expected "
            "blocks that return alike"
        )
    found: Tensor = _NarrowTail.apply(left.detach(), *answers[0], tokens, run)
    return found


def _drop(_: Tensor) -> None:
    return None


def _refuse(_: None) -> Tensor:
    raise UnsupportedNetworkError("the score reads a tensor of the last block that is not in what the block returns")


class _Place(torch.autograd.Function):
    """A tensor's place in the graph, without its values and their memory."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _NarrowTail(torch.autograd.Function):
    """The tokens that left a block; backward, its tail, run again for the prefix tokens if no other has a gradient."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, place: Tensor, attended: Tensor, tokens: Tensor, run: BlockRun) -> Tensor:
        device = left.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # The backward pass may run in another thread.
        ctx.autocast = torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)
        ctx.run, ctx.queries = run, place.shape[2]
        ctx.save_for_backward(attended, tokens, left[:, : attended.shape[2]].clone())
        return left.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (outer,), (attended, tokens, left) = gradients, ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast:
            starts, own = _again(ctx.run, attended, tokens, left, needs_others=outer[:, left.shape[1] :].any())
        found = torch.autograd.grad(own, starts, outer[:, : own.shape[1]], materialize_grads=True)
        # Prefix tokens may be the only queries.
        of_place, of_tokens = (
            F.pad(each, (0, 0, 0, rows - each.shape[-2]))
            for each, rows in zip(found, (ctx.queries, outer.shape[1]), strict=True)
        )
        return None, of_place, None, of_tokens, None


def _again(
    run: BlockRun, attended: Tensor, tokens: Tensor, left: Tensor, needs_others: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Run the tail for the prefix tokens, or, if these need the others, for all: return its start and its end."""
    prefix = left.shape[1]
    starts = attended.detach().requires_grad_(), tokens[:, :prefix].detach().requires_grad_()
    own = prefix_tail(run, *starts, left)
    if own is not None and decide(alike([own], [left], [starts[1]]) & ~needs_others)[0]:
        return starts, own
    tokens = tokens.detach().requires_grad_()
    (all_attended,), own = whole_tail(run, tokens)
    if not decide(alike([own[:, :prefix]], [left], [tokens[:, :prefix]]))[0]:
        raise UnsupportedNetworkError(
            "the last block, run a second time, returns other tokens than the first time: expected a block that keeps "
            "no state and does not change its input"
        )
    # The tokens' way through the attention is the forward pass's own.
    return (all_attended, tokens), own
