"""A layer in which prefix tokens alone attend, as methods see it: a layer of all tokens.

Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021.
"""

from collections.abc import Sequence
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution.layer import AttentionLayer, HeadNorm, Matrix, attributes


class ClassLayer(AttentionLayer):
    """The layer whose matrix has rows of zeros for the patch tokens, so that relevance passes these as it is.

    Args:
        prefix: the same attention, with the prefix tokens as queries and all tokens as keys.
    """

    def __init__(self, prefix: AttentionLayer) -> None:
        super().__init__(**attributes(prefix))
        self._prefix = prefix

    @property
    @override
    def queries(self) -> int:
        return self.value.shape[-2]

    @Matrix
    @override
    def attention(self) -> Tensor:
        return self._with_others(self._prefix.attention)

    @Matrix
    @override
    def gradient(self) -> Tensor:
        return self._with_others(self._prefix.gradient)

    @property
    @override
    def attention_rows(self) -> Tensor:
        return self.attention.sum(dim=-1)

    @cached_property
    @override
    def product_rows(self) -> Tensor:
        others = self.queries - self._prefix.queries
        return F.pad(self._prefix.product_rows, (0, others))

    @override
    def head_norm(self, which: HeadNorm) -> Tensor:
        return self._prefix.head_norm(which)

    @override
    def head_share(self, which: HeadNorm) -> Tensor:
        return self._prefix.head_share(which)

    @override
    def carry(self, attention_rows: Tensor | None, product_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        given = (attention_rows, product_rows)
        return self._prefix.carry(*(None if each is None else each[..., : self._prefix.queries] for each in given))

    @override
    def local_key_sums(self) -> Tensor | None:
        return self._prefix.local_key_sums()

    @override
    def write_gradients(self, found: Sequence[Tensor]) -> None:
        self._prefix.write_gradients(found)

    def _with_others(self, matrices: Tensor) -> Tensor:
        """Add rows of zeros for the patch tokens, (B, H, N, N)."""
        return F.pad(matrices, (0, 0, 0, self.queries - self._prefix.queries))
