"""What runs in another way for the time of an explanation, with the same results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replacing_forward(blocks: Sequence[nn.Module], runs: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let each block run something else in place of its `forward`."""
    own = [vars(block).get("forward") for block in blocks]
    for block, run in zip(blocks, runs, strict=True):
        block.forward = run
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def contiguous_projections(model: nn.Module) -> Iterator[None]:
    """Hand `nn.MultiheadAttention` tokens that are contiguous once it has transposed them.

    Else its projection, with weights that are frozen, becomes a product per image, each with a copy of the weights:
    several times the time of the whole network, in the backward pass above all.
    """

    def relay(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query, *others = args
        if any(each is not query for each in others) or query.dim() != 3:
            return None
        relaid = query.transpose(0, 1).contiguous().transpose(0, 1)
        return (relaid,) * len(args)

    layers = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention) and module.batch_first]
    handles = [layer.register_forward_pre_hook(relay) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
