"""Building timm networks with random weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmarpp.files import first_line
from gmarpp.network.preprocessing import _pair, set_preprocessing

# Timm's own options of create_model that read files, or the network, in place of building a model.
FACTORY_OPTIONS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}

_draws_weights = ContextVar("draws_weights", default=True)


class _Undrawn(TorchFunctionMode):
    """Leaves memory as it is where random weights would be drawn into it."""

    _DRAWS = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in self._DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return func(*args, **options)


@contextmanager
def undrawn_weights() -> Iterator[None]:
    """Have `build_model` draw no random weights, which takes seconds: for networks that are given all theirs next."""
    before = _draws_weights.set(False)
    try:
        yield
    finally:
        _draws_weights.reset(before)


def require_known(architecture: str) -> None:
    """Require a name of timm's, with or without the tag of its weights.

    Raises:
        ValueError: naming those close to it.
    """
    try:
        timm.get_pretrained_cfg(architecture, allow_unregistered=False)
    except RuntimeError as error:
        name = architecture.partition(".")[0]
        known = timm.list_pretrained(f"{name}.*") if timm.is_model(name) else timm.list_models()
        close = ", ".join(get_close_matches(architecture, known, cutoff=0.4)) or "see timm.list_models()"
        raise ValueError(f"unknown architecture {architecture!r}; close names: {close}") from error


def build_model(
    architecture: str,
    num_classes: int,
    image_size: int | Sequence[int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a timm network with random weights; no network access.

    Args:
        architecture: timm's name, with or without a pretrained tag. The tag decides the preprocessing.
        num_classes: outputs of the head; 0 for none.
        image_size: side or (height, width) in pixels; the architecture's own when `None`.
        model_args: further options of the timm model, such as `global_pool`, and `layer_norm_eps`.
        drop_path: largest probability of stochastic depth, in [0, 1).

    Raises:
        ValueError: unknown architecture, an option that it does not have or that would read other files, or a size that
            its patches do not divide.
    """
    if refused := FACTORY_OPTIONS & set(model_args or {}):
        raise ValueError(
            f"model_args holds {', '.join(sorted(refused))}, which would read other files or the Hub: take it out, and "
            "name start weights with --model.weights"
        )
    require_known(architecture)
    options = dict(model_args or {})
    epsilon = options.pop("layer_norm_eps", None)
    if epsilon is not None:
        options["norm_layer"] = partial(LayerNorm, eps=epsilon)
    size = None if image_size is None else _pair(image_size)
    try:
        with nullcontext() if _draws_weights.get() else _Undrawn():
            model = timm.create_model(
                architecture, num_classes=num_classes, img_size=size, drop_path_rate=drop_path or None, **options
            )
        set_preprocessing(model, {})
    except Exception as error:  # of whatever kind: it depends on the option and on the network
        raise ValueError(
            f"{architecture} cannot be built with image_size={size} and {options}: {first_line(error)}"
        ) from error
    patch = _pair(model.patch_embed.patch_size) if hasattr(model, "patch_embed") else (1, 1)
    if size is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise ValueError(
            f"image_size {size[0]}x{size[1]} is not a multiple of {architecture}'s {patch[0]}-pixel patches"
        )
    model.model_args = dict(model_args or {})
    model.classes, model.class_names = (), ()
    built: nn.Module = model
    return built
