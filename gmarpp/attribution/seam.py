"""Where attention is intercepted: `torch.nn.functional.scaled_dot_product_attention`, for one thread at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmarpp.attribution.narrow import Forward

# The interception replaces an attribute of a module, which all threads share.
_one_at_a_time = threading.RLock()


class Seam:
    """The interception, and whose calls it is for.

    Args:
        replacement: of `scaled_dot_product_attention`; it leaves to `_original` what is not for it.
    """

    def __init__(self, replacement: Callable[..., Tensor]) -> None:
        self._replacement: Callable[..., Tensor] = replacement
        self._original: Callable[..., Tensor] = F.scaled_dot_product_attention
        self._passing = False
        self._probing = False
        self._thread = 0

    @property
    def is_here(self) -> bool:
        """Whether it is the intercepting thread that asks."""
        return threading.get_ident() == self._thread

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Replace `torch.nn.functional.scaled_dot_product_attention`, and restore it also after an error.

        The fast path of `nn.MultiheadAttention` and compiled code, which would bypass it, are off meanwhile.
        """
        with _one_at_a_time, torch.compiler.set_stance("force_eager"):
            fast_path = torch.backends.mha.get_fastpath_enabled()
            self._original, self._thread = F.scaled_dot_product_attention, threading.get_ident()
            torch.backends.mha.set_fastpath_enabled(False)
            F.scaled_dot_product_attention = self._replacement
            try:
                yield
            finally:
                F.scaled_dot_product_attention = self._original
                torch.backends.mha.set_fastpath_enabled(fast_path)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let attention calls do what they did before the interception."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Let each query attend to its own token alone, so that tokens meet outside attention or nowhere."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def here(self, own: Forward, other: Forward) -> Forward:
        """Run `own` where the intercepting thread calls, and `other` where another does."""
        return lambda *args, **options: (own if self.is_here else other)(*args, **options)

    def claimed(self, forward: Forward) -> Forward:
        """Count a call of `forward` as the intercepting thread's, which waits while autograd's own threads run it."""

        def run(*args: Any, **options: Any) -> Any:
            waiting, self._thread = self._thread, threading.get_ident()
            try:
                return forward(*args, **options)
            finally:
                self._thread = waiting

        return run
