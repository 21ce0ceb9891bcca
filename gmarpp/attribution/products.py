"""Products over layers in row-vector algebra: what they share, and how all methods pass through a layer at once.

A method of this kind carries a row r from the readout to the input, `r_{l-1} = r_l M_l` with

    M = rownorm(Σ_h w_h R_h + alpha I),   R_h = A_h  or  ReLU(G_h) ⊙ A_h

The balanced rollout has the residual's own share a, a number for each row, instead of alpha.

No matrix M is made. Row i of M is divided by its sum `t_i = Σ_h w_h s_hi + alpha`, s_h the row sums of R_h, so that
`r M = Σ_h (w_h r / t) R_h + alpha r / t`: the layer is asked for the product of rows (w_h r / t) with its R_h.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.method import Method


class RowProduct(Method):
    """A method whose map is a product over layers.

    Attributes:
        alpha: weight of the residual connection beside the relevance, 0 or more.
        relevance: R, either the `attention` A or the positive `product` ReLU(G) ⊙ A.
        normalized: whether rows of M are divided by their sum.
        needs_residual: whether alpha is replaced by the positive part of `AttentionLayer.residual`.
        is_summed: whether the map is the sum of the rows below all layers, and not the lowest row.
        start_layer: the lowest layer that takes part.
    """

    alpha: float
    start_layer: int = 0
    relevance: ClassVar[Literal["attention", "product"]] = "attention"
    normalized: ClassVar[bool] = True
    is_summed: ClassVar[bool] = False

    @abstractmethod
    def head_weights(self, layer: AttentionLayer) -> Tensor:
        """Return the weights w of the heads, (B, H)."""

    @final
    @override
    def step(self, row: Tensor, layer: AttentionLayer) -> Tensor:
        return RowProducts((self,), row.device).step(row[:, None], layer)[:, 0]


class RowProducts:
    """Carries the rows of several methods through a layer at once.

    Args:
        methods: those whose relevance is the attention first.
        device: of the rows.
    """

    def __init__(self, methods: Sequence[RowProduct], device: torch.device) -> None:
        self._methods = methods
        self._on_attention = sum(method.relevance == "attention" for method in methods)
        options = tuple(
            (method.alpha, float(method.normalized), float(method.needs_residual), float(method.start_layer))
            for method in methods
        )
        self._alpha, self._is_divided, has_share, self._starts = _columns(options, device)
        # 1 where rows of M are divided by their sum; others are divided by 0 times their sum, plus 1.
        self._normalized, self._has_share = self._is_divided > 0, has_share > 0
        self._added = torch.where(self._normalized, self._alpha, 1.0)
        self._needs_share = any(method.needs_residual for method in methods)
        self._last_start = max(method.start_layer for method in methods)
        self._may_be_empty = self._needs_share or min(method.alpha for method in methods) == 0

    def step(self, rows: Tensor, layer: AttentionLayer) -> Tensor:
        """Carry rows (B, M, Q), one for each method, through a layer, and return (B, M, N).

        Raises:
            ValueError: a method begins above the last layer.
        """
        if self._last_start >= layer.depth:
            late = next(method for method in self._methods if method.start_layer >= layer.depth)
            raise ValueError(
                f"{late.name}: start_layer: expected less than the network's {layer.depth} layers, got "
                f"{late.start_layer}"
            )
        weights = torch.stack([method.head_weights(layer) for method in self._methods], dim=1)  # (B, M, H)
        sums = self._row_sums(weights, layer)  # (B, M, Q)
        if layer.is_pool:
            return self._through_pool(rows, weights, sums, layer)
        residual = self._residual(layer)
        added = self._added if residual is self._alpha else torch.where(self._normalized, residual, 1.0)
        total = torch.addcmul(added, self._is_divided, sums)
        if self._may_be_empty or not layer.has_residual:
            # A row without relevance and residual passes unchanged; a smaller sum would divide it to infinity.
            empty = total < torch.finfo(total.dtype).tiny
            total = total.masked_fill(empty, 1)
            residual = torch.where(empty, torch.ones_like(residual), residual)
        shares = rows / total
        carried = self._relevance(shares, weights, layer) + layer.keep(residual * shares)
        if layer.index < self._last_start:
            carried = torch.where(self._starts > layer.index, layer.keep(rows), carried)
        return carried

    def _through_pool(self, rows: Tensor, weights: Tensor, sums: Tensor, layer: AttentionLayer) -> Tensor:
        """Carry rows through an attention-pool head: its queries are not tokens, so there is no residual to add."""
        carried = self._relevance(rows / torch.where(self._normalized & (sums != 0), sums, 1.0), weights, layer)
        # Without any relevance every key counts alike.
        lost = self._normalized & (carried.sum(dim=-1, keepdim=True) == 0)
        return carried.masked_fill(lost, 1 / carried.shape[-1])

    def _residual(self, layer: AttentionLayer) -> Tensor:
        """Return what stays in the residual, (M, 1) or (B, M, Q)."""
        if not layer.has_residual:
            return torch.zeros_like(self._alpha)
        if not self._needs_share:
            return self._alpha
        assert layer.residual is not None
        return torch.where(self._has_share, layer.residual.relu()[:, None], self._alpha)

    def _row_sums(self, weights: Tensor, layer: AttentionLayer) -> Tensor:
        """Return `Σ_h w_h s_h`, (B, M, Q)."""
        on_attention, on_product = self._split(weights)
        sums = []
        if self._on_attention:
            rows = layer.attention_rows
            all_are_1 = on_attention.sum(dim=-1, keepdim=True).expand(-1, -1, layer.queries)
            sums.append(all_are_1 if rows is None else torch.matmul(on_attention, rows))
        if self._on_attention < len(self._methods):
            sums.append(torch.matmul(on_product, layer.product_rows))
        return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]

    def _relevance(self, rows: Tensor, weights: Tensor, layer: AttentionLayer) -> Tensor:
        """Return `Σ_h w_h r R_h`, (B, M, N)."""
        (attention_weights, product_weights), (attention_rows, product_rows) = self._split(weights), self._split(rows)
        carried = layer.carry(
            _by_head(attention_weights, attention_rows) if self._on_attention else None,
            _by_head(product_weights, product_rows) if self._on_attention < len(self._methods) else None,
        )
        given = [each for each in carried if each is not None]
        return torch.cat(given, dim=1) if len(given) > 1 else given[0]

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return tensor[:, : self._on_attention], tensor[:, self._on_attention :]


@functools.cache
def _columns(options: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Put options of methods on a device, each as a column (M, 1).

    They are kept for ever: a GPU waits for a copy, and a CUDA graph reads them where they were.
    """
    with torch.inference_mode(False):
        return tuple(each[:, None] for each in torch.tensor(options, dtype=torch.float32, device=device).unbind(dim=1))


def _by_head(weights: Tensor, rows: Tensor) -> Tensor:
    """Multiply rows (B, M, Q) by weights (B, M, H) of the heads: (B, H, M, Q)."""
    return weights.transpose(1, 2)[..., None] * rows[:, None]
