"""Attention that a network writes out: a softmax over keys, and a product of what comes of it with the values.

Where the two meet, the matrix is visible, and the product is handed to what answers fused attention too. All other
attention would be missing in every map, and is refused.
"""

import re
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gmarpp.network.errors import UnsupportedNetworkError

Answer = Callable[..., Tensor | None]
"""Takes what `scaled_dot_product_attention` does; or the weights (B, H, Q, N), `None` and the values (B, H, N, d), and
returns their product, or `None`."""

# What networks have imported by name, before anything could be put in its place.
_FUSED = F.scaled_dot_product_attention
# Calls of `torch.ops`, among which are other libraries' kernels.
_OPERATORS = (torch._ops.OpOverloadPacket, torch._ops.OpOverload, torch._ops.HigherOrderOperator)
_ATTENTION = re.compile("attention|attn|fmha", re.IGNORECASE)
_FUSED_OPERATORS = frozenset(("aten.scaled_dot_product_attention", "aten.scaled_dot_product_attention.default"))
_SOFTMAX = frozenset((torch.softmax, torch.special.softmax, torch.Tensor.softmax, F.softmax))
_PRODUCTS = frozenset((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm))
_EINSUM = re.compile(r"(\w+)(\w)(\w),\1\3(\w)->\1\2\4")
_RANDOM = frozenset(
    (
        torch.rand,
        torch.randn,
        torch.randperm,
        torch.rand_like,
        torch.randn_like,
        torch.bernoulli,
        torch.multinomial,
        torch.normal,
    )
)
# A softmax in pieces, where no matrix is seen in whole.
_EXPONENTIALS = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor, torch.special, F)
    for name in ("exp", "exp_", "exp2", "exp2_", "expm1", "expm1_", "log_softmax", "softmin", "_softmax")
    if hasattr(owner, name)
)
_EXPONENTIAL_OPERATORS = re.compile(r"aten\._?(exp2?|expm1|(log_)?softmax)_?(\.|$)")
_KERNELS = frozenset(
    getattr(owner, name)
    for owner in (torch, torch._C._nn)
    for name in dir(owner)
    if name.startswith("_scaled_dot_product") or name in ("_flash_attention_forward", "_efficient_attention_forward")
)
_WATCHED = _RANDOM | _SOFTMAX | _EXPONENTIALS | _KERNELS | {_FUSED, F.multi_head_attention_forward}
_REMEDY = (
    "switch it to torch.nn.functional.scaled_dot_product_attention (model.set_attn_implementation('sdpa'), "
    "module.fused_attn = True, need_weights=False), or explain a network without it"
)


@dataclass(eq=False)
class _Softmax:
    """What a softmax over tokens returned, or `nn.MultiheadAttention` with its weights.

    Attributes:
        size: number of entries that sum to 1; `None` of `nn.MultiheadAttention`.
        result: where it stands in the graph, if it has one.
        is_followed: whether it was handed on as attention.
        queries: how many rows of exponentials there are; `None` of a softmax, which says by itself what it is.
    """

    size: int | None
    result: Any
    is_followed: bool = False
    queries: int | None = None


class WrittenAttention(TorchFunctionMode):
    """Follows, while a network runs, attention that it writes out, and notes what looks like other attention.

    Weights are what a softmax over the last dimension returns, and what is made of it entry by entry or head by head.
    Random numbers, by which networks shuffle or mask their patches, are refused at once: no token could be traced to
    its patch.

    Fused attention comes here where a network calls it by a name that it imported before.

    Attributes:
        is_needed: whether any attention was answered here.

    Args:
        answer: gives what answers attention calls now; `None` if they are not followed.
    """

    def __init__(self, answer: Callable[[], Answer | None]) -> None:
        super().__init__()
        self.is_needed = False
        self._answer = answer
        self._met: list[_Softmax] = []
        self._weights: MutableMapping[Tensor, list[_Softmax]] = WeakTensorKeyDictionary()
        self._is_following = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        # Most calls are none of these, and a GPU waits for each.
        if not self._is_following and function not in _WATCHED and not isinstance(function, _OPERATORS):
            return function(*args, **options)
        answer = self._answer()
        if answer is None:
            return function(*args, **options)
        is_operator = isinstance(function, _OPERATORS)
        if function is _FUSED or (is_operator and str(function) in _FUSED_OPERATORS):
            self.is_needed = True
            return answer(*args, **options)
        if function in _KERNELS or (is_operator and _ATTENTION.search(function.__name__)):
            raise UnsupportedNetworkError(
                f"the network attends through {function.__name__}, which is not followed: {_REMEDY}"
            )
        if function in _RANDOM:
            raise UnsupportedNetworkError(
                f"the network draws random numbers (torch.{function.__name__}) in eval mode, as networks that "
                "shuffle or mask patches do (ViTMAE): no token could be traced to its patch. Explain the network made "
                "from it for classification"
            )
        given = [each for each in args if isinstance(each, Tensor) and each in self._weights]
        factors = _factors(function, args) if given else None
        if factors is not None and (product := self._answered(answer, *factors)) is not None:
            return product
        result = function(*args, **options)
        if function is F.multi_head_attention_forward and options.get("need_weights", True):
            self._met.append(_Softmax(None, result[0].grad_fn))
        if function in _EXPONENTIALS or (is_operator and _EXPONENTIAL_OPERATORS.match(str(function))):
            self._note_exponentials(result)
        elif function in _SOFTMAX:
            self._note(result, args[1] if len(args) > 1 else options.get("dim"))
        elif given and factors is None and isinstance(result, Tensor) and result.numel() == given[0].numel():
            self._weights[result] = [met for each in given for met in self._weights[each]]
        return result

    def _note_exponentials(self, result: Tensor) -> None:
        # Those of parameters, such as scales of channels or heads, have no queries.
        if result.dim() > 2 and result.shape[-2] > 1:
            self._met.append(_Softmax(result.shape[-1], result.grad_fn, queries=result.shape[-2]))

    def _note(self, result: Tensor, dim: Any) -> None:
        # Scores of classes have two dimensions: images and classes.
        if isinstance(dim, int) and result.dim() > 2:
            met = _Softmax(result.shape[dim], result.grad_fn)
            self._met.append(met)
            if dim % result.dim() == result.dim() - 1:
                self._weights[result] = [met]
                self._is_following = True

    def _answered(self, answer: Answer, weights: Tensor, values: Tensor) -> Tensor | None:
        """Return the product of weights and values as attention, or `None` if it is something else."""
        origins = self._weights.get(weights, ())
        is_attention = weights.dim() in (3, 4) and weights.shape[:-2] == values.shape[:-2]
        if not is_attention or not any(met.size == weights.shape[-1] for met in origins):
            return None
        if weights.dim() == 4:
            product = answer(weights, None, values)
        else:
            by_head = answer(weights[:, None], None, values[:, None])
            product = None if by_head is None else by_head[:, 0]
        if product is not None:
            self.is_needed = True
            for met in origins:
                met.is_followed = True
        return product

    def require_none(self, scores: Tensor, token_counts: Iterable[int]) -> None:
        """Refuse a network whose scores depend on attention that was not followed.

        Args:
            scores: shape (B,).
            token_counts: numbers of tokens that it may have attended to.

        Raises:
            UnsupportedNetworkError: naming what was met.
        """
        counts = set(token_counts)
        for met in self._met:
            if {met.size, met.queries} - {None} - counts:
                continue
            # Below the first layer that gradients reach, everything counts.
            if met.is_followed if met.result is None else _is_unused(scores, met.result):
                continue
            what = (
                "has an nn.MultiheadAttention that returns its weights (need_weights=True)"
                if met.size is None
                else f"takes a softmax over {met.size} tokens, or its exponentials"
            )
            raise UnsupportedNetworkError(
                f"the network {what}: attention that does not pass through "
                f"torch.nn.functional.scaled_dot_product_attention, and would be missing in the maps: {_REMEDY}"
            )


def _factors(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Return the two factors of a product of matrices; `None` if a function is no such product."""
    if function in _PRODUCTS and len(args) == 2:
        return args[0], args[1]
    if function is torch.einsum and len(args) == 3 and _EINSUM.fullmatch(str(args[0]).replace(" ", "")):
        return args[1], args[2]
    return None


def _is_unused(scores: Tensor, result: Any) -> bool:
    """Return whether no path of the graph leads from the scores to a result, but by attention that was followed."""
    waiting = [scores.grad_fn]
    seen: set[object] = set()
    while waiting:
        node = waiting.pop()
        if node is result:
            return False
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [] if hasattr(node, "is_weights") else [below for below, _ in node.next_functions]
    return True
