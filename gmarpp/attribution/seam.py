"""The seam: `torch.nn.functional.scaled_dot_product_attention`, replaced while a network is explained.

Every network that attends through this function is followed without code for its family, and keeps its fused kernels.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Handler = Callable[..., Tensor]
"""Takes what `scaled_dot_product_attention` takes and answers in its place."""

fused_attention = F.scaled_dot_product_attention
# The function and the fast path of `nn.MultiheadAttention` belong to the process: calls of `explain` take turns.
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
def intercepted(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Replace the function, and restore it also after an error; other threads' calls go to the original one.

    The fast path of `nn.MultiheadAttention` and compiled code, which would go past it, are off meanwhile.

    Yields:
        outputs of modules that attended without the function, by their names; filled while the network runs.
    """
    unseen: dict[str, Tensor] = {}
    with _one_at_a_time, torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        fast_path, original = torch.backends.mha.get_fastpath_enabled(), F.scaled_dot_product_attention
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                hooks.callback(module.register_forward_pre_hook(_relay).remove)
                hooks.callback(module.register_forward_hook(_watch_weights(name, unseen), with_kwargs=True).remove)
            elif getattr(module, "fused_attn", True) is False:
                hooks.callback(module.register_forward_hook(_watch(name, unseen)).remove)
        torch.backends.mha.set_fastpath_enabled(False)
        F.scaled_dot_product_attention = _attend
        try:
            yield unseen
        finally:
            F.scaled_dot_product_attention = original
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _relay(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hand `nn.MultiheadAttention` tokens that are contiguous once it has transposed them.

    Else its projection, with weights that are frozen, becomes a product per image, each with a copy of the weights:
    several times the time of the whole network, in the backward pass above all.
    """
    query = args[0] if args else None
    if not layer.batch_first or query is None or query.dim() != 3 or any(each is not query for each in args[1:3]):
        return None
    relaid = query.transpose(0, 1).contiguous().transpose(0, 1)
    return tuple(relaid if each is query else each for each in args)


def _watch(name: str, unseen: dict[str, Tensor]) -> Callable[..., None]:
    def watch(_: nn.Module, __: object, output: Any) -> None:
        if is_intercepted():
            unseen[name] = output[0] if isinstance(output, tuple) else output

    return watch


def _watch_weights(name: str, unseen: dict[str, Tensor]) -> Callable[..., None]:
    """Return a hook for `nn.MultiheadAttention`, which attends without the function if asked for its weights."""
    watch = _watch(name, unseen)

    def watch_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("need_weights", args[4] if len(args) > 4 else True):
            watch(module, args, output)

    return watch_weights
