"""Attention that does not pass through `scaled_dot_product_attention`, and so would be missing in every map."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gmarpp.network.errors import UnsupportedNetworkError

_SOFTMAX = (torch.softmax, torch.special.softmax, torch.Tensor.softmax, F.softmax)
_RANDOM = (
    torch.rand,
    torch.randn,
    torch.randperm,
    torch.rand_like,
    torch.randn_like,
    torch.bernoulli,
    torch.multinomial,
    torch.normal,
)
_REMEDY = (
    "switch it to torch.nn.functional.scaled_dot_product_attention (model.set_attn_implementation('sdpa'), "
    "module.fused_attn = True, need_weights=False), or explain a network without it"
)


class UnseenAttention(TorchFunctionMode):
    """Notes, while a network runs, what looks like attention computed in another way.

    That is a softmax over tokens, and `nn.MultiheadAttention` that returns its weights. Random numbers, by which
    networks shuffle or mask their patches, are refused at once: no token could be traced to its patch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._met: list[tuple[int | None, Tensor]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function in _RANDOM:
            raise UnsupportedNetworkError(
                f"the network draws random numbers (torch.{function.__name__}) in eval mode, as networks that "
                "shuffle or mask patches do (ViTMAE): no token could be traced to its patch. Explain the network made "
                "from it for classification"
            )
        result = function(*args, **options)
        if function is F.multi_head_attention_forward and options.get("need_weights", True):
            self._met.append((None, result[0]))
        if function in _SOFTMAX:
            dim = args[1] if len(args) > 1 else options.get("dim")
            # Scores of classes have two dimensions: images and classes.
            if isinstance(dim, int) and result.dim() > 2:
                self._met.append((result.shape[dim], result))
        return result

    def require_none(self, scores: Tensor, token_counts: Iterable[int]) -> None:
        """Refuse a network whose scores depend on attention that was not seen.

        Args:
            scores: shape (B,).
            token_counts: numbers of tokens that it may have attended to.

        Raises:
            UnsupportedNetworkError: naming what was met.
        """
        counts = set(token_counts)
        for size, result in self._met:
            # Below the first layer that gradients reach, everything counts.
            if (size is None or size in counts) and not (result.requires_grad and _is_unused(scores, result)):
                what = (
                    "has an nn.MultiheadAttention that returns its weights (need_weights=True)"
                    if size is None
                    else f"takes a softmax over {size} tokens"
                )
                raise UnsupportedNetworkError(
                    f"the network {what}: attention that does not pass through "
                    f"torch.nn.functional.scaled_dot_product_attention, and would be missing in the maps: {_REMEDY}"
                )


def _is_unused(scores: Tensor, result: Tensor) -> bool:
    """Return whether no path of the graph leads from the scores to a result."""
    waiting = [scores.grad_fn]
    seen: set[object] = set()
    while waiting:
        node = waiting.pop()
        if node is result.grad_fn:
            return False
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
    return True
