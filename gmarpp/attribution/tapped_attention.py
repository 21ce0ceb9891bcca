"""Attention of one layer as autograd and the methods see it: fused forward, and explicit where it is looked at."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.attribution.call import AttentionCall

fused_attention = F.scaled_dot_product_attention


def readout_row(gradient: Tensor) -> Tensor:
    """Return the row above the top layer: equal shares for the tokens that the head reads.

    They are the tokens that influence the score: the class token, all patches under average pooling, both tokens of a
    distilled network, the queries of an attention-pool head.

    Args:
        gradient: of the tokens behind the last block, (B, N, D), or of the top attention call's output, (B, H, Q, d).

    Returns:
        float32, shape (B, N) or (B, Q), rows sum to 1; a row is zero where the score depends on no token.
    """
    read = (gradient != 0).any(dim=-1).float()
    read = read if read.dim() == 2 else read.amax(dim=1)
    return read / read.sum(dim=-1, keepdim=True).clamp_min(1)


def attention_of(call: AttentionCall, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention (B, H, Q, N), float32, of queries (B, H, Q, d) to keys (B, H, N, d)."""
    scores = torch.matmul(query.float() * call.scale, key.float().mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1)


def mask_part(mask: Tensor | None, part: slice) -> Tensor | None:
    """Return the mask of some images of the batch."""
    return mask[part] if mask is not None and mask.dim() == 4 and len(mask) > 1 else mask


def parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Split a batch so that a part's attention matrices stay in the cache of a CPU, or small on a GPU."""
    bytes_per_image = query.shape[1] * query.shape[2] * key.shape[2] * 4
    budget = 1 << 20 if query.device.type == "cpu" else 1 << 28
    size = max(1, budget // bytes_per_image)
    return (slice(start, start + size) for start in range(0, len(query), size))


class TappedAttention(torch.autograd.Function):
    """Fused attention whose backward step shows the layer to the tap."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        tap: Any,
        call: AttentionCall,
        rows: int | None,
    ) -> Tensor:
        """Attend; `rows` is the number of queries wanted, if not all."""
        ctx.tap, ctx.call = tap, call
        # Saved as autograd saves its own tensors, so that activation checkpointing drops and recomputes them.
        ctx.save_for_backward(query, key, value, mask)
        if rows is not None:
            query = query[:, :, :rows]
            mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., :rows, :]
        return fused_attention(query, key, value, mask, scale=call.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Show the layer to the tap, which writes the gradients of query, key and value."""
        *inputs, mask = ctx.saved_tensors
        written = tuple(each.new_empty(each.shape) for each in inputs)
        # Rows that the last block leaves out have no gradient.
        gradient = F.pad(gradients[0], (0, 0, 0, ctx.call.queries - gradients[0].shape[2]))
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            ctx.tap.visit(ctx.call, *inputs, mask, gradient, written)
        return (*written, None, None, None, None)
