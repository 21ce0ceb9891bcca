"""Interception of `scaled_dot_product_attention`: attention and its gradient, one layer at a time.

The network keeps its fused kernels. Attention is recomputed from queries and keys when the backward pass reaches the
layer, where it serves the methods and the layer's own backward step, and is freed before the next layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmarpp.attribution.call import AttentionCall, UnsupportedNetworkError
from gmarpp.attribution.layer import AttentionLayer, LayerConsumer
from gmarpp.attribution.layer_score import LayerScores
from gmarpp.attribution.narrow import LastBlock, RepeatedBlocks, tokens_of
from gmarpp.attribution.seam import Seam
from gmarpp.attribution.tapped_attention import TappedAttention, attention_of, fused_attention, mask_part, parts
from gmarpp.attribution.unseen import UnseenAttention

PrefixReader = Callable[..., int]
"""Takes what enters the first block, tokens (B, N, D) first; returns the number of prefix tokens if blocks may run for
them alone because the head reads no others, and else 0."""


class AttentionTap(Seam):
    """Follows a network's attention calls while it runs, and replays them from the top layer down.

    Only what the thread that intercepts runs is followed; other threads' calls do what they did before.

    Args:
        blocks: the transformer blocks if they are known; they tell which block makes which call.
        consume: takes each layer of each part of the batch, from the top down.
        read_prefix: tells whether blocks may run for the prefix tokens alone.
        own_scores: whether a method needs the layers' own scores.
        narrowing: whether the last block may run for the prefix tokens alone.
        through_gradients: whether the layers are visited by the backward pass, with gradients. If not, calls keep
            their inputs and `replay` visits them; unless layers' own scores are needed and the head reads more than
            the prefix tokens.
        tokens_left: returns again what left a block, by its position, if all but the last are recomputed.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        consume: LayerConsumer,
        read_prefix: PrefixReader,
        own_scores: bool,
        narrowing: bool,
        through_gradients: bool,
        tokens_left: Callable[[int], Tensor] | None,
    ) -> None:
        super().__init__(self._attend)
        self.consume = consume
        self.through_gradients = through_gradients
        self.calls: list[AttentionCall] = []
        self.leaves: list[Tensor] = []
        self.readout: Tensor | None = None
        self.scale = torch.ones(0)
        self.finite = torch.ones(0, dtype=torch.bool)
        self.visited: set[int] = set()
        self.last_block = LastBlock()
        self.repeated_blocks = RepeatedBlocks()
        self.layer_scores = LayerScores(self._take_local)
        self.unseen = UnseenAttention()
        self.last_tokens: Tensor | None = None
        self._read_prefix = read_prefix
        self._own_scores = own_scores
        self._narrowing = narrowing
        self._blocks = blocks
        self._tokens_left = tokens_left
        self._batch = 0
        self._current_block: int | None = None
        self._recording = False
        self._top_output: Tensor | None = None
        self._attended: GradientEdge | None = None

    @property
    def depth(self) -> int:
        """Number of self-attention calls, an attention-pool head not counted."""
        return sum(not call.is_pool for call in self.calls)

    @property
    def boundary(self) -> Tensor | None:
        """What the network's output is computed from: tokens behind the last block, or a higher or only call's output.

        Shape (B, N, D) or (B, H, Q, d).
        """
        return self._top_output if self.calls[-1].block is None else self.last_tokens

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Number the attention calls made inside, and note attention that is none of them.

        Args:
            batch: number of images that the network is given.
        """
        self._batch = batch
        handles = []
        for position, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(self._enter_block(position), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave_block(position)))
        self._recording = True
        try:
            with self.unseen:
                yield
        finally:
            self._recording = False
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Let go of the graph, whose nodes hold the tap unseen by Python's garbage collector, and of the tap's owner.

        Without a cycle everything is freed at once, and not when the collector runs next, many batches later.
        """
        del self.consume, self._read_prefix, self._tokens_left, self._replacement
        self.last_tokens = self._top_output = self._attended = None
        self.layer_scores.clear()
        self.unseen.clear()
        for tensors in (self.repeated_blocks.left, self.leaves):
            tensors.clear()
        for call in self.calls:
            call.output = call.inputs = call.local = None

    def replay(self, keep: bool) -> None:
        """Visit the layers from the top down without the score's gradient; `readout` must be set.

        Args:
            keep: keep what another replay needs.
        """
        for call in reversed(self.calls):
            if call.inputs is None:
                raise RuntimeError("the calls were recorded for a backward pass")
            query, key, value, mask = call.inputs
            for part in parts(query, key):
                layer = AttentionLayer(
                    attention_of(call, query[part], key[part], mask_part(mask, part)),
                    is_top=call is self.calls[-1],
                    is_pool=call.is_pool,
                    depth=self.depth,
                    local_gradient=self._local_gradient(call, part, value[part]),
                )
                self.consume(part, layer)
            if not keep:
                call.inputs = None

    def _enter_block(self, position: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.is_here:
                return
            self._current_block = position
            if not args:
                raise UnsupportedNetworkError(
                    f"block {position} takes its tokens by keyword ({', '.join(kwargs)}): pass them by position"
                )
            if position == 0:
                self._choose_rows(args, kwargs)

        return enter

    def _choose_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide, before the first block runs, which blocks run for the prefix tokens alone."""
        prefix = self._read_prefix(*args, **kwargs) if self._own_scores or self._narrowing else 0
        if self._narrowing:
            self.last_block.prefix = prefix
        if self._own_scores:
            self.repeated_blocks.prefix = prefix
            self.repeated_blocks.detached = not self.through_gradients
            self.through_gradients = self.through_gradients or not prefix

    def _leave_block(self, position: int) -> Callable[[nn.Module, object, Any], Any]:
        def leave(_: nn.Module, __: object, output: Any) -> Any:
            if not self.is_here:
                return None
            self._current_block = None
            tokens = tokens_of(output)
            if self._own_scores and not self.repeated_blocks.prefix and tokens.requires_grad and self._attended:
                # The last block, and its input, are never recomputed.
                recomputed = self._tokens_left is not None and position < len(self._blocks) - 2
                again = (lambda: self._tokens_left(position)) if recomputed else None  # type: ignore[misc]
                self.layer_scores.watch(position, tokens, self._attended, again)
            if position < len(self._blocks) - 1:
                return None
            if tokens.requires_grad:
                self.last_tokens = tokens
                return None
            self.last_tokens = tokens.detach().requires_grad_()
            # The network may change in place what it is given.
            handed = self.last_tokens.clone()
            return (handed, *output[1:]) if isinstance(output, tuple) else handed

        return leave

    def _take_local(self, position: int, gradient: Tensor) -> None:
        self.calls[position].local = gradient

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self._passing or not self.is_here:
            return self._original(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.repeated_blocks.repeating:
            assert self.calls[-1].output is not None
            return self.calls[-1].output
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if self._probing:
            return value
        (query, key, value, attn_mask, dropout_p, is_causal, scale), rows = self.last_block.attention_call(
            query, key, value, attn_mask, dropout_p, is_causal, scale
        )
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        call = self._record(query, key, dropout_p, query.shape[-1] ** -0.5 if scale is None else scale)
        if self.through_gradients:
            output = self._attend_with_gradient(query, key, value, attn_mask, call, rows)
        else:
            call.inputs = (query.detach(), key.detach(), value.detach(), attn_mask)
            # Where the blocks are not known, any call may be the top one.
            output = fused_attention(query, key, value, attn_mask, scale=call.scale).detach()
            output.requires_grad_(call.block is None)
        if self._recording:
            self._top_output = output
            prefix = self.repeated_blocks.prefix
            if prefix and call.block is not None:
                call.output = output.detach()[:, :, :prefix].clone().requires_grad_()
        return output

    def _attend_with_gradient(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall, rows: int | None
    ) -> Tensor:
        if self._recording and call.index == 0:
            # The graph starts here: nothing below the first layer is needed, nor its activations.
            query, key, value = query.detach(), key.detach(), value.detach()
        if not any(each.requires_grad for each in (query, key, value)):
            call.follows = False
            query = query.detach().requires_grad_()
            if self._recording:
                self.leaves.append(query)
        output: Tensor = TappedAttention.apply(query, key, value, mask, self, call, rows)
        if self._recording and self._own_scores and not self.repeated_blocks.prefix:
            self._attended = get_gradient_edge(output)
        return output

    def _record(self, query: Tensor, key: Tensor, dropout: float, scale: float) -> AttentionCall:
        if query.dim() != 4 or len(query) != self._batch:
            raise UnsupportedNetworkError(
                f"an attention call has queries of shape {tuple(query.shape)} for {self._batch} images: windowed "
                "attention (Swin, for example) does not connect all tokens, and cannot be explained by these methods. "
                "Use a ViT with global attention"
            )
        if dropout > 0:
            raise UnsupportedNetworkError("attention dropout is active although the network is in eval mode")
        queries, keys, block = query.shape[-2], key.shape[-2], self._current_block
        # Queries that are not computed from the tokens belong to a pool, which may well have as many of them.
        is_latent = block is None and key.requires_grad and not query.requires_grad
        call = AttentionCall(len(self.calls), block, scale, queries, keys, is_pool=queries != keys or is_latent)
        if self._recording:
            self.calls.append(call)
        return call

    def visit(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        gradient: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Hand one layer to the methods, and write the gradients of its query, key and value.

        Args:
            call: the layer.
            query: shape (B, H, Q, d).
            key: shape (B, H, N, d).
            value: shape (B, H, N, d).
            mask: as `scaled_dot_product_attention` takes it.
            gradient: gradient of the call's output, (B, H, Q, d), times `scale` of each image.
            gradients: filled with those of query, key and value, likewise.
        """
        self.visited.add(call.index)
        self.finite = self.finite & gradient.flatten(1).isfinite().all(dim=1)
        for part in parts(query, key):
            q, k, v, outer = (tensor[part].float() for tensor in (query, key, value, gradient))
            scale = self.scale[part].view(-1, 1, 1, 1)
            attention = attention_of(call, q, k, mask_part(mask, part))
            layer = AttentionLayer(
                attention,
                is_top=call is self.calls[-1],
                is_pool=call.is_pool,
                depth=self.depth,
                given_gradient=torch.matmul(outer / scale, v.mT),
                local_gradient=self._local_gradient(call, part, v),
            )
            self.consume(part, layer)
            # The softmax's own backward: dS = A ⊙ (G - rowsum(A ⊙ G)).
            product = layer.product
            scores = product.addcmul_(attention, product.sum(dim=-1, keepdim=True), value=-1)
            factor = call.scale * scale
            gradients[0][part] = torch.matmul(scores, k * factor)
            gradients[1][part] = torch.matmul(scores.mT, q * factor)
            gradients[2][part] = torch.matmul(attention.mT, outer)
        if not self.repeated_blocks.prefix:
            call.local = None

    @staticmethod
    def _local_gradient(call: AttentionCall, part: slice, value: Tensor) -> Tensor | None:
        """Return the gradient of the layer's own score with respect to the attention's first rows, (B, H, R, N)."""
        return None if call.local is None else torch.matmul(call.local[part], value.float().mT)
