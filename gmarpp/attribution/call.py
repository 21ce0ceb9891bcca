"""Attention calls of a forward pass, and what they must look like for attention to be followed."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gmarpp.attribution.decisions import decide
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.transport import Step


@dataclass(eq=False)
class AttentionCall:
    """One call of `scaled_dot_product_attention` in the forward pass.

    Nodes of the graph refer to it, so it refers to no tensor that has a graph.

    Attributes:
        index: position among the calls, from the input upward.
        block: position of the transformer block that made the call; `None` outside the blocks, or if these are
            unknown.
        scale: factor of the query-key products.
        queries: number of queries; of all windows, without padding.
        keys: number of keys; likewise.
        is_pool: whether the call is that of an attention-pool head, whose queries are not tokens.
        is_class: whether prefix tokens alone attend, to themselves and all others; `queries` counts all tokens.
        follows: whether gradients pass from the call to the layer below.
        is_recorded: whether autograd recorded what the network did at the call.
        values: refers to its values, as long as these exist.
        inputs: query, key, value and mask; kept where no gradient passes from block to block.
        prefix: what the call returned for the prefix tokens, (B, H, P, d); kept for the layers' own scores.
        step: over which tokens it attends, if not over all.
        shares: of which tokens the residual of pooled queries is made, (B, Q, k); see `QueryPool.of`.
    """

    index: int
    block: int | None
    scale: float
    queries: int
    keys: int
    is_pool: bool
    follows: bool
    values: Callable[[], Tensor | None] = lambda: None
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None = None
    prefix: Tensor | None = None
    step: Step | None = None
    shares: Tensor | None = None
    is_class: bool = False
    is_recorded: bool = True


@functools.cache
def warn_of_memory() -> None:
    """Warn once per process that a network keeps its attention's matrices."""
    warnings.warn(
        "the network writes its attention out, N x N numbers for each head and image, which are kept for each layer: "
        "give it fewer images at a time, or switch it to fused attention where it has that "
        "(model.set_attn_implementation('sdpa'), module.fused_attn = True)",
        stacklevel=2,
    )


def require_shares(weights: Tensor, blind: Sequence[str]) -> None:
    """Refuse methods that take attention as it is where some of it is negative; `blind` are their names."""
    if blind and decide((weights < 0).any())[0]:
        raise UnsupportedNetworkError(
            "some attention of this network is negative, as where its heads are mixed after the softmax (CaiT): "
            f"{', '.join(blind)} would take it for shares. Ask for methods of products with the gradient (gmarpp_l1, "
            "gmarpp_sum, chefer, legrad)"
        )


def gradient_of(total: Tensor, start: GradientEdge | Tensor | None) -> Tensor | None:
    """Return the gradient of a number; `None` where it does not depend on the start."""
    if start is None or not total.requires_grad:
        return None
    return torch.autograd.grad(total, start, retain_graph=True, allow_unused=True)[0]


def require_windows(query: Tensor, key: Tensor, step: Step, batch: int, block: int | None) -> None:
    """Refuse a block that does not attend in the windows that its step describes."""
    windows, queries = step.above.windows.shape
    expected = [(batch * windows, each) for each in (queries, step.key_places)]
    if query.dim() != 4 or [(len(each), each.shape[2]) for each in (query, key)] != expected:
        over = "" if queries == step.key_places else f" and {step.key_places} keys"
        raise UnsupportedNetworkError(
            f"expected block {block} to attend in {windows} windows of {queries} tokens{over} for each of {batch} "
            f"images, got queries of shape {tuple(query.shape)} and keys of shape {tuple(key.shape)}: correct "
            "transport in gmarpp.Architecture"
        )


CUT = (
    "a part that runs under torch.no_grad, detaches its input or is quantized ends all gradients: run it with "
    "gradients, or ask for methods that need none (rollout, attention)"
)


def require_followed(calls: Sequence[AttentionCall], needs_gradients: bool) -> None:
    """Refuse calls of which one does not start from the one before it.

    Args:
        calls: at least one, from the input upward.
        needs_gradients: whether gradients have to pass from each call to the one below. If not, this is known of calls
            outside of blocks alone, and of those at which autograd recorded what the network did.

    Raises:
        UnsupportedNetworkError: naming the layer.
    """
    first = calls[0].block
    cut = [call.index for call in calls[1:] if not call.follows and (first is None or call.block != first)]
    if needs_gradients and cut:
        raise UnsupportedNetworkError(
            f"no gradient passes from attention layer {cut[-1]} to the one below, which these methods need: {CUT}"
        )
    if first is None and any(calls[each - 1].is_recorded for each in cut):
        raise UnsupportedNetworkError(
            f"attention layer {cut[-1]} does not start from the one before it, as of two networks side by side or of "
            "one that runs twice: explain one of them, or describe a chain of blocks in "
            "gmarpp.Architecture(..., blocks=...)"
        )


def require_one_chain(calls: Sequence[AttentionCall], layout: Architecture) -> None:
    """Refuse a network whose attention calls do not follow each other as layers.

    Args:
        calls: all of a forward pass, from the input upward.
        layout: the network's blocks, if they are known, and prefix tokens, which an attention-pool head may leave out.

    Raises:
        UnsupportedNetworkError: if there are no calls, if they attend to different tokens, or if blocks did not make
            one each.
    """
    if not calls:
        raise UnsupportedNetworkError(
            "the network never calls torch.nn.functional.scaled_dot_product_attention, nor multiplies a softmax over "
            f"tokens by their values, so its attention cannot be followed. {_SWITCH}. Networks with attention of "
            "another kind or without attention cannot be explained by these methods: use a ViT"
        )
    if not any(call.step for call in calls):
        _require_same_tokens(calls, layout)
    if layout.blocks:
        _require_known_blocks(calls, len(layout.blocks))


def _require_same_tokens(calls: Sequence[AttentionCall], layout: Architecture) -> None:
    """Refuse calls that attend to different tokens; they may where it is described how tokens are merged."""
    top, patches = calls[-1], calls[0].keys - layout.prefix_at(0)
    for call in calls:
        prefix = layout.prefix_at(len(layout.blocks) if call.block is None else call.block)
        is_pool = call is top and call.is_pool
        expected = {patches + prefix, patches} if is_pool and layout.blocks else {patches + prefix}
        if call.keys not in expected or (call.queries != call.keys and not is_pool):
            raise UnsupportedNetworkError(
                f"attention layer {call.index} has {call.queries} queries and {call.keys} keys, and the last layer "
                f"{top.keys} keys: only networks that keep all tokens from layer to layer can be explained, with "
                "at most one attention-pool head at the top (not pyramid networks)"
            )


_SWITCH = (
    "Switch it to fused attention: model.set_attn_implementation('sdpa') for Hugging Face networks, "
    "module.fused_attn = True on the attention modules of timm networks, need_weights=False in calls of "
    "nn.MultiheadAttention"
)


def _require_known_blocks(calls: Sequence[AttentionCall], blocks: int) -> None:
    made = Counter(call.block for call in calls)
    for block in range(blocks):
        if made[block] == 0:
            raise UnsupportedNetworkError(
                f"transformer block {block} of {blocks} never calls "
                "torch.nn.functional.scaled_dot_product_attention, nor multiplies a softmax over tokens by their "
                "values, so its attention cannot be followed. "
                f"{_SWITCH}, or leave out of the architecture's blocks what does not run"
            )
    order = [block for block, _ in groupby(call.block for call in calls if call.block is not None)]
    if order != list(range(blocks)):
        raise UnsupportedNetworkError(
            f"expected the transformer blocks to run from the input upward, got the order {order}"
        )
    outside = [call for call in calls if call.block is None]
    is_head = (len(outside) == 1 and outside[0].is_pool) or all(call.is_class for call in outside)
    if outside and not (is_head and outside == list(calls[-len(outside) :])):
        raise UnsupportedNetworkError(
            f"{len(outside)} of {len(calls)} attention calls were made outside the {blocks} known transformer blocks: "
            "expected at most that of an attention-pool head after the last block. Explain the part of the network "
            "that its blocks describe, or list all blocks in gmarpp.Architecture(..., blocks=...)"
        )


def require_no_prefix(key: Tensor, tokens: Tensor, prefix: int) -> None:
    """Refuse a pool with fewer keys than there are tokens, unless the prefix tokens are those that it leaves out."""
    read = gradient_of(key.float().square().sum(), tokens)
    if read is None or not decide(~read[:, :prefix].any() & read[:, prefix:].any(dim=2).all())[0]:
        raise UnsupportedNetworkError(
            f"an attention-pool head attends to {key.shape[-2]} keys, and the blocks to {tokens.shape[1]}: only the "
            f"{prefix} prefix tokens may be left out, one key for each of the others"
        )
