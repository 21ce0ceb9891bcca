"""One attention layer, as methods see it: products of rows with its matrices, and the matrices themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

HeadNorm = Literal["gradient_l1", "gradient_l2", "positive_l1", "positive_l2"]
"""`‖G_h‖_1`, `‖G_h‖_2`, `‖ReLU(G_h)‖_1`, `‖ReLU(G_h)‖_2`."""


class Matrix(cached_property[Tensor]):
    """A matrix that is made when it is first asked for, of which its layer knows whether it was changed since."""

    @override
    def __get__(self, layer: Any, owner: Any = None) -> Tensor:  # type: ignore[override]
        made: Any = super().__get__(layer, owner)
        if layer is not None and not made.is_inference():
            vars(layer).setdefault("_versions", {}).setdefault(self.attrname, made._version)
        return made  # type: ignore[no-any-return]


@dataclass(eq=False)
class AttentionLayer:
    """Attention `A` of one layer and the gradient `G = dS/dA` of the score with respect to it.

    Methods use products with them, which the fused layer computes without the matrices. Here they come from the
    matrices, each made when it is first asked for. All results are float32. A layer exists only while it is
    visited; a method takes what it needs and keeps no reference.

    Attributes:
        query: (B, H, Q, d); or the attention itself, (B, H, Q, N), where the network writes it out.
        key: (B, H / g, N, d), where g heads share one; N equals Q, except in an attention-pool head and where queries
            are pooled. `None` where the network writes its attention out.
        value: (B, H / g, N, dv).
        mask: as `scaled_dot_product_attention` takes it; entries that it forbids have neither attention nor gradient.
        scale: factor of the query-key products.
        outer: gradient of the call's output times `gradient_scale`, (B, H, Q, dv); `None` without gradients.
        local: gradient of the layer's own score (see `LeGrad`) with respect to the first R rows of the output, times
            `gradient_scale`, (B, H, R, dv); `None` when no requested method needs it, and in an attention-pool head.
        gradient_scale: power of two that keeps small gradients from vanishing in float16.
        residual: `x · ds/dm`, (B, Q), for the tokens x that enter the layer's block, m behind the addition of attention
            to them; `None` when no requested method needs it, and in an attention-pool head.
        is_top: whether this is the last layer of the network, which is visited first.
        is_pool: whether the layer is an attention-pool head, whose queries are not tokens.
        depth: number of self-attention layers of the network, an attention-pool head not counted.
        index: position among them, from 0 at the input; of its block, if blocks are known.
        norms: those of heads that the methods say they take; others can be asked for, too.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor
    mask: Tensor | None
    scale: float
    outer: Tensor | None
    local: Tensor | None
    gradient_scale: float
    is_top: bool
    is_pool: bool
    depth: int
    index: int
    residual: Tensor | None = None
    norms: frozenset[HeadNorm] = frozenset()

    @property
    def queries(self) -> int:
        """Q."""
        return self.query.shape[-2]

    @property
    def pools_queries(self) -> bool:
        """Whether its queries are fewer tokens than its keys, made of them."""
        return False

    @property
    def has_residual(self) -> bool:
        """Whether the network adds what the layer attends to to its tokens."""
        return True

    @Matrix
    def attention(self) -> Tensor:
        """`A`, (B, H, Q, N); rows sum to 1."""
        assert self.key is not None
        scores = torch.matmul(self.query.float() * self.scale, self._each_head(self.key).mT)
        if self.mask is None:
            return scores.softmax(dim=-1)
        bias = 0 if self.mask.dtype == torch.bool else self.mask.float()
        attention = (scores + bias).masked_fill(self._forbidden, float("-inf")).softmax(dim=-1)
        # A row with every key forbidden has no attention.
        return attention.masked_fill(self._forbidden.all(dim=-1, keepdim=True), 0)

    @Matrix
    def gradient(self) -> Tensor:
        """`G = dS/dA`, (B, H, Q, N)."""
        if self.outer is None:
            raise RuntimeError("this pass computes no gradients: the method must set needs_gradient = True")
        return self._gradient(self.outer)

    @property
    def local_gradient(self) -> Tensor | None:
        """Gradient of the layer's own score with respect to the first R rows of `A`, (B, H, R, N); others' is 0."""
        return None if self.local is None else self._gradient(self.local)

    @property
    def product(self) -> Tensor:
        """`G ⊙ A`, (B, H, Q, N)."""
        return self.gradient * self.attention

    @Matrix
    def positive_product(self) -> Tensor:
        """`ReLU(G ⊙ A)`, which is `ReLU(G) ⊙ A` where no attention is negative; (B, H, Q, N)."""
        return self.product.relu_()

    def is_changed(self) -> bool:
        """Return whether somebody changed a matrix in place, from which others would compute something else."""
        versions: dict[str, int] = vars(self).get("_versions", {})
        return any(vars(self)[name]._version != version for name, version in versions.items())

    @property
    def attention_rows(self) -> Tensor | None:
        """Row sums of `A`, (B, H, Q); `None` where all are 1, as they are but where all keys are left out."""
        if self.mask is None:
            return None
        return (~self._forbidden.all(dim=-1)).float().expand(self.query.shape[:3])

    @cached_property
    def product_rows(self) -> Tensor:
        """Row sums of `ReLU(G) ⊙ A`, (B, H, Q)."""
        return self.positive_product.sum(dim=-1)

    @cached_property
    def equal_shares(self) -> Tensor:
        """Equal weights of the heads that sum to 1, (B, H)."""
        batch, heads = self.query.shape[:2]
        return torch.full((batch, heads), 1 / heads, dtype=torch.float32, device=self.query.device)

    def head_norm(self, which: HeadNorm) -> Tensor:
        """Return a norm of each head's gradient, (B, H)."""
        if which == "gradient_l1":
            # |x| = 2 ReLU(x) - x, which takes half as long as the absolute values.
            return 2 * self._positive_norms["positive_l1"] - self.gradient.sum(dim=(-2, -1))
        if which == "gradient_l2":
            norm: Tensor = torch.linalg.vector_norm(self.gradient, dim=(-2, -1))
            return norm
        return self._positive_norms[which]

    def head_share(self, which: HeadNorm) -> Tensor:
        """Return each head's share of the sum of a norm over the heads, (B, H); equal shares where all norms are 0."""
        return share(self.head_norm(which))

    def carry(self, attention_rows: Tensor | None, product_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the sum over heads of rows times matrices, for several rows at once.

        Args:
            attention_rows: (B, H, M, Q), to be multiplied by `A`.
            product_rows: (B, H, M, Q), to be multiplied by `ReLU(G) ⊙ A`.

        Returns:
            for each (B, M, N); `None` for `None`.
        """
        return (
            None if attention_rows is None else _row_products(attention_rows, self.attention),
            None if product_rows is None else _row_products(product_rows, self.positive_product),
        )

    def keep(self, rows: Tensor) -> Tensor:
        """Return what the residual connection makes of rows (B, ..., Q): the same, or (B, ..., N) of pooled queries."""
        return rows

    def local_key_sums(self) -> Tensor | None:
        """Sum `ReLU` of the layer's own score's gradient over heads and queries, (B, N)."""
        gradient = self.local_gradient
        return None if gradient is None else gradient.relu_().sum(dim=(1, 2))

    def write_gradients(self, found: Sequence[Tensor]) -> None:
        """Write the gradients of query, key and value, times `gradient_scale`; `gradient` is overwritten.

        The softmax's own backward step is `A ⊙ (G - rowsum(A ⊙ G))`.
        """
        assert self.outer is not None
        assert self.key is not None
        attention, product = self.attention, self.gradient.mul_(self.attention)
        scores = product.addcmul_(attention, product.sum(dim=-1, keepdim=True), value=-1)
        # As in the fused backward step, products are in the inputs' precision; float16 is too slow on a CPU.
        dtype = torch.bfloat16 if self.query.dtype == torch.bfloat16 else torch.float32
        scores, attention, factor = scores.to(dtype), attention.to(dtype), self.scale * self.gradient_scale
        found[0].copy_(torch.matmul(scores, self.key.to(dtype) * factor))
        found[1].copy_(torch.matmul(scores.mT, self.query.to(dtype) * factor))
        found[2].copy_(torch.matmul(attention.mT, self.outer.to(dtype)))

    @cached_property
    def _positive_norms(self) -> dict[HeadNorm, Tensor]:
        # Both are computed at once, so that the matrix need not be kept.
        positive = self.gradient.relu()
        l2 = torch.linalg.vector_norm(positive, dim=(-2, -1))
        return {"positive_l1": positive.sum(dim=(-2, -1)), "positive_l2": l2}

    @cached_property
    def _forbidden(self) -> Tensor:
        assert self.mask is not None
        return ~self.mask if self.mask.dtype == torch.bool else self.mask == float("-inf")

    def _each_head(self, shared: Tensor) -> Tensor:
        """Return keys or values for every head of the queries, float32."""
        group = self.query.shape[1] // shared.shape[1]
        return shared.float() if group == 1 else shared.float().repeat_interleave(group, dim=1)

    def _gradient(self, outer: Tensor) -> Tensor:
        gradient = torch.matmul(outer.float() / self.gradient_scale, self._each_head(self.value).mT)
        if self.mask is None:
            return gradient
        # A mask has a row for each query, or one for all.
        return gradient.masked_fill_(self._forbidden[..., : outer.shape[-2], :], 0)


class WrittenLayer(AttentionLayer):
    """A layer whose attention the network writes out; its rows need not sum to 1, and it may be negative."""

    @Matrix
    @override
    def attention(self) -> Tensor:
        return self.query.float()

    @property
    @override
    def attention_rows(self) -> Tensor:
        return self.attention.sum(dim=-1)

    @override
    def write_gradients(self, found: Sequence[Tensor]) -> None:
        assert self.outer is not None
        of_attention, of_value = found
        of_attention.copy_(self.gradient * self.gradient_scale)
        of_value.copy_(torch.matmul(self.attention.mT, self.outer.float()))


def attributes(layer: AttentionLayer) -> dict[str, Any]:
    """Return what a layer was made of, to make another one that sees it differently."""
    return {each.name: getattr(layer, each.name) for each in fields(layer)}


def share(norms: Tensor) -> Tensor:
    """Divide norms of heads (..., B, H) by their sum; equal shares where it is 0. NaN stays NaN."""
    total = norms.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, 1 / norms.shape[-1], norms / total)


def _row_products(rows: Tensor, matrices: Tensor) -> Tensor:
    """Sum rows (B, H, M, Q) times matrices (B, H, Q, N) over heads and queries: one matrix product per image."""
    return torch.matmul(rows.transpose(1, 2).flatten(2), matrices.flatten(1, 2))
