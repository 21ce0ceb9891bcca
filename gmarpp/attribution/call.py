"""Attention calls of a forward pass, and what they must look like for attention to be followed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


class UnsupportedNetworkError(ValueError):
    """A network whose attention cannot be followed from its output to its input tokens."""


@dataclass(eq=False)
class AttentionCall:
    """One call of `scaled_dot_product_attention` in the forward pass.

    Nodes of the graph hold it, so it holds no tensor with a graph of its own.

    Attributes:
        index: position among the calls, from the input upwards.
        block: position of the transformer block that made the call; `None` outside of the blocks, or if they are not
            known.
        scale: factor of the query-key products.
        queries: number of queries.
        keys: number of keys.
        is_pool: whether the call is that of an attention-pool head, whose queries are no tokens.
        inputs: query, key, value and mask; kept where no gradient passes from block to block.
        prefix: what the call returned for the prefix tokens, (B, H, P, d); kept for the layers' own scores.
    """

    index: int
    block: int | None
    scale: float
    queries: int
    keys: int
    is_pool: bool
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
    prefix: Tensor | None = None


def require_one_chain(calls: Sequence[AttentionCall], blocks: int) -> None:
    """Refuse a network whose attention calls do not follow each other as layers.

    Args:
        calls: all of a forward pass, from the input upwards.
        blocks: number of the transformer blocks; 0 if they are not known.

    Raises:
        UnsupportedNetworkError: if there are no calls, if they attend to different tokens, if blocks did not make one
            each, or if there are calls outside of the blocks beside that of an attention-pool head at the top.
    """
    if not calls:
        raise UnsupportedNetworkError(
            "the network never calls torch.nn.functional.scaled_dot_product_attention, so its attention cannot be "
            "followed. Switch it to fused attention: model.set_attn_implementation('sdpa') for Hugging Face "
            "networks, module.fused_attn = True on the attention modules of timm networks, need_weights=False in "
            "calls of nn.MultiheadAttention. Networks with windowed attention (Swin) or without attention cannot "
            "be explained by these methods: use a ViT"
        )
    *below, top = calls
    for call in below:
        if call.queries != call.keys or call.queries != top.keys:
            raise UnsupportedNetworkError(
                f"attention layer {call.index} has {call.queries} queries and {call.keys} keys, and the last layer "
                f"{top.keys} keys: only networks that keep all tokens from layer to layer can be explained, with "
                "at most one attention-pool head at the top (not class-attention networks such as CaiT, nor "
                "pyramid networks)"
            )
    if not blocks:
        return
    made = [call.block for call in calls if call.block is not None]
    if made != list(range(blocks)):
        raise UnsupportedNetworkError(
            f"the {blocks} transformer blocks made attention calls in the order {made}, not one each: "
            "parallel or shared attention layers cannot be followed one after the other, nor blocks that attend "
            "without torch.nn.functional.scaled_dot_product_attention (module.fused_attn = True)"
        )
    outside = [call for call in calls if call.block is None]
    if any(call is not top for call in outside) or (outside and top.queries == top.keys):
        raise UnsupportedNetworkError(
            f"the network made {len(outside)} attention calls outside of the {blocks} transformer blocks, which are no "
            "attention-pool head with fewer queries than tokens: name all its blocks, in their order, in "
            "gmarpp.Architecture(..., blocks=...)"
        )
