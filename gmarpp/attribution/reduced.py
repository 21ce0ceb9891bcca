"""An attention layer with fewer keys than tokens, as methods see it: a layer over all tokens of a grid."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer, HeadNorm, Matrix, attributes
from gmarpp.network.pooling import Pooling


class ReducedLayer(AttentionLayer):
    """The layer whose keys are each made of several tokens, which get equal shares of what the key gets: `R U`.

    Norms of heads, and the attributes `key`, `value` and `outer`, are those of the keys.

    Args:
        few: the same attention, with its few keys.
        keys: what these are made of, U.
    """

    def __init__(self, few: AttentionLayer, keys: Pooling) -> None:
        super().__init__(**attributes(few))
        self._few, self._keys = few, keys

    @Matrix
    @override
    def attention(self) -> Tensor:
        return self._keys.spread(self._few.attention)

    @Matrix
    @override
    def gradient(self) -> Tensor:
        # A token counts in each of the keys that it is part of, in most networks in one.
        total = self._keys.spread(torch.ones_like(self._few.gradient))
        return self._keys.spread(self._few.gradient) / total.where(total > 0, 1.0)

    @property
    @override
    def product(self) -> Tensor:
        return self._keys.spread(self._few.product)

    @cached_property
    @override
    def positive_product(self) -> Tensor:
        return self._keys.spread(self._few.positive_product)

    @property
    @override
    def product_rows(self) -> Tensor:
        return self._few.product_rows

    @override
    def head_norm(self, which: HeadNorm) -> Tensor:
        return self._few.head_norm(which)

    @override
    def head_share(self, which: HeadNorm) -> Tensor:
        return self._few.head_share(which)

    @override
    def carry(self, attention_rows: Tensor | None, product_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        by_attention, by_product = self._few.carry(attention_rows, product_rows)
        return (
            None if by_attention is None else self._keys.spread(by_attention),
            None if by_product is None else self._keys.spread(by_product),
        )

    @override
    def local_key_sums(self) -> Tensor | None:
        sums = self._few.local_key_sums()
        return None if sums is None else self._keys.spread(sums)

    @override
    def write_gradients(self, found: Sequence[Tensor]) -> None:
        self._few.write_gradients(found)
