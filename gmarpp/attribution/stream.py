"""The residual stream: hooks by which a way down sees the tokens that enter a block, and attention added to them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmarpp.attribution.descent import Descent
from gmarpp.attribution.operations import operation
from gmarpp.network.errors import UnsupportedNetworkError


@dataclass(frozen=True)
class Entered:
    """Tokens that entered a block.

    Attributes:
        tokens: (B, N, D), or in another layout of the network, without a graph.
        version: of their values; another one later means that the block changed them in place.
        block: its position.
        channels: which dimension of the tokens is D.
        is_pooled: whether the block pooled them.
    """

    tokens: Tensor
    version: int
    block: int
    channels: int
    is_pooled: bool = False

    def pooled(self, residual: Tensor) -> "Entered":
        """Return what the block adds its attention to, (B, Q, D'), where it pools its tokens."""
        return replace(self, tokens=residual, version=residual._version, channels=-1, is_pooled=True)

    def relevance(self, gradient: Tensor) -> Tensor:
        """Return `x · g`, (B, N), for the gradient, laid out as the tokens, of these or what was added to them."""
        if self.is_pooled:
            gradient = gradient.flatten(1, -2)
        if self.tokens._version != self.version:
            raise UnsupportedNetworkError(
                f"block {self.block} changes the tokens it was given in place, so their relevance is lost: add to a "
                "copy of them, or leave out token_relevance and gmarpp_balanced"
            )
        tokens = self.tokens[:, : gradient.shape[1]]
        products: Tensor = torch.linalg.vecdot(tokens.float(), gradient.float(), dim=self.channels)
        return products.flatten(1)


def watch_tokens(tokens: Tensor, block: int, channels: int, descent: Descent) -> tuple[Entered, GradientEdge | None]:
    """Let a way down see the relevance of the tokens that enter a block; `channels` is their dimension D.

    Returns:
        the tokens, and where they stand in the graph, if it reaches so far down.
    """

    def see(gradient: Tensor) -> None:
        if descent.needs_tokens:
            descent.receive(entered.block, entered.relevance(gradient))

    # The hook must not refer to the graph that it hangs on.
    entered = Entered(tokens.detach(), tokens._version, block, channels)
    if not tokens.requires_grad:
        return entered, None
    tokens.register_hook(see)  # type: ignore[no-untyped-call]
    return entered, get_gradient_edge(tokens)


def watch_addition(
    output: Tensor, edge: GradientEdge, attended: GradientEdge, entered: Entered, descent: Descent
) -> None:
    """Have a backward pass record `x · ds/dm`, m the residual stream behind the addition of attention to a block's x.

    Args:
        output: of the block.
        edge: where x stands in the graph; where the block pools x, what it is made of.
        attended: where the output of the block's attention call does.
        entered: x.
        descent: the way down.

    Raises:
        UnsupportedNetworkError: if the block does not add its attention to its tokens in one place.
    """

    def see(gradients: Any) -> None:
        if descent.needs_residuals:
            descent.residuals[entered.block] = entered.relevance(gradients[0])

    start = (edge.node, edge.output_nr)
    nodes = _above(output.grad_fn, edge.node)
    from_attention = _leading_to(attended.node, nodes)
    from_tokens = _leading_to(edge.node, nodes) if entered.is_pooled else set()

    def is_residual(below: tuple[Any, int]) -> bool:
        return below[0] in from_tokens - from_attention if entered.is_pooled else below == start

    found = [
        node
        for node in nodes
        if operation(node) == "Add"
        and any(map(is_residual, node.next_functions))
        and any(below in from_attention for below, _ in node.next_functions if below is not edge.node)
    ]
    if entered.is_pooled:
        # Pooled queries may have been added below.
        found = [node for node in found if _leading_to(node, nodes).isdisjoint({*found} - {node})]
    if len(found) != 1:
        raise UnsupportedNetworkError(
            f"expected block {entered.block} to add its attention to its tokens in one place, got {len(found)}: leave "
            "out gmarpp_balanced; token_relevance does not need it"
        )
    found[0].register_prehook(see)


def _above(top: Any, bottom: Any) -> dict[Any, list[Any]]:
    """Return the nodes from a top node down to, and without, a bottom node, each with those right below it."""
    found: dict[Any, list[Any]] = {}
    waiting = [top]
    while waiting:
        node = waiting.pop()
        if node is None or node is bottom or node in found:
            continue
        found[node] = [below for below, _ in node.next_functions]
        waiting += found[node]
    return found


def _leading_to(target: Any, nodes: dict[Any, list[Any]]) -> set[Any]:
    """Return the nodes from which a path leads to a target."""
    above: dict[Any, list[Any]] = {}
    for node, next_nodes in nodes.items():
        for below in next_nodes:
            above.setdefault(below, []).append(node)
    found, waiting = set(), [target]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += above.get(node, [])
    return found
