"""Answers to attention calls: the network's own fused attention, with a node in the graph that visits the layer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmarpp.attribution.balanced import shared
from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.fused_layer import is_fused
from gmarpp.attribution.seam import Handler, fused_attention
from gmarpp.network.errors import UnsupportedNetworkError


class Inputs(NamedTuple):
    """What an attention call is given: query (B, H, Q, d), key and value (B, H / g, N, d), mask, and factor of q kᵀ.

    Where the network writes its attention out, that is in place of the query, (B, H, Q, N), and there is no key.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor
    mask: Tensor | None
    scale: float

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Inputs":
        """Take the arguments of `scaled_dot_product_attention`; grouped queries show in the numbers of heads."""
        if dropout_p > 0:
            raise UnsupportedNetworkError("attention dropout is active although the network is in eval mode")
        if attn_mask is not None and attn_mask.requires_grad:
            raise UnsupportedNetworkError("an attention mask or bias that depends on the tokens cannot be followed")
        if attn_mask is not None and attn_mask.dim() == 3:
            # Fused attention takes masks of two dimensions or four.
            attn_mask = attn_mask[None]
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], value.shape[-2], dtype=torch.bool, device=query.device).tril()
        return Inputs(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)

    def attend(self) -> Tensor:
        """Return the original function's output, (B, H, Q, dv)."""
        if self.key is None:
            return torch.matmul(self.query, self.value)
        grouped = self.query.shape[1] != self.key.shape[1]
        return fused_attention(self.query, self.key, self.value, self.mask, scale=self.scale, enable_gqa=grouped)

    def ungrouped(self) -> "Inputs":
        """Repeat keys and values for every head of the queries."""
        if self.key is None or (group := self.query.shape[1] // self.key.shape[1]) == 1:
            return self
        return self._replace(
            key=self.key.repeat_interleave(group, dim=1), value=self.value.repeat_interleave(group, dim=1)
        )


Visit = Callable[..., None]
"""Hands a layer to the way down: query, key, value, mask, dO and, if they are wanted, where gradients are written."""


class _DenseAttention(torch.autograd.Function):
    """Fused attention of query, key, value and mask; backward, a visit to the layer, whose matrices yield gradients."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, scale: float, *inputs: Any) -> Tensor:
        ctx.visit = visit
        # Saved as autograd saves its own tensors, so that activation checkpointing drops and recomputes them.
        ctx.save_for_backward(*inputs)
        query, key, value, mask = inputs
        return Inputs(query, key, value, mask, scale).attend()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (outer,), inputs = gradients, ctx.saved_tensors
        query, key, value = (
            None if each is None else torch.empty_like(each, memory_format=torch.contiguous_format)
            for each in inputs[:3]
        )
        with torch.autocast(outer.device.type, enabled=False):
            ctx.visit(*inputs, outer, [each for each in (query, key, value) if each is not None])
        return None, None, query, key, value, None


class _Weights(torch.autograd.Function):
    """Attention that the network has written out; what it is made of is followed no further."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        ctx.is_weights, ctx.followed = True, (0,)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Visited(torch.autograd.Function):
    """The unchanged output of fused attention; backward, a visit to the layer before the network's own step."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, output: Tensor, *inputs: Any) -> Tensor:
        ctx.visit = visit
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (outer,) = gradients
        with torch.autocast(outer.device.type, enabled=False):
            ctx.visit(*ctx.saved_tensors, outer)
        return (None, outer, None, None, None, None)


def attended(inputs: Inputs, call: AttentionCall, descent: Descent) -> Tensor:
    """Return the output of attention, (B, H, Q, d); the backward pass will hand the layer to the descent."""
    if inputs.key is None:
        inputs = inputs._replace(query=_Weights.apply(inputs.query))
    if descent.may_balance:
        key = None if inputs.key is None else shared(inputs.key, descent)
        inputs = inputs._replace(query=shared(inputs.query, descent), key=key)
    visit = partial(descent.visit, call)
    if inputs.key is None or (descent.needs_attention and not is_fused(inputs.query)):
        output: Tensor = _DenseAttention.apply(visit, inputs.scale, *inputs.ungrouped()[:4])
        return output
    # The layer is visited before the network's own backward step, which stays the fused one.
    saved = (None if each is None else each.detach() for each in inputs[:3])
    visited: Tensor = _Visited.apply(visit, inputs.attend(), *saved, inputs.mask)
    return visited


def repeated(descent: Descent) -> Handler:
    """Return a handler that answers the calls of a block that runs again, as in the forward pass but unrecorded."""

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        inputs = Inputs.of(*args, **kwargs)
        query = inputs.query if inputs.query.requires_grad else inputs.query.detach().requires_grad_()
        call = AttentionCall(-1, None, inputs.scale, query.shape[-2], inputs.value.shape[-2], False, True)
        return attended(inputs._replace(query=query), call, descent)

    return attend
