"""The chain of blocks, each given what the one below returned, and whatever else reads the tokens between them.

Heads of segmentation and depth read the tokens of several layers. The network is given each block's tokens at a place
of the graph of their own, a tap, and the next block the tokens themselves: the score's gradient at a tap is that of
what reads the tokens directly, without what comes down through the blocks above.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class _Marked(torch.autograd.Function):
    """Tokens that leave a block without a graph, marked by a node that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor) -> Tensor:
        # No view, which the network could not change in place.
        return tokens.data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class Chain:
    """The tokens between blocks.

    Attributes:
        taps: by position of the block that they leave, where in the graph whatever reads them directly finds them.
        is_whole: whether each block so far was given what the one below returned, unchanged.

    Args:
        has_graph: whether gradients pass from block to block.
    """

    def __init__(self, has_graph: bool) -> None:
        self.taps: dict[int, GradientEdge] = {}
        self.is_whole = True
        self._has_graph = has_graph
        self._anchor = torch.zeros((), requires_grad=True)
        self._taps: dict[object, int] = {}
        self._ends: dict[object, int] = {}
        self._left: tuple[Tensor, Tensor, int] | None = None

    def leave(self, position: int, tokens: Tensor) -> Tensor:
        """Return what the network is given of the tokens that leave a block below the last one."""
        given: Tensor = tokens.view_as(tokens) if self._has_graph else _Marked.apply(tokens, self._anchor)
        self._left = given, tokens, given._version
        if tokens.grad_fn is not None:
            self._ends[tokens.grad_fn] = position
        if given.grad_fn is not None:
            self._taps[given.grad_fn] = position
            self.taps[position] = get_gradient_edge(given)
        return given

    def enter(self, tokens: Tensor) -> Tensor:
        """Return the tokens that a block above the first one starts with, as they left the one below."""
        left, self._left = self._left, None
        if left is not None and tokens is left[0] and tokens._version == left[2]:
            return left[1]
        self.is_whole = False
        return tokens

    def read_by(self, total: Tensor, last_tokens: Tensor) -> tuple[list[int], list[int]]:
        """Return which blocks a number depends on otherwise than through the last tokens: at their taps, and elsewhere.

        Elsewhere is inside the block above, which may keep something in an attribute.
        """
        met, waiting = {last_tokens.grad_fn}, [total.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in met:
                met.add(node)
                # Below a block that is read, all are met.
                is_known = node in self._taps or node in self._ends
                waiting += [] if is_known else [below for below, _ in node.next_functions]
        at_taps, elsewhere = (sorted(nodes[node] for node in met & nodes.keys()) for nodes in (self._taps, self._ends))
        return at_taps, elsewhere
