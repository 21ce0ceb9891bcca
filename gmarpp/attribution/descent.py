"""The way down: each layer is visited when the backward pass reaches it, serves the methods, and is freed.

A layer comes in two forms. The dense one makes its matrices, and since it has them, also does the attention's own
backward step. The fused one leaves that step to the network and makes no matrix.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmarpp.attribution.call import AttentionCall
from gmarpp.attribution.class_attention import ClassLayer
from gmarpp.attribution.fused_layer import FusedLayer, is_fused
from gmarpp.attribution.layer import AttentionLayer, WrittenLayer
from gmarpp.attribution.reduced import ReducedLayer
from gmarpp.attribution.relevance import Relevance
from gmarpp.attribution.windowed import WindowedLayer
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.pooling import Pooling
from gmarpp.network.transport import Step


class Given(NamedTuple):
    """An attention call as the backward pass meets it: its inputs, and the gradient of its output or `None`."""

    call: AttentionCall
    query: Tensor
    key: Tensor | None
    value: Tensor
    mask: Tensor | None
    outer: Tensor | None


def joined(given: Sequence[Given]) -> Given:
    """Return the calls that a block makes at once as one, with the heads of all.

    Raises:
        UnsupportedNetworkError: if their shapes differ, or they have masks.
    """
    ordered = sorted(given, key=lambda each: each.call.index)
    last = ordered[-1]
    keys = [each.key for each in ordered if each.key is not None]
    shapes = {
        (each.query.shape[2:], each.value.shape[2:], each.key is not None and each.query.shape[1] / each.key.shape[1])
        for each in given
    }
    if len(shapes) > 1 or any(each.mask is not None for each in given):
        raise UnsupportedNetworkError(
            f"block {last.call.block} makes {len(given)} attention calls at once, of different shapes or with masks: "
            "they cannot be followed as one layer"
        )
    outer = [each.outer for each in ordered if each.outer is not None]
    return Given(
        last.call,
        torch.cat([each.query * (each.call.scale / last.call.scale) for each in ordered], dim=1),
        torch.cat(keys, dim=1) if keys else None,
        torch.cat([each.value for each in ordered], dim=1),
        None,
        torch.cat(outer, dim=1) if outer else None,
    )


class Descent:
    """Hands the layers of one pass to the relevance, from the top down.

    Nodes of the graph refer to it, and it refers to nothing of the graph, so both are freed as soon as they are unused.

    Attributes:
        relevance: the rows of this pass.
        local: gradients of the layers' own scores, (B, H, R, dv), by block; empty when no method needs them.
        gradient_scale: factor of all gradients.
        is_balanced: whether the backward pass is that of the balanced gradient.
        residuals: by block, `x · ds/dm` times `gradient_scale` (see `AttentionLayer.residual`), until its layer is
            visited.
        layers: number of layers.
        depth: number of self-attention layers.
        visited: positions of the layers visited so far.
        received: positions of the blocks whose tokens' relevance was seen so far.

    Args:
        needs_attention: whether a method takes anything of the layers.
        may_balance: whether some passes are balanced.
    """

    def __init__(self, needs_attention: bool, may_balance: bool) -> None:
        self.needs_attention, self.may_balance = needs_attention, may_balance
        self.relevance: Relevance | None = None
        self.local: Sequence[Tensor] = ()
        self.gradient_scale = 1.0
        self.is_balanced = False
        self.residuals: dict[int, Tensor] = {}
        self.layers = self.depth = 0
        self.visited: list[int] = []
        self.received: list[int] = []
        self._calls: Counter[int | None] = Counter()
        self._waiting: list[Given] = []
        self._above: Step | None = None

    def begin(
        self,
        relevance: Relevance,
        local: Sequence[Tensor],
        gradient_scale: float,
        calls: Sequence[AttentionCall],
        is_balanced: bool,
    ) -> None:
        """Start a pass."""
        self.relevance, self.local, self.gradient_scale = relevance, local, gradient_scale
        self.is_balanced, self.residuals = is_balanced, {}
        self._calls = Counter(call.block for call in calls if call.block is not None)
        self.layers = len(calls)
        # Class attention after the blocks is part of the head, as a pool is.
        of_head = sum(call.is_pool or (call.is_class and call.block is None) for call in calls)
        self.depth = len(calls) - of_head - sum(count - 1 for count in self._calls.values())
        self.visited, self.received, self._waiting = [], [], []
        self._above = None

    def end(self) -> None:
        """End a pass; what is differentiated between passes is by the plain rule."""
        self.relevance, self.is_balanced = None, False

    @property
    def needs_tokens(self) -> bool:
        """Whether the relevance of tokens that enter blocks is wanted."""
        return self.relevance is not None and self.relevance.needs_tokens

    @property
    def needs_residuals(self) -> bool:
        """Whether `residuals` are wanted."""
        return self.relevance is not None and self.relevance.needs_residuals

    def receive(self, block: int, relevance: Tensor) -> None:
        """Take the relevance (B, N), times `gradient_scale`, of the tokens that enter a block."""
        assert self.relevance is not None
        # Blocks that the score does not read are left out.
        if block in self._calls:
            self.received.append(block)
            # The block's layer is the one that was visited last.
            self.relevance.receive(relevance if self._above is None else self._above.by_token(relevance))

    def visit(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        mask: Tensor | None,
        outer: Tensor | None,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Carry the relevance through a layer, in parts of the batch, of which only one has matrices at a time.

        Args:
            call: the layer's call.
            query: (B, H, Q, d); or the attention itself, (B, H, Q, N), without a key.
            key: (B, H, N, d), or `None`.
            value: (B, H, N, dv).
            mask: as `scaled_dot_product_attention` takes it.
            outer: gradient of the call's output times `gradient_scale`, (B, H, Q, dv), or `None`.
            gradients: filled with those of query, key and value, if the layer computes them.
        """
        if self.relevance is None:
            # No way down has begun: the gradient of what the layer made was cut, and so it has none.
            for each in gradients or ():
                each.zero_()
            return
        self.visited.append(call.index)
        if call.step is not None:
            self._reach(call.step, call.index == self.layers - 1)
        elif not call.is_pool:
            self.relevance.leave_out(call.queries)
        if not self.needs_attention and gradients is None:
            return
        self.relevance.leave(call.block)
        given = Given(call, query, key, value, mask, outer)
        is_whole = self._calls[call.block] <= 1
        for part, rows, layer in self._layers(given, is_whole):
            if is_whole:
                self.relevance.step(part, layer)
            if gradients is not None:
                layer.write_gradients([each[rows] for each in gradients])
        if is_whole:
            return
        self._waiting.append(given)
        if len(self._waiting) == self._calls[call.block]:
            for part, _, layer in self._layers(joined(self._waiting), True):
                self.relevance.step(part, layer)
            self._waiting = []

    def _reach(self, step: Step, is_top: bool) -> None:
        """Bring the relevance from the tokens of the layer above to those of a block that is visited next."""
        assert self.relevance is not None
        above, self._above = self._above, step
        if above is not None and above.grid != step.above.grid:
            self.relevance.spread(above.merged or Pooling.cells(step.above.grid, above.grid).to(step.windows.device))
        if step.pool is not None:
            self.relevance.pool(step, is_top)

    def _layers(self, given: Given, is_whole: bool) -> Iterator[tuple[slice, slice, AttentionLayer]]:
        """Make a call's layer, for parts of the batch; without the layer's own score if other calls belong to it.

        Returns:
            of each part, which images and which entries of the call's inputs it has, and its layer.
        """
        call, query, key, value, mask, outer = given
        local = self.local[call.block] if is_whole and call.block is not None and len(self.local) > 0 else None
        residual = self.residuals.pop(call.block, None) if is_whole and call.block is not None else None
        if residual is not None and call.step is not None:
            residual = call.step.by_token(residual)
        step, windows = call.step, 1 if call.step is None else len(call.step.windows)
        # The kernels have no way to leave out padding.
        is_padded = step is not None and (step.is_padded or step.above.is_padded)
        may_fuse = is_fused(query) and key is not None and not is_padded
        kind = WrittenLayer if key is None else FusedLayer if may_fuse else AttentionLayer
        for part in _parts(query, value, windows, may_fuse):
            rows = slice(part.start * windows, part.stop * windows)
            layer = kind(
                _part(query, rows),
                None if key is None else _part(key, rows),
                _part(value, rows),
                mask=_mask_part(mask, rows),
                scale=call.scale,
                outer=None if outer is None else _part(outer, rows),
                local=None if local is None else _part(local, rows),
                gradient_scale=self.gradient_scale,
                is_top=call.index == self.layers - 1,
                is_pool=call.is_pool,
                depth=self.depth,
                index=call.index if call.block is None else call.block,
                residual=None if residual is None else residual[part] / self.gradient_scale,
                norms=frozenset() if self.relevance is None else self.relevance.head_norms,
            )
            if step is not None:
                layer = _of_all_tokens(layer, step, None if call.shares is None else call.shares[part])
            yield part, rows, ClassLayer(layer) if call.is_class else layer


def _of_all_tokens(layer: AttentionLayer, step: Step, shares: Tensor | None) -> AttentionLayer:
    if step.keys is not None:
        layer = ReducedLayer(layer, step.keys)
        if step.pool is None:
            return layer
    return WindowedLayer(layer, step, shares)


def _part(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if rows == slice(0, len(tensor)) else tensor[rows]


def _mask_part(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask[part] if mask is not None and mask.dim() == 4 and len(mask) > 1 else mask


def _parts(query: Tensor, value: Tensor, windows: int, may_fuse: bool) -> Iterator[slice]:
    """Split a batch so that a part's matrices fit a CPU's cache, or stay small on a GPU; fused layers make none."""
    images = len(query) // windows
    if may_fuse:
        return iter([slice(0, images)])
    bytes_per_image = windows * query.shape[1] * query.shape[2] * value.shape[2] * 4
    budget = 1 << 20 if query.device.type == "cpu" else 1 << 28
    size = max(1, budget // bytes_per_image)
    return (slice(start, start + size) for start in range(0, images, size))
