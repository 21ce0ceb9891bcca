"""The seam: `torch.nn.functional.scaled_dot_product_attention`, replaced while a network is explained.

A network that attends through this function can be followed without code for its family, and keeps its fused kernels.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Handler = Callable[..., Tensor]
"""Takes the arguments of `scaled_dot_product_attention` and answers in its place."""

fused_attention = F.scaled_dot_product_attention
# All threads share the function and the fast path of `nn.MultiheadAttention`, so calls of `explain` take turns.
_one_at_a_time = threading.RLock()


class _Thread(threading.local):
    """What answers attention calls of a thread: `None` for the original function, as in all threads at first."""

    handler: Handler | None = None


_thread = _Thread()


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    return (_thread.handler or fused_attention)(*args, **kwargs)


def is_intercepted() -> bool:
    """Return whether attention calls of this thread are answered by a handler."""
    return _thread.handler is not None


@contextmanager
def answered_by(handler: Handler | None) -> Iterator[None]:
    """Let a handler answer this thread's attention calls, or the original function; effective inside `intercepted`."""
    before, _thread.handler = _thread.handler, handler
    try:
        yield
    finally:
        _thread.handler = before


@contextmanager
def intercepted(model: nn.Module) -> Iterator[None]:
    """Replace the function, and restore it even after an error; other threads still call the original.

    The fast path of `nn.MultiheadAttention` and compiled code, which would bypass it, are off meanwhile.
    """
    with _one_at_a_time, torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        fast_path, original = torch.backends.mha.get_fastpath_enabled(), F.scaled_dot_product_attention
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and module.batch_first:
                hooks.callback(module.register_forward_pre_hook(_relay).remove)
        torch.backends.mha.set_fastpath_enabled(False)
        F.scaled_dot_product_attention = _attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _relay(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give `nn.MultiheadAttention` tokens that are contiguous after it has transposed them.

    Otherwise its projection, whose weights are frozen, becomes a product per image, each with a copy of the weights,
    which takes several times as long as the whole network, mostly in the backward pass.
    """
    query = args[0] if args else None
    if query is None or query.dim() != 3 or any(each is not query for each in args[1:3]):
        return None
    relaid = query.transpose(0, 1).contiguous().transpose(0, 1)
    return tuple(relaid if each is query else each for each in args)
