"""The seam: `torch.nn.functional.scaled_dot_product_attention`, replaced while a network is explained.

A network that attends through this function can be followed without code for its family, and keeps its fused kernels.
One that writes its attention out is followed where its weights meet the values.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmarpp.attribution.written import WrittenAttention
from gmarpp.network.errors import UnsupportedNetworkError

Handler = Callable[..., Any]
"""Takes the arguments of `scaled_dot_product_attention` and answers in its place.

Attention that a network writes out comes as its weights, `None` in place of the keys, and the values; the answer is
`None` if a product is not taken for attention.
"""

fused_attention = F.scaled_dot_product_attention
# All threads share the function and the fast path of `nn.MultiheadAttention`, so calls of `explain` take turns.
one_at_a_time = threading.RLock()


# The arguments of `nn.MultiheadAttention` from the fifth on.
_NEED_WEIGHTS, _AFTER = 4, ("need_weights", "attn_mask", "average_attn_weights", "is_causal")


class _Thread(threading.local):
    """What answers attention calls of a thread: `None` for the original function, as in all threads at first.

    Attributes:
        handler: answers.
        written: hands it the attention that the network writes out.
    """

    handler: Handler | None = None
    written: WrittenAttention | None = None


_thread = _Thread()


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    handler = _thread.handler
    if handler is None:
        return fused_attention(*args, **kwargs)
    # What the handler itself calls is not the network's attention.
    _thread.handler = None
    try:
        output: Tensor = handler(*args, **kwargs)
    finally:
        _thread.handler = handler
    return output


def is_intercepted() -> bool:
    """Return whether attention calls of this thread are answered by a handler."""
    return _thread.handler is not None


@contextmanager
def answered_by(handler: Handler | None, may_be_written: bool = True) -> Iterator[WrittenAttention]:
    """Let a handler answer this thread's attention calls, or the original function; effective inside `intercepted`.

    Args:
        handler: answers; `None` for the original function.
        may_be_written: whether attention that the network writes out is followed, too: a look at every operation, so
            not where all attention is known to be fused.

    Returns:
        what follows the attention that the network writes out.
    """
    before, active = _thread.handler, _thread.written
    written = active or WrittenAttention(lambda: _thread.handler)
    is_followed = active is not None or (may_be_written and handler is not None)
    _thread.handler, _thread.written = handler, written if is_followed else None
    try:
        with written if is_followed and not active else nullcontext():
            yield written
    finally:
        _thread.handler, _thread.written = before, active


class _WeightsUsedError(UnsupportedNetworkError, AttributeError):
    """A use of weights that were not computed; an `AttributeError` too, so that they have no attributes."""

    def __init__(self, *_: Any) -> None:
        super().__init__(
            "the network computes with the weights that an nn.MultiheadAttention returns (need_weights=True): such "
            "attention cannot be followed. Pass need_weights=False, and use the attended tokens alone"
        )


class _Weights:
    """Takes the place of the weights that `nn.MultiheadAttention` returns, and of the wish for them; most are unused.

    To compute them, attention would bypass the seam.
    """

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise _WeightsUsedError

    def __getitem__(self, index: Any) -> Any:
        raise _WeightsUsedError

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise _WeightsUsedError


_WEIGHTS = _Weights()


def _without_weights(
    module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Prepare a call of `nn.MultiheadAttention`: without weights, and with relaid tokens."""
    if not is_intercepted():
        return None
    wanted = args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else options.get("need_weights", True)
    if wanted:
        args, options = args[:_NEED_WEIGHTS], {**dict(zip(_AFTER, args[_NEED_WEIGHTS:], strict=False)), **options}
        options["need_weights"] = _WEIGHTS
    return _relaid(args) if module.batch_first else args, options


def _unused_weights(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    return (output[0], _WEIGHTS) if options.get("need_weights") is _WEIGHTS else None


def _relaid(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay out tokens for `nn.MultiheadAttention` so that they are contiguous after it has transposed them.

    Otherwise its projection, whose weights are frozen, becomes a product per image, each with a copy of the weights,
    which takes several times as long as the whole network, mostly in the backward pass.
    """
    query = args[0] if args else None
    if query is None or query.dim() != 3 or any(each is not query for each in args[1:3]):
        return args
    relaid = query.transpose(0, 1).contiguous().transpose(0, 1)
    return tuple(relaid if each is query else each for each in args)


@contextmanager
def intercepted(model: nn.Module) -> Iterator[None]:
    """Replace the function, and restore it even after an error; other threads still call the original.

    The fast path of `nn.MultiheadAttention` and compiled code, which would bypass it, are off meanwhile.
    """
    with one_at_a_time, torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        fast_path, original = torch.backends.mha.get_fastpath_enabled(), F.scaled_dot_product_attention
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                hooks.callback(module.register_forward_pre_hook(_without_weights, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(_unused_weights, with_kwargs=True).remove)
        torch.backends.mha.set_fastpath_enabled(False)
        F.scaled_dot_product_attention = _attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original
            torch.backends.mha.set_fastpath_enabled(fast_path)
