"""Relevance on its way from the readout to the input tokens: a row for each method and image."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.attribution.layer import AttentionLayer
from gmarpp.attribution.method import Method
from gmarpp.attribution.products import RowProduct, RowProducts
from gmarpp.network.pooling import Pooling
from gmarpp.network.transport import Step


class Relevance:
    """The rows of some methods in one pass from the top down; it holds nothing else.

    Attributes:
        needs_tokens: whether a method takes the relevance of tokens that enter blocks.
        needs_residuals: whether a method takes the layers' `residual`.
        head_norms: norms of heads that methods take.

    Args:
        methods: the methods that the rows belong to.
        readout: the tokens that the head reads, (B, Q), or the queries of an attention-pool head.
        images: (B, 3, H, W).
        tokens: number N of tokens that leave the last block; lower layers may have more.
        input_tokens: number of tokens that enter the first block.
        around: number of prefix tokens and of suffix tokens among those of the top layer.
        taps: by position of a block below the last one, the tokens it leaves that the head reads too, (B, N).
    """

    def __init__(
        self,
        methods: Sequence[Method],
        readout: Tensor,
        images: Tensor,
        tokens: int,
        input_tokens: int,
        around: tuple[int, int],
        taps: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self._taps = dict(taps)
        self.needs_tokens = any(method.needs_tokens for method in methods)
        self.needs_residuals = any(method.needs_residual for method in methods)
        self.head_norms = frozenset(norm for method in methods for norm in method.head_norms)
        products = sorted(
            (method for method in methods if isinstance(method, RowProduct)),
            key=lambda method: method.relevance != "attention",
        )
        self._others = [method for method in methods if not isinstance(method, RowProduct)]
        self._products = RowProducts(products, readout.device) if products else None
        self._tokens = tokens
        self._names = [method.name for method in (*products, *self._others)]
        starts = [
            method.start(readout, images, tokens if method.needs_attention or method.needs_tokens else input_tokens)
            for method in (*products, *self._others)
        ]
        # Above the top layer, or one that pools its queries, a row has an entry per query, below it one per token.
        self._above = torch.stack(starts[: len(products)], dim=1) if products else None  # (B, M, Q)
        self._rows = readout.new_empty(len(readout), len(products), tokens)
        self._summed = [position for position, method in enumerate(products) if method.is_summed]
        self._sums = readout.new_zeros(len(readout), len(self._summed), tokens)
        self._prefix, self._suffix = around
        others = zip(self._others, starts[len(products) :], strict=True)
        # Without a method that needs attention no layer is stepped through.
        self._other_rows = [
            (start, readout.new_empty(len(readout), tokens) if method.needs_attention else start)
            for method, start in others
        ]

    def leave(self, block: int | None) -> None:
        """Add what the head reads of the tokens that leave a block, before its layer is stepped through."""
        tap = self._taps.pop(block, None) if block is not None else None
        if tap is not None:
            self._rows += tap[:, None]

    def step(self, part: slice, layer: AttentionLayer) -> None:
        """Carry the rows of the images of a part through their layer; the layers of an image come from the top down."""
        if self._products is not None:
            assert self._above is not None
            rows = self._above if layer.is_top or layer.pools_queries else self._rows
            if part == slice(0, len(rows)):
                # Without parts, nothing is copied.
                carried = self._rows = self._of_all_tokens(self._products.step(rows, layer))
            else:
                carried = self._rows[part] = self._of_all_tokens(self._products.step(rows[part], layer))
            for summed, position in enumerate(self._summed if not layer.is_pool else ()):
                self._sums[part, summed] += carried[:, position]
        for method, (above, rows) in zip(self._others, self._other_rows, strict=True):
            if method.needs_attention:
                given = (above if layer.is_top or layer.pools_queries else rows)[part]
                row = method.step(given, layer)
                self._require_row(row, len(given), method, layer)
                rows[part] = self._of_all_tokens(row)

    def _require_row(self, row: Tensor, images: int, method: Method, layer: AttentionLayer) -> None:
        # An attention-pool head may leave out prefix tokens.
        tokens = {self._tokens, layer.value.shape[-2]} if layer.is_pool else {self._tokens}
        if row.dim() != 2 or len(row) != images or row.shape[1] not in tokens:
            pooled = f", whose {layer.queries} queries are pooled: what stays is layer.keep(row)"
            raise ValueError(
                f"{method.name}: expected rows of shape {(images, self._tokens)} below layer {layer.index}, got "
                f"{tuple(row.shape)}{pooled if layer.pools_queries else ''}"
            )
        if layer.is_changed():
            raise ValueError(
                f"{method.name}: changed the matrices of layer {layer.index} in place, which others read after it: "
                "change a copy, such as layer.gradient.clamp(min=0)"
            )

    def _of_all_tokens(self, rows: Tensor) -> Tensor:
        """Give no relevance to prefix tokens that an attention-pool head leaves out: (..., N) of rows (..., K)."""
        late = self._tokens - rows.shape[-1]
        return F.pad(rows, (late, 0)) if late else rows

    def receive(self, relevance: Tensor) -> None:
        """Hand on the relevance (B, N) of the tokens that enter a block, once its layer was stepped through."""
        for method, (_, rows) in zip(self._others, self._other_rows, strict=True):
            if method.needs_tokens:
                rows.copy_(method.receive(rows, relevance, slice(self._prefix, relevance.shape[1] - self._suffix)))

    def spread(self, merged: Pooling) -> None:
        """Hand on the relevance of merged tokens to those that they were made of; prefix tokens keep theirs."""

        def spread(rows: Tensor) -> Tensor:
            return torch.cat((rows[..., : self._prefix], merged.spread(rows[..., self._prefix :])), dim=-1)

        self._change(spread)

    def pool(self, step: Step, is_top: bool) -> None:
        """Make room for rows of the tokens below a layer that pools its queries, which comes next.

        What methods do not carry through the layer is handed on to the tokens that the queries were made of.
        """
        if self._products is not None and not is_top:
            self._above = self._rows
        self._rows, self._sums = self._rows.new_empty(*self._rows.shape[:2], step.tokens), step.hand_down(self._sums)
        self._other_rows = [
            (above if is_top else rows, rows.new_empty(len(rows), step.tokens))
            if method.needs_attention
            else (above, step.hand_down(rows) if rows.shape[-1] == self._tokens else rows)
            for method, (above, rows) in zip(self._others, self._other_rows, strict=True)
        ]
        self._tokens = step.tokens

    def leave_out(self, tokens: int) -> None:
        """Drop the relevance of prefix tokens that are not among the tokens of the next layer: they enter above it."""
        late = self._tokens - tokens
        if late <= 0:
            return
        self._change(lambda rows: rows[..., late:])
        self._prefix -= late

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Bring all rows to other tokens."""
        self._rows, self._sums, tokens = change(self._rows), change(self._sums), self._tokens
        self._other_rows = [
            # Rows that take nothing of the layers may be those of the input tokens already.
            (above, change(rows) if rows.shape[-1] == tokens else rows)
            for above, rows in self._other_rows
        ]
        self._tokens = self._rows.shape[-1]

    def rows(self) -> dict[str, Tensor]:
        """Return the rows, (B, N), by method."""
        products = list(self._rows.unbind(dim=1))
        for position, summed in zip(self._summed, self._sums.unbind(dim=1), strict=True):
            products[position] = summed
        rows = (*products, *(rows for _, rows in self._other_rows))
        return dict(zip(self._names, rows, strict=True))
