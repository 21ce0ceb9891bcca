"""A network temporarily in eval mode, with frozen parameters and without activation checkpointing."""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

_checkpoint = torch.utils.checkpoint.checkpoint
_CHECKPOINT_OPTIONS = (
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
    "respect_saved_tensors_hooks",
)


class _Evaluated:
    """A network in eval mode, and the threads that use it so, each as often as it has entered.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.threads: Counter[int] = Counter()
        # A network has hundreds of modules, and a GPU waits while they are looked at.
        modules = list(model.modules())
        training = [module for module in modules if module.training]
        checkpointing: list[Any] = [module for module in modules if vars(module).get("grad_checkpointing", False)]
        with ExitStack() as restored:
            for module in training:
                restored.callback(setattr, module, "training", True)
            if training:
                model.eval()
            for module in checkpointing:
                restored.callback(setattr, module, "grad_checkpointing", True)
                module.grad_checkpointing = False
            restored.enter_context(_usable_by_autograd(modules))
            parameters = [each for module in modules for each in module._parameters.values() if each is not None]
            for parameter in [parameter for parameter in parameters if parameter.requires_grad]:
                restored.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
            restored.enter_context(_without_checkpoints(modules, self.threads))
            self.restored = restored.pop_all()


# By the network's identity: each is here only while somebody uses it.
_evaluated: dict[int, _Evaluated] = {}
_changing = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, freeze every parameter, and switch off activation checkpointing.

    All states are restored, even after an error, when the last of the threads that are here for the same network
    leaves. Checkpointed blocks would run a second time in the backward pass, without the hooks of the first. Parameters
    and buffers that were made in inference mode, which autograd cannot save, are temporarily replaced by copies.
    """
    thread = threading.get_ident()
    with _changing:
        shared = _evaluated.get(id(model))
        # A call inside another one of its thread may find the network changed by what called it.
        evaluated = _Evaluated(model) if shared is None or shared.threads[thread] else shared
        _evaluated.setdefault(id(model), evaluated)
        evaluated.threads[thread] += 1
    try:
        yield
    finally:
        with _changing:
            evaluated.threads[thread] -= 1
            if not +evaluated.threads:
                if _evaluated[id(model)] is evaluated:
                    del _evaluated[id(model)]
                evaluated.restored.close()


@contextmanager
def _usable_by_autograd(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Replace tensors made in inference mode by copies made outside it, if the caller is outside."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules if not torch.is_inference_mode_enabled() else ():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        kept += [
            (store, name, each)
            for store in stores
            for name, each in store.items()
            if each is not None and each.is_inference()
        ]
    for store, name, each in kept:
        copy = each.detach().clone()
        store[name] = nn.Parameter(copy, requires_grad=False) if isinstance(each, nn.Parameter) else copy
    try:
        yield
    finally:
        for store, name, each in kept:
            store[name] = each


@contextmanager
def _without_checkpoints(modules: Sequence[nn.Module], threads: Mapping[int, int]) -> Iterator[None]:
    """Make the network's calls of `torch.utils.checkpoint.checkpoint` in some threads run the given function directly.

    The function is replaced everywhere the network may have it from: its own module, the modules that define the
    network's classes, and the attributes of the network's modules (`apply_activation_checkpointing`).
    """

    def plain(function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        if function is None or not threads[threading.get_ident()]:
            return _checkpoint(function, *args, **options)
        return function(*args, **{name: each for name, each in options.items() if name not in _CHECKPOINT_OPTIONS})

    classes = {each for kind in {type(module) for module in modules} for each in kind.__mro__}
    files = {name: sys.modules[name] for name in {each.__module__ for each in classes} if name in sys.modules}
    places = [vars(each) for each in (torch.utils.checkpoint, *files.values(), *modules)]
    kept = [
        (place, name, each)
        for place in places
        for name, each in place.items()
        if each is _checkpoint or (type(each) is functools.partial and each.func is _checkpoint)
    ]
    for place, name, _ in kept:
        place[name] = plain
    try:
        yield
    finally:
        for place, name, each in kept:
            place[name] = each
