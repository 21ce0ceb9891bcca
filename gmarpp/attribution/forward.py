"""The forward pass: it answers and records attention calls, and keeps what the ways down start from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmarpp.attribution.attend import Inputs, attended
from gmarpp.attribution.call import AttentionCall, require_one_chain
from gmarpp.attribution.descent import Descent
from gmarpp.attribution.plan import Plan
from gmarpp.attribution.unseen import UnseenAttention
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
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens


CUT = (
    "a part that runs under torch.no_grad, detaches its input or is quantized ends all gradients: run it with "
    "gradients, or ask for methods that need none (rollout, attention)"
)


class ForwardPass:
    """Answers the attention calls of a forward pass, and keeps what the ways down start from.

    Attributes:
        calls: the attention calls, from the input upward.
        outputs: of each call, where its output stands in the graph.
        leaves: the queries in which the graph starts.
        runs: of each block, if the layers' own scores are wanted.
        entered: the tokens that each block was given, (B, N, D), if these scores are wanted; without a graph.
        left: the tokens that left each block, if these scores are wanted; with a graph where gradients pass from block
            to block.
        reads_prefix: whether the architecture's head is known to read prefix tokens only.
        leaves_tokens: whether the block that ran last returned tokens alone.
        last_tokens: what left the last block, (B, N, D), if the blocks are known.
        dtype: in which the network attends.
        unseen: attention that bypassed the interception.

    Args:
        plan: what the call of `explain` will do.
        descent: the way down that the graph's nodes hand their layers to.
        batch: number of images.
    """

    def __init__(self, plan: Plan, descent: Descent, batch: int) -> None:
        self.plan, self.descent = plan, descent
        self.calls: list[AttentionCall] = []
        self.outputs: list[GradientEdge | Tensor | None] = []
        self.leaves: list[Tensor] = []
        self.runs: list[BlockRun] = []
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        self.reads_prefix = self.leaves_tokens = False
        self.last_tokens: Tensor | None = None
        self.dtype = torch.float32
        self.unseen = UnseenAttention()
        self._batch = batch
        self._block: int | None = None

    @property
    def token_counts(self) -> set[int]:
        """How many tokens an attention layer of the network may attend to."""
        tokens = self.calls[-1].keys
        return {tokens, tokens - self.plan.layout.prefix_tokens} - {0, 1}

    @property
    def score_start(self) -> GradientEdge | Tensor | None:
        """Where the graph of the score alone begins: at the last tokens, or at the output of the top call."""
        if self.last_tokens is not None and not self.calls[-1].is_pool:
            return self.last_tokens
        return self.outputs[-1]

    def enter_block(self, position: int) -> None:
        """Note the block that the next attention calls belong to."""
        self._block = position

    def leave_block(self, position: int, run: BlockRun, entered: Tensor, output: Any) -> Any:
        """Record what a block was given and returned, and return what the network continues with."""
        self._block, tokens = None, tokens_of(output)
        self.leaves_tokens = isinstance(output, Tensor)
        if position == len(self.plan.layout.blocks) - 1:
            # Without gradients from block to block, the graph of the score starts here.
            tokens = tokens if self.plan.gradients else tokens.detach().requires_grad_()
            self.last_tokens = tokens
        if self.plan.local_scores:
            self.runs.append(run)
            self.entered.append(entered.detach())
            self.left.append(tokens)
        return tokens if self.leaves_tokens else (tokens, *output[1:])

    def forget_tokens(self) -> None:
        """Free the blocks' tokens, which only what the head reads and the layers' own scores are computed from."""
        self.entered, self.left, self.last_tokens = [], [], None

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer an attention call, and record it."""
        inputs = Inputs.of(*args, **kwargs)
        call = self._record(inputs)
        if not self.plan.gradients:
            return self._kept(call, inputs)
        query = inputs.query
        if not query.requires_grad or not self.leaves:
            query = query.detach().requires_grad_()
            self.leaves.append(query)
        output = attended(inputs._replace(query=query), call, self.descent)
        self.outputs.append(get_gradient_edge(output) if output.requires_grad else None)
        if self.plan.local_scores:
            call.prefix = self._prefix(output)
        return output

    def check_calls(self) -> None:
        """Raise `UnsupportedNetworkError` unless the calls are one chain of layers that gradients can pass through."""
        require_one_chain(self.calls, len(self.plan.layout.blocks))
        cut = [call.index for call in self.calls[1:] if not call.follows]
        if self.plan.gradients and cut:
            raise UnsupportedNetworkError(
                f"no gradient passes from attention layer {cut[-1]} to the one below, which these methods need: {CUT}"
            )

    def _kept(self, call: AttentionCall, inputs: Inputs) -> Tensor:
        """Answer without a graph from block to block, and keep the inputs for a visit after the forward pass."""
        query, key, value, mask, _ = inputs
        call.inputs = query.detach(), key.detach(), value.detach(), mask
        output = inputs.attend().detach()
        if self.plan.local_scores:
            call.prefix = self._prefix(output)
        # An attention-pool head, or any layer if the blocks are not known, may be where the score's graph starts.
        self.outputs.append(output.requires_grad_() if call.block is None else None)
        return output

    def _prefix(self, output: Tensor) -> Tensor:
        # A view would keep the whole output alive.
        return output[:, :, : self.plan.layout.prefix_tokens].detach().clone()

    def _record(self, inputs: Inputs) -> AttentionCall:
        query, key = inputs.query, inputs.key
        if query.dim() != 4 or len(query) != self._batch:
            raise UnsupportedNetworkError(
                f"an attention call has queries of shape {tuple(query.shape)} for {self._batch} images: windowed "
                "attention (Swin, for example) does not connect all tokens, and cannot be explained by these methods. "
                "Use a ViT with global attention"
            )
        self.dtype = query.dtype
        queries, keys = query.shape[-2], key.shape[-2]
        # Queries that are not computed from the tokens belong to a pool, which may have as many of them as tokens.
        is_latent = self._block is None and key.requires_grad and not query.requires_grad
        follows = any(each.requires_grad for each in inputs[:3])
        call = AttentionCall(
            len(self.calls), self._block, inputs.scale, queries, keys, queries != keys or is_latent, follows
        )
        self.calls.append(call)
        return call
