"""One attention layer, as methods see it while the backward pass visits it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class AttentionLayer:
    """Attention of one layer and the gradient of the score with respect to it, both float32.

    It exists only while its layer is visited; a method takes what it needs and keeps no reference.

    Attributes:
        attention: ``A``, shape (B, H, Q, N), rows sum to 1. Q equals N, except in an attention-pool head.
        is_top: whether this is the first layer met from the output downwards.
        depth: number of self-attention layers of the network, an attention-pool head not counted.
        given_gradient: ``G = dS/dA``, shape (B, H, Q, N); ``None`` when no requested method needs it.
        local_gradient: gradient of the layer's own score (see `LeGrad`), shape (B, H, R, N), where the rows that are
            left out are zero; ``None`` when no requested method needs it, and in an attention-pool head.
        is_pool: whether the layer is an attention-pool head, whose queries are no tokens.
    """

    attention: Tensor
    is_top: bool
    depth: int
    given_gradient: Tensor | None = None
    local_gradient: Tensor | None = None
    is_pool: bool = False

    @property
    def gradient(self) -> Tensor:
        """``G = dS/dA``, shape (B, H, Q, N)."""
        if self.given_gradient is None:
            raise RuntimeError("this pass computes no gradients: the method must set needs_gradient = True")
        return self.given_gradient

    @cached_property
    def product(self) -> Tensor:
        """``G ⊙ A``, shape (B, H, Q, N)."""
        return self.gradient * self.attention

    @cached_property
    def positive_product(self) -> Tensor:
        """``ReLU(G) ⊙ A``, which is ``ReLU(G ⊙ A)`` as no attention is negative; shape (B, H, Q, N)."""
        return self.product.relu()

    @cached_property
    def positive_product_row_sums(self) -> Tensor:
        """Row sums of `positive_product`, shape (B, H, Q)."""
        return self.positive_product.sum(dim=-1)

    @cached_property
    def gradient_norms(self) -> dict[int, Tensor]:
        """``‖G_h‖_p`` for p = 1, 2: each (B, H)."""
        # vector_norm takes five times as long for the sum of absolute values.
        return {1: self.gradient.abs().sum(dim=(-2, -1)), 2: torch.linalg.vector_norm(self.gradient, dim=(-2, -1))}

    @cached_property
    def positive_gradient_norms(self) -> dict[int, Tensor]:
        """``‖ReLU(G_h)‖_p`` for p = 1, 2: each (B, H)."""
        positive = self.gradient.relu()
        return {1: positive.sum(dim=(-2, -1)), 2: torch.linalg.vector_norm(positive, dim=(-2, -1))}


LayerConsumer = Callable[[slice, AttentionLayer], None]
"""Takes the layer of the images in the slice; the layers of one image arrive from the top down."""
