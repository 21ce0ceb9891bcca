"""A layer whose products come from fused kernels, without an N × N matrix in memory."""

from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from gmarpp.attribution import fused
from gmarpp.attribution.layer import AttentionLayer, HeadNorm, share


def is_fused(tensor: Tensor) -> bool:
    """Return whether layers of such tensors are fused: on CUDA with Triton, unless GMARPP_FUSED=0."""
    return fused.available(tensor.device)


class FusedLayer(AttentionLayer):
    """An attention layer that makes its matrices only for a method that asks for them."""

    key: Tensor

    @property
    @override
    def product_rows(self) -> Tensor:
        return self._statistics.product_rows

    @override
    def head_norm(self, which: HeadNorm) -> Tensor:
        place = self._place(which)
        return self._statistics.norms[place]

    @override
    def head_share(self, which: HeadNorm) -> Tensor:
        place = self._place(which)
        return self._shares[place]

    def _place(self, norm: HeadNorm) -> int:
        """Return where a norm is among the statistics, which are computed anew if it was not expected."""
        if norm not in self.norms:
            self.norms = frozenset(fused.NORMS)
            vars(self).pop("_statistics", None)
            vars(self).pop("_shares", None)
        return [each for each in fused.NORMS if each in self.norms].index(norm)

    @override
    def carry(self, attention_rows: Tensor | None, product_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        by_attention, by_product, _ = fused.carry(
            self.query,
            self.key,
            self.value,
            self.outer,
            self._statistics,
            attention_rows=attention_rows,
            product_rows=product_rows,
            mask=self.mask,
            scale=self.scale,
            gradient_scale=self.gradient_scale,
        )
        return by_attention, by_product

    @override
    def local_key_sums(self) -> Tensor | None:
        if self.local is None:
            return None
        rows, mask = self.local.shape[2], self.mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., :rows, :]
        ones = self.local.new_ones((*self.local.shape[:2], 1, rows), dtype=torch.float32)
        _, _, sums = fused.carry(
            self.query[:, :, :rows],
            self.key,
            self.value,
            self.local,
            None,
            gradient_rows=ones,
            mask=mask,
            scale=self.scale,
            gradient_scale=self.gradient_scale,
        )
        return None if sums is None else sums[:, 0]

    @cached_property
    def _statistics(self) -> fused.Statistics:
        return fused.statistics(
            self.query,
            self.key,
            self.value,
            self.outer,
            mask=self.mask,
            scale=self.scale,
            gradient_scale=self.gradient_scale,
            norms=self.norms,
        )

    @cached_property
    def _shares(self) -> Tensor:
        """Shares of the norms, (k, B, H); one computation for all takes fewer kernels."""
        return share(self._statistics.norms)
