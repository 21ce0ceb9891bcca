"""Interception of `scaled_dot_product_attention`: attention and its gradient, one layer at a time.

The network keeps its fused kernels. Attention is recomputed from queries and keys when the backward pass reaches the
layer, where it serves the methods and the layer's own backward step, and is freed before the next layer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.attribution.call import AttentionCall, UnsupportedNetworkError
from gmarpp.attribution.echo import Echo
from gmarpp.attribution.layer import AttentionLayer, LayerConsumer
from gmarpp.attribution.layer_score import LayerScores
from gmarpp.attribution.narrow import DetachedBlocks, LastBlock

PrefixReader = Callable[[Tensor], int]
"""Takes tokens (B, N, D); gives the number of prefix tokens if the network's head reads no others, and else 0."""

_fused_attention = F.scaled_dot_product_attention
# The interception replaces an attribute of a module, which all threads share.
_one_at_a_time = threading.RLock()


class AttentionTap:
    """Follows a network's attention calls while it runs, and replays them from the top layer down.

    Args:
        blocks: the transformer blocks if they are known; they tell which block makes which call.
        consume: takes each layer of each part of the batch, from the top down.
        read_prefix: tells which tokens the head reads; needed to echo or to narrow.
        echoing: whether blocks carry echoes, because a method needs the layers' own scores.
        narrowing: whether the last block may run for the prefix tokens alone, if the head reads no others.
        through_gradients: whether the layers are visited by the backward pass, with gradients. If not, calls keep
            their inputs and `replay` visits them; unless blocks echo and the head reads more than the prefix tokens.
        tokens_left: gives again what left a block, by its position, if all but the last are recomputed.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        consume: LayerConsumer,
        read_prefix: PrefixReader | None = None,
        echoing: bool = False,
        narrowing: bool = False,
        through_gradients: bool = True,
        tokens_left: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.consume = consume
        self.through_gradients = through_gradients
        self.calls: list[AttentionCall] = []
        self.leaves: list[Tensor] = []
        self.echoes: list[Tensor] = []
        self.layer_scores = LayerScores(len(blocks), tokens_left)
        self.readout: Tensor | None = None
        self.gradient_scale = 1.0
        self.last_block = LastBlock()
        self.detached_blocks = DetachedBlocks(self.echoes.append)
        self._read_prefix = read_prefix
        self._echoing = echoing
        self._narrowing = narrowing
        self._blocks = blocks
        self._batch = 0
        self._current_block: int | None = None
        self._recording = False
        self._echo: Echo | None = None
        # What left the last block that ran, without its echoes and with them.
        self._left: tuple[Tensor | None, Tensor | None] = None, None
        self._passing = False
        self._read_tokens: Tensor | None = None

    @property
    def depth(self) -> int:
        """Number of self-attention calls, an attention-pool head not counted."""
        return sum(call.queries == call.keys for call in self.calls)

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Replace `torch.nn.functional.scaled_dot_product_attention`, and restore it also after an error.

        The fast path of `nn.MultiheadAttention` and compiled code, which would bypass it, are off meanwhile.
        """
        with _one_at_a_time, torch.compiler.set_stance("force_eager"):
            fast_path = torch.backends.mha.get_fastpath_enabled()
            original = F.scaled_dot_product_attention
            torch.backends.mha.set_fastpath_enabled(False)
            F.scaled_dot_product_attention = self._attend
            try:
                yield
            finally:
                F.scaled_dot_product_attention = original
                torch.backends.mha.set_fastpath_enabled(fast_path)

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Number the attention calls made inside, and collect what stands for each layer's own score.

        That is `layer_scores` where blocks carry echoes, and `echoes` where they run without gradients.

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
            yield
        finally:
            self._recording = False
            self._left = None, None
            for handle in handles:
                handle.remove()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let attention calls do what they did before the interception."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    def close(self) -> None:
        """Let go of the graph, whose nodes hold the tap unseen by Python's garbage collector, and of the tap's owner.

        Without a cycle everything is freed at once, and not when the collector runs next, many batches later.
        """
        del self.consume, self._read_prefix
        self.layer_scores.clear()
        for tensors in (self.echoes, self.leaves):
            tensors.clear()
        for call in self.calls:
            call.output = call.inputs = None

    def gradients_of_outputs(self, total: Tensor, retain_graph: bool) -> tuple[Tensor, ...] | None:
        """Set `readout` for a replay; give gradients of the calls' outputs for the prefix tokens if blocks echo."""
        if not self.detached_blocks.prefix:
            top = self.calls[-1].output
            assert top is not None
            self.find_readout(torch.autograd.grad(total, top, retain_graph=retain_graph)[0])
            return None
        outputs = [call.output for call in self.calls if call.output is not None]
        *local, read = torch.autograd.grad(total, [*outputs, self.echoes[-1]], retain_graph=retain_graph)
        row = readout_row(read[:, None])
        self.readout = F.pad(row, (0, self.calls[-1].keys - row.shape[1]))
        return tuple(local)

    def replay(self, local: Sequence[Tensor] | None, keep: bool) -> None:
        """Visit the layers from the top down without the score's gradient; `readout` must be set.

        Args:
            local: gradients of the layers' own scores with respect to the calls' outputs for the prefix tokens, times
                `gradient_scale`, from the input upwards.
            keep: keep what another replay needs.
        """
        for call in reversed(self.calls):
            if call.inputs is None:
                raise RuntimeError("the calls were recorded for a backward pass")
            query, key, value, mask = call.inputs
            for part in _parts(query, key):
                layer = AttentionLayer(
                    _attention(call, query[part], key[part], _mask_part(mask, part)),
                    is_top=call is self.calls[-1],
                    depth=self.depth,
                    local_gradient=None if local is None else self._gradient(local[call.index][part], value[part]),
                )
                self.consume(part, layer)
            if not keep:
                call.inputs = None

    def _enter_block(self, position: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._current_block = position
            if not args:
                raise UnsupportedNetworkError(
                    f"block {position} takes its tokens by keyword ({', '.join(kwargs)}): pass them by position"
                )
            tokens, *others = args
            if position == 0 and self._read_prefix is not None:
                # Tensors beside the tokens, such as rotary embeddings, have an entry for each of them.
                plain = all(
                    each is None or isinstance(each, bool | int | float) for each in (*others, *kwargs.values())
                )
                prefix = self._read_prefix(tokens) if plain else 0
                if self._echoing and not self.through_gradients:
                    self.detached_blocks.prefix, self.through_gradients = prefix, not prefix
                if self._echoing and self.through_gradients:
                    self._echo = Echo(dim=1, size=prefix) if prefix else Echo(dim=0, size=len(tokens))
                if self._narrowing and prefix:
                    self.last_block.prefix, self.last_block.echoes = prefix, prefix if self._echoing else 0
            if self._echo is None:
                return None
            left, following = self._left
            return (following if tokens is left else self._echo.append(tokens), *others), kwargs

        return enter

    def _leave_block(self, position: int) -> Callable[[nn.Module, object, Any], Any]:
        def leave(_: nn.Module, __: object, output: Any) -> Any:
            self._current_block = None
            tokens, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if self._echo is not None:
                tokens, echoes, following = self._echo.relay(tokens)
                self.layer_scores.add(self._echo, echoes, position)
                self._left = tokens, following
            if position == len(self._blocks) - 1 and tokens.requires_grad:
                tokens.register_hook(self._remember_read_tokens)
            return tokens if others is None else (tokens, *others)

        return leave

    def _remember_read_tokens(self, gradient: Tensor) -> None:
        self._read_tokens = readout_row(gradient[:, None])

    def find_readout(self, gradient: Tensor) -> None:
        """Set `readout` from the gradient (B, H, Q, d) of the top call's output.

        Where the blocks are known, the gradient of what leaves the last one tells more: it is not zero even if the top
        layer's attention does not influence the score.
        """
        self_attends = self.calls[-1].queries == self.calls[-1].keys
        known = self._read_tokens if self_attends else None
        self.readout = readout_row(gradient) if known is None else known

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
        if self._passing:
            return _fused_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.detached_blocks.repeating:
            return self._attend_again()
        (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), narrowed = (
            self.last_block.attention_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        )
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        # Only blocks are run again, and outside of their hooks.
        echo = self._echo if self._current_block is not None or not self._recording else None
        own_query, own_key = (each if echo is None else echo.split_heads(each)[0] for each in (query, key))
        if is_causal:
            attn_mask = torch.ones(own_query.shape[-2], own_key.shape[-2], dtype=torch.bool, device=query.device).tril()
        call = self._record(own_query, own_key, dropout_p, query.shape[-1] ** -0.5 if scale is None else scale)
        if not self.through_gradients:
            call.inputs = (query.detach(), key.detach(), value.detach(), attn_mask)
            # Only the top call's gradient is asked for: nothing below it is kept.
            may_be_top = self._current_block in (None, len(self._blocks) - 1)
            call.output = _fused_attention(query, key, value, attn_mask, scale=call.scale).detach()
            return call.output.requires_grad_(may_be_top)
        if not query.requires_grad:
            # The graph starts here: nothing below the first layer is needed, nor its activations.
            query = query.detach().requires_grad_()
            if self._recording:
                self.leaves.append(query)
        narrow = self.last_block if narrowed else None
        output: Tensor = _TappedAttention.apply(query, key, value, attn_mask, self, call, echo, narrow)
        return output

    def _attend_again(self) -> Tensor:
        """Answer the last call once more, for the prefix tokens; gradients end here."""
        call, prefix = self.calls[-1], self.detached_blocks.prefix
        assert call.inputs is not None
        query, key, value, mask = call.inputs
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., :prefix, :]
        call.output = _fused_attention(query[:, :, :prefix], key, value, mask, scale=call.scale).requires_grad_()
        return call.output

    def _record(self, query: Tensor, key: Tensor, dropout: float, scale: float) -> AttentionCall:
        if query.dim() != 4 or len(query) != self._batch:
            raise UnsupportedNetworkError(
                f"an attention call has queries of shape {tuple(query.shape)} for {self._batch} images: windowed "
                "attention (Swin, for example) does not connect all tokens, and cannot be explained by these methods. "
                "Use a ViT with global attention"
            )
        if dropout > 0:
            raise UnsupportedNetworkError("attention dropout is active although the network is in eval mode")
        call = AttentionCall(len(self.calls), self._current_block, scale, query.shape[-2], key.shape[-2])
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
        local: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Hand one layer to the methods, and write the gradients of its query, key and value.

        Args:
            call: the layer.
            query: shape (B, H, Q, d).
            key: shape (B, H, N, d).
            value: shape (B, H, N, d).
            mask: as `scaled_dot_product_attention` takes it.
            gradient: gradient of the call's output, (B, H, Q, d), times `gradient_scale`.
            local: gradient of the layer's own score with respect to the first rows of the output, likewise.
            gradients: filled with those of query, key and value, times `gradient_scale`.
        """
        is_top = call is self.calls[-1]
        if is_top:
            self.find_readout(gradient)
        for part in _parts(query, key):
            q, k, v, outer = (tensor[part].float() for tensor in (query, key, value, gradient))
            attention = _attention(call, q, k, _mask_part(mask, part))
            layer = AttentionLayer(
                attention,
                is_top=is_top,
                depth=self.depth,
                given_gradient=self._gradient(outer, v),
                local_gradient=None if local is None else self._gradient(local[part], v),
            )
            self.consume(part, layer)
            # The softmax's own backward: dS = A ⊙ (G - rowsum(A ⊙ G)).
            product = layer.product
            scores = product.addcmul_(attention, product.sum(dim=-1, keepdim=True), value=-1)
            factor = call.scale * self.gradient_scale
            gradients[0][part] = torch.matmul(scores, k * factor)
            gradients[1][part] = torch.matmul(scores.mT, q * factor)
            gradients[2][part] = torch.matmul(attention.mT, outer)

    def _gradient(self, outer: Tensor, value: Tensor) -> Tensor:
        """Give the gradient of the attention (B, H, R, N) from that of the call's output, or of its first rows."""
        return torch.matmul(outer.float() / self.gradient_scale, value.float().mT)


class _TappedAttention(torch.autograd.Function):
    """Fused attention whose backward step shows the layer to the tap."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        tap: AttentionTap,
        call: AttentionCall,
        echo: Echo | None,
        narrow: LastBlock | None,
    ) -> Tensor:
        ctx.tap, ctx.call, ctx.echo = tap, call, echo
        own_mask = mask if echo is None else echo.own_mask(mask, call.keys)
        # Saved as autograd saves its own tensors, so that activation checkpointing drops and recomputes them.
        ctx.save_for_backward(query, key, value, own_mask)
        if echo is not None:
            key, value, mask = echo.attended(key), echo.attended(value), echo.extended_mask(own_mask)
        if narrow is not None:
            query, mask = narrow.rows(query, dim=2), narrow.mask_rows(mask)
        return _fused_attention(query, key, value, mask, scale=call.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        gradient, local, written = gradients[0], None, tuple(each.new_empty(each.shape) for each in inputs)
        own = written
        if ctx.echo is not None:
            gradient, local = ctx.echo.split_heads(gradient)
            inputs = [ctx.echo.split_heads(each)[0] for each in inputs]
            for each in written:
                ctx.echo.split_heads(each)[1].zero_()
            own = tuple(ctx.echo.split_heads(each)[0] for each in written)
        # Rows that the last block leaves out have no gradient.
        gradient = F.pad(gradient, (0, 0, 0, ctx.call.queries - gradient.shape[2]))
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            ctx.tap.visit(ctx.call, *inputs, mask, gradient, local, own)
        return (*written, None, None, None, None, None)


def readout_row(gradient: Tensor) -> Tensor:
    """Give the row above the top layer: equal shares for the tokens that the head reads.

    They are the tokens whose attention output influences the score: the class token, all patches under average
    pooling, both tokens of a distilled network, the queries of an attention-pool head.

    Args:
        gradient: gradient of the top layer's attention output, shape (B, H, Q, d).

    Returns:
        float32, shape (B, Q), rows sum to 1; a row is zero where the score depends on no token.
    """
    read = (gradient != 0).any(dim=-1).any(dim=1).float()
    return read / read.sum(dim=-1, keepdim=True).clamp_min(1)


def _attention(call: AttentionCall, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(query.float() * call.scale, key.float().mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1)


def _mask_part(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask[part] if mask is not None and mask.dim() == 4 and len(mask) > 1 else mask


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Split a batch so that a part's attention matrices stay in the cache of a CPU, or small on a GPU."""
    bytes_per_image = query.shape[1] * query.shape[2] * key.shape[2] * 4
    budget = 1 << 20 if query.device.type == "cpu" else 1 << 28
    size = max(1, budget // bytes_per_image)
    return (slice(start, start + size) for start in range(0, len(query), size))
