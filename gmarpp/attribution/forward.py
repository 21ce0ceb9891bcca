"""The forward pass: it answers and records attention calls, and keeps what the ways down start from."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmarpp.attribution.attend import Inputs, attended
from gmarpp.attribution.call import (
    AttentionCall,
    gradient_of,
    require_followed,
    require_no_prefix,
    require_one_chain,
    require_shares,
    require_windows,
    warn_of_memory,
)
from gmarpp.attribution.chain import Chain
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.plan import Plan, blind_to_sign
from gmarpp.attribution.stream import Entered, watch_addition, watch_tokens
from gmarpp.network.errors import UnsupportedNetworkError


@dataclass(frozen=True)
class BlockRun:
    """A block and what it was given beside its tokens, by which it can run again; it refers to nothing of the graph.

    Attributes:
        forward: the block's own.
        others: arguments after the tokens.
        options: arguments by keyword.
    """

    forward: Callable[..., Any]
    others: Sequence[Any]
    options: dict[str, Any]

    def __call__(self, tokens: Tensor) -> Any:
        """Run the block, and return what it returns."""
        return self.forward(tokens, *self.others, **self.options)

    @property
    def is_by_token(self) -> bool:
        """Whether no argument beside the tokens has entries for them, as rotary embeddings have."""
        others = (*self.others, *self.options.values())
        return all(each is None or isinstance(each, bool | int | float | str) for each in others)


def tokens_of(output: Any) -> Tensor:
    """Return the tokens of a block's output, the first where there are several."""
    tokens = output[0] if isinstance(output, tuple) else output
    if not isinstance(tokens, Tensor):
        raise UnsupportedNetworkError(
            f"a block returns a {type(output).__name__}, expected its tokens, or a tuple that begins with them"
        )
    return tokens


class ForwardPass:
    """Answers the attention calls of a forward pass, and keeps what the ways down start from.

    Attributes:
        calls: the attention calls, from the input upward.
        outputs: of each call, where its output stands in the graph.
        leaves: the queries in which the graph starts, or would start if no method followed tokens.
        first_tokens: the first block's tokens, in which it starts then.
        runs: of each block, if the layers' own scores are wanted.
        entered: the tokens that each block was given, (B, N, D), if these scores are wanted; without a graph.
        left: the tokens that left each block, if these scores are wanted; with a graph where gradients pass from block
            to block.
        rests: what each block returned beside the tokens, if that was a tuple and these scores are wanted.
        reads_prefix: whether the architecture's head is known to read prefix tokens only.
        leaves_tokens: whether the block that ran last returned tokens alone.
        last_tokens: what left the last block, (B, N, D), if the blocks are known.
        chain: the tokens between blocks, and what else reads them.
        read: positions of the blocks below the last one whose tokens the score reads directly.
        top: where the graph of the score begins, if it reads nothing above such a block.
        dtype: in which the network attends.

    Args:
        plan: what the call of `explain` will do.
        descent: the way down that the graph's nodes hand their layers to.
        batch: number of images.
    """

    def __init__(self, plan: Plan, descent: Descent, batch: int) -> None:
        self.plan, self.descent = plan, descent
        self.calls: list[AttentionCall] = []
        self.outputs: list[GradientEdge | Tensor | None] = []
        self.leaves: list[GradientEdge] = []
        self.first_tokens: GradientEdge | None = None
        self.runs: list[BlockRun] = []
        self.rests: list[tuple[Any, ...] | None] = []
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        self.reads_prefix = self.leaves_tokens = False
        self.last_tokens: Tensor | None = None
        self.chain = Chain(plan.gradients)
        self.read: list[int] = []
        self.top: GradientEdge | None = None
        self.dtype = torch.float32
        self._batch = batch
        self._block: int | None = None
        self._entered: Entered | None = None
        self._entrance: GradientEdge | None = None
        self._shares: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the lowest layer attends to, and all others, if they do not merge tokens.

        An attention-pool head may leave out the prefix tokens.
        """
        return self.calls[0].keys

    @property
    def top_tokens(self) -> int:
        """How many tokens leave the last block, prefix tokens that an attention-pool head leaves out included."""
        if self.plan.steps:
            return self.plan.steps[-1].above.tokens
        return next((call.keys for call in reversed(self.calls) if not call.is_pool), self.tokens)

    @property
    def token_counts(self) -> set[int]:
        """How many tokens an attention layer of the network may attend to."""
        of_windows = {step.key_places for step in self.plan.steps}
        around = (-self.plan.layout.prefix_at(0), 0, self.plan.layout.prefix_tokens - self.plan.layout.prefix_at(0))
        return {self.tokens + each for each in around} | of_windows - {0, 1}

    @property
    def attends_once(self) -> bool:
        """Whether no block so far has made several attention calls."""
        return max(Counter(call.block for call in self.calls if call.block is not None).values(), default=1) == 1

    @property
    def score_start(self) -> GradientEdge | Tensor | None:
        """Where the graph of the score alone begins: at the last tokens read, or at the output of the top call."""
        if self.top is not None:
            return self.top
        if self.last_tokens is not None and self.calls[-1].block is not None:
            return self.last_tokens
        return self.outputs[-1]

    def enter_block(self, position: int, tokens: Tensor) -> Tensor:
        """Note the block that the next attention calls belong to, and return the tokens that it starts with."""
        self._block = position
        # The graph starts at the first block: nothing below it is needed.
        tokens = tokens.detach() if position == 0 else self.chain.enter(tokens)
        if self.plan.follows_tokens:
            if position == 0:
                self.first_tokens = get_gradient_edge(tokens.requires_grad_())
                # Blocks may not change a tensor in place in which a graph starts.
                tokens = tokens.clone()
            channels = 1 if self.plan.layout.channels_first else -1
            self._entered, self._entrance = watch_tokens(tokens, position, channels, self.descent)
        self._shares = None
        pool = self.plan.steps[position].pool if self.plan.steps and self.plan.needs_attention else None
        if pool is not None:
            residual, self._shares = pool.of(tokens)
            if self._entered is not None:
                self._entered = self._entered.pooled(residual)
        return tokens

    def leave_block(self, position: int, run: BlockRun, entered: Tensor, output: Any) -> Any:
        """Record what a block was given and returned, and return what the network continues with."""
        self._block, tokens = None, tokens_of(output)
        self.leaves_tokens = isinstance(output, Tensor)
        if self.plan.needs_residuals:
            self._watch_addition(tokens, position)
        if position == len(self.plan.layout.blocks) - 1:
            # Without gradients from block to block, the graph of the score starts here.
            tokens = tokens if self.plan.gradients else tokens.detach().requires_grad_()
            self.last_tokens = tokens
        if self.plan.local_scores:
            self.runs.append(run)
            self.entered.append(entered.detach())
            self.left.append(tokens)
            self.rests.append(output[1:] if isinstance(output, tuple) else None)
        if self.last_tokens is None:
            tokens = self.chain.leave(position, tokens)
        return tokens if self.leaves_tokens else (tokens, *output[1:])

    def forget_tokens(self) -> None:
        """Free the blocks' tokens, which only what the head reads and the layers' own scores are computed from."""
        self.entered, self.left, self.last_tokens = [], [], None
        self.chain.taps, self.top = {}, None

    def _watch_addition(self, output: Tensor, block: int) -> None:
        made = self.outputs[-1] if self.calls and self.calls[-1].block == block else None
        # Where the graph or the attention is missing, `check_calls` says so.
        if isinstance(made, GradientEdge) and self._entrance is not None and self._entered is not None:
            watch_addition(output, self._entrance, made, self._entered, self.descent)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Answer an attention call, and record it; `None` if a product of weights and values is no attention."""
        inputs = Inputs.of(*args, **kwargs)
        if inputs.key is None and not self._is_attention(inputs):
            return None
        call = self._record(inputs)
        if not self.plan.gradients:
            return self._kept(call, inputs)
        query = inputs.query
        starts_here = not query.requires_grad or (not self.leaves and self.first_tokens is None)
        if starts_here:
            query = query.detach().requires_grad_()
        if starts_here or not self.leaves:
            self.leaves.append(get_gradient_edge(query))
        output = attended(inputs._replace(query=query), call, self.descent)
        self.outputs.append(get_gradient_edge(output) if output.requires_grad else None)
        if self.plan.local_scores:
            call.prefix = self._prefix(output, call)
        return output

    def leave_out_unread(self, total: Tensor) -> None:
        """Forget the pools and class attention after the last block that a score does not depend on."""
        while self.calls and (self.calls[-1].is_pool or self.calls[-1].is_class) and self.calls[-1].block is None:
            if gradient_of(total, self.outputs[-1]) is not None:
                return
            self.calls.pop()
            self.outputs.pop()

    def leave_out_upper(self, total: Tensor) -> None:
        """Forget the last blocks, if a score reads lower ones and nothing of these."""
        if self.read and gradient_of(total, self.score_start) is None:
            top = self.read.pop()
            self.top = self.chain.taps[top]
            self.calls = [call for call in self.calls if call.block is not None and call.block <= top]
            self.outputs = self.outputs[: len(self.calls)]

    def check_calls(self) -> None:
        """Raise `UnsupportedNetworkError` unless the calls are one chain of layers that gradients can pass through."""
        require_one_chain(self.calls, self.plan.layout)
        require_followed(self.calls, self.plan.gradients)

    def _kept(self, call: AttentionCall, inputs: Inputs) -> Tensor:
        """Answer without a graph from block to block, and keep the inputs for a visit after the forward pass."""
        query, key, value, mask, _ = inputs
        call.inputs = query.detach(), None if key is None else key.detach(), value.detach(), mask
        output = inputs.attend().detach()
        if self.plan.local_scores:
            call.prefix = self._prefix(output, call)
        # An attention-pool head, or any layer if the blocks are not known, may be where the score's graph starts.
        self.outputs.append(output.requires_grad_() if call.block is None else None)
        return output

    def _prefix(self, output: Tensor, call: AttentionCall) -> Tensor:
        # A view would keep the whole output alive.
        return output[:, :, : self.plan.layout.prefix_at(call.block or 0)].detach().clone()

    def _is_attention(self, inputs: Inputs) -> bool:
        """Return whether weights and values that the network multiplies are those of a block, or of a pool after it."""
        if self._block is None and self.plan.layout.blocks:
            queries, keys = inputs.query.shape[-2:]
            return self.last_tokens is not None and queries != keys and keys in self.token_counts
        return True

    def _record(self, inputs: Inputs) -> AttentionCall:
        # There is a value for each key.
        query, key = inputs.query, inputs.value if inputs.key is None else inputs.key
        if inputs.key is None:
            warn_of_memory()
            require_shares(query, blind_to_sign(self.plan.groups))
        step = self.plan.steps[self._block] if self.plan.steps and self._block is not None else None
        if step is not None:
            require_windows(query, key, step, self._batch, self._block)
        elif query.dim() != 4 or len(query) != self._batch:
            raise UnsupportedNetworkError(
                f"an attention call has queries of shape {tuple(query.shape)} for {self._batch} images: windowed "
                "attention does not connect all tokens, and can be explained where it is known which tokens are in a "
                "window, as in the families of docs/networks.md. Use a ViT with global attention"
            )
        self.dtype = query.dtype
        queries, keys = (query.shape[-2], key.shape[-2]) if step is None else (step.above.tokens, step.tokens)
        is_class = step is None and self._is_class(queries, keys)
        queries = keys if is_class else queries
        # Queries that are not computed from the tokens belong to a pool, which may have as many of them as tokens.
        is_latent = self._block is None and key.requires_grad and not query.requires_grad
        call = AttentionCall(
            index=len(self.calls),
            block=self._block,
            scale=inputs.scale,
            queries=queries,
            keys=keys,
            is_pool=(step is None and queries != keys) or (is_latent and not is_class),
            follows=any(each.requires_grad for each in (query, key, inputs.value)),
            values=weakref.ref(inputs.value),
            step=step,
            shares=self._shares,
            is_class=is_class,
            is_recorded=torch.is_grad_enabled(),
        )
        if self._block is not None and self.calls and self.calls[-1].block == self._block:
            self._require_at_once(call, inputs)
        self.calls.append(call)
        follows_blocks = self.last_tokens is not None and any(each.block is not None for each in self.calls)
        if call.is_pool and follows_blocks and keys != self.tokens:
            assert self.last_tokens is not None
            require_no_prefix(key, self.last_tokens, self.plan.layout.prefix_tokens)
        return call

    def _is_class(self, queries: int, keys: int) -> bool:
        """Return whether prefix tokens alone attend, in a block or in a layer after the last one."""
        layout, block = self.plan.layout, len(self.plan.layout.blocks) if self._block is None else self._block
        is_layer = self._block is not None or (self.last_tokens is not None and layout.prefix_from == block)
        return is_layer and 0 < queries < keys and queries == layout.prefix_at(block)

    def _require_at_once(self, call: AttentionCall, inputs: Inputs) -> None:
        """Refuse a block that attends again, unless to the same tokens as before, side by side with its other calls."""
        name = f"block {call.block} of {len(self.plan.layout.blocks)} calls attention several times"
        if not self.plan.gradients:
            raise UnsupportedNetworkError(
                f"{name}: whether side by side or one after the other is seen by gradients alone. Ask for a method "
                "that needs gradients too (gmarpp_l1)"
            )
        # Sums save no tensors, which a block that runs again would miss.
        total = torch.stack([each.sum() for each in inputs[:3] if each is not None]).sum()
        earlier = [each for each in self.calls if each.block == call.block]
        if any(gradient_of(total, self.outputs[each.index]) is not None for each in earlier):
            raise UnsupportedNetworkError(
                f"{name}, one after the other: describe each as a block of its own in gmarpp.Architecture(..., "
                "blocks=...)"
            )
        blind = blind_to_sign(self.plan.groups)
        if blind and any(each.values() is inputs.value for each in earlier):
            raise UnsupportedNetworkError(
                f"{name} with the same values, as differential attention does, which subtracts one from the other: "
                f"{', '.join(blind)} would add them. Ask for methods of products with the gradient (gmarpp_l1, "
                "gmarpp_sum, chefer, legrad)"
            )
