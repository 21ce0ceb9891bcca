"""An attention layer in windows, as methods see it: a layer over all tokens of a grid."""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer, HeadNorm, Matrix, attributes, share
from gmarpp.network.transport import Step


class _WithoutPadding(AttentionLayer):
    """A layer of padded windows without its entries for padding; the rows that are left do not sum to 1."""

    def __init__(self, whole: AttentionLayer, step: Step) -> None:
        super().__init__(**attributes(whole))
        self._whole, self._step = whole, step

    @Matrix
    @override
    def attention(self) -> Tensor:
        return self._without_padding(self._whole.attention)

    @Matrix
    @override
    def gradient(self) -> Tensor:
        return self._without_padding(self._whole.gradient)

    @property
    @override
    def attention_rows(self) -> Tensor:
        return self.attention.sum(dim=-1)

    def _without_padding(self, matrices: Tensor) -> Tensor:
        """Set rows and columns of padding to 0, (B * W, H, q, n)."""
        is_pair = self._step.above.is_token[:, :, None] & self._step.is_token[:, None]  # (W, q, n)
        kept = torch.unflatten(matrices, 0, (-1, len(is_pair))) * is_pair[:, None]
        return kept.flatten(0, 1)


class WindowedLayer(AttentionLayer):
    """The layer whose matrix has a block for each window, and no entries for padding.

    Its products come from those of the windows; the attributes `query`, `key`, `value`, `mask` and `outer` are those of
    the windows, with (B * W) in place of B and n in place of N.

    Args:
        windows: the same attention, with each window as an image, but the `residual` of the tokens.
        step: over which tokens the windows extend.
        shares: of which tokens the residual of pooled queries is made, (B, Q, k).
    """

    def __init__(self, windows: AttentionLayer, step: Step, shares: Tensor | None) -> None:
        super().__init__(**attributes(windows))
        self._step, self._whole, self._shares = step, windows, shares
        is_padded = step.is_padded or step.above.is_padded
        self._windows = _WithoutPadding(windows, step) if is_padded else windows

    @property
    @override
    def queries(self) -> int:
        return self._step.above.tokens

    @property
    @override
    def pools_queries(self) -> bool:
        return self._step.pool is not None

    @override
    def keep(self, rows: Tensor) -> Tensor:
        return rows if self._step.pool is None else self._step.hand_down(rows, self._shares)

    @property
    @override
    def has_residual(self) -> bool:
        return self._step.has_residual

    @Matrix
    @override
    def attention(self) -> Tensor:
        return self._matrices(self._windows.attention)

    @Matrix
    @override
    def gradient(self) -> Tensor:
        return self._matrices(self._windows.gradient)

    @property
    @override
    def attention_rows(self) -> Tensor | None:
        rows = self._windows.attention_rows
        return None if rows is None else self._step.above.out_of_windows(rows)

    @property
    @override
    def product_rows(self) -> Tensor:
        return self._step.above.out_of_windows(self._windows.product_rows)

    @cached_property
    @override
    def equal_shares(self) -> Tensor:
        return self._windows.equal_shares[:: len(self._step.windows)]

    @override
    def head_norm(self, which: HeadNorm) -> Tensor:
        norms = torch.unflatten(self._windows.head_norm(which), 0, (-1, len(self._step.windows)))
        total: Tensor = torch.linalg.vector_norm(norms, ord=_order(which), dim=1)
        return total

    @override
    def head_share(self, which: HeadNorm) -> Tensor:
        return share(self.head_norm(which))

    @override
    def carry(self, attention_rows: Tensor | None, product_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        into_windows = self._step.above.into_windows
        given = (None if rows is None else into_windows(rows) for rows in (attention_rows, product_rows))
        by_attention, by_product = self._windows.carry(*given)
        return (
            None if by_attention is None else self._step.out_of_windows(by_attention),
            None if by_product is None else self._step.out_of_windows(by_product),
        )

    @override
    def local_key_sums(self) -> Tensor | None:
        sums = self._windows.local_key_sums()
        return None if sums is None else self._step.out_of_windows(sums)

    @override
    def write_gradients(self, found: Sequence[Tensor]) -> None:
        self._whole.write_gradients(found)

    def _matrices(self, blocks: Tensor) -> Tensor:
        """Return matrices (B, H, Q, N) with given blocks (B * W, H, q, n)."""
        by_head = torch.unflatten(blocks, 0, (-1, len(self._step.windows))).movedim(1, 2)  # (B, H, W, q, n)
        columns = by_head.new_zeros((*by_head.shape[:-1], self._step.tokens + 1))
        columns.scatter_(-1, self._step.windows[:, None].expand_as(by_head), by_head)
        return columns[..., :-1].flatten(2, 3).index_select(2, self._step.above.places)


def _order(which: HeadNorm) -> Literal[1, 2]:
    return 1 if which.endswith("l1") else 2
