"""Echoes: copies of the tokens that carry each layer's own score through the backward pass of the whole network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Echo:
    """Copies of a block's first tokens, appended to its input and taken off its output.

    An echo has the values of what it copies, but its gradient ends at the block's input: it is the gradient of a score
    of this layer alone. Echoes pass through the same matrix products as the tokens do, so that all layers' own scores
    are differentiated in the one backward pass, for the price of a few more rows.

    Attributes:
        dim: 1 to copy tokens, which is enough where the head reads prefix tokens only; 0 to copy whole images.
        size: number of tokens or of images copied.
    """

    dim: int
    size: int

    def append(self, tokens: Tensor) -> Tensor:
        """Give tokens (B, N, D) with their echoes behind them."""
        return self._extended(tokens, self.dim, tokens.detach())

    def relay(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the tokens that left a block without their echoes, the echoes, and what the next block takes in.

        The last is what left the block, for echoes have the values of what they copy; only their gradient ends there.
        """
        own, echoes, following = _Relay.apply(tokens, self)
        return own, echoes, following

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take the echoes off tokens, or off a gradient of theirs."""
        return self._split(tokens, self.dim)

    def split_heads(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Take the echoes off a query, key, value or attention output (B, H, N, d), or off a gradient of one."""
        return self._split(tensor, 2 * self.dim)

    def attended(self, tensor: Tensor) -> Tensor:
        """Give the keys or values (B, H, N, d) to attend to, among which no token may appear twice."""
        return self.split_heads(tensor)[0] if self.dim else tensor

    def own_mask(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """Cut a mask to the tokens that are no echoes."""
        return mask if mask is None or not self.dim else mask[..., :tokens, :tokens]

    def extended_mask(self, mask: Tensor | None) -> Tensor | None:
        """Give the echoes of tokens the mask of what they copy."""
        if mask is None or not self.dim or mask.shape[-2] == 1:
            return mask
        return self._extended(mask, mask.dim() - 2, mask)

    def _split(self, tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        # One split has one backward step; two slices would each fill a tensor of the whole size.
        own, echoes = torch.split(tensor, [tensor.shape[dim] - self.size, self.size], dim=dim)
        return own, echoes

    def _extended(self, tensor: Tensor, dim: int, copied: Tensor) -> Tensor:
        return torch.cat((tensor, copied.narrow(dim, 0, self.size)), dim=dim)


class _Relay(torch.autograd.Function):
    """Three views of the tokens that left a block: a copy would be kept with the activations of the next."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, echo: Echo) -> tuple[Tensor, Tensor, Tensor]:
        ctx.echo = echo
        ctx.set_materialize_grads(False)
        return (*echo.split(tokens), tokens.view_as(tokens))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        own, echoes, following = gradients
        if following is not None:
            continued = ctx.echo.split(following)[0]
            own = continued if own is None else own + continued
        if own is None:
            raise RuntimeError("the score depends on an echo alone")
        if echoes is None:
            echoes = torch.zeros_like(own.narrow(ctx.echo.dim, 0, ctx.echo.size))
        return torch.cat((own, echoes), dim=ctx.echo.dim), None
