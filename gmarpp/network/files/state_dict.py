"""The match between weights and a network: by name, shape and type."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from gmarpp.files import first_line
from gmarpp.network.files.weights import Weights

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@contextmanager
def at_most_parameters(limit: int) -> Iterator[None]:
    """End the building of a network in this thread when it has had more parameters than a limit."""
    count, thread = 0, threading.get_ident()

    def register(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError(f"it would have more than {limit} parameters, and the file holds far fewer")

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def to_layout_of(model: nn.Module, weights: Weights, resample: bool = False) -> dict[str, Tensor]:
    """Return weights under the names that a network has; those of other sizes are resampled only if asked for."""
    current = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or (weights.state.keys() == current.keys() and not resample):
        return dict(weights.state)
    try:
        state: dict[str, Tensor] = dict(convert(dict(weights.state), model))
    # The weights alone decide which kind of error is raised here.
    except Exception as error:
        raise ValueError(
            f"{weights.origin} does not fit {_architecture(model)} ({first_line(error)}): name the architecture that "
            "it was saved from"
        ) from error
    for key, value in weights.state.items():
        # Timm guesses the size that an embedding was made for, and resamples some that fit as they are.
        fits = key in current and value.shape == current[key].shape
        if key in state and (fits or (not resample and value.numel() != state[key].numel())):
            state[key] = value
    return state


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture", type(model).__name__))


def require_same_layout(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Require names, shapes and types of weights to be a network's.

    Raises:
        ValueError: naming some weights of each kind of difference.
    """
    current = model.state_dict()
    missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
    problems = [
        f"{len(keys)} {what} ({some(keys)})" for what, keys in (("missing", missing), ("unknown", extra)) if keys
    ]
    both = sorted(current.keys() & state.keys())
    shapes = [key for key in both if current[key].shape != state[key].shape]
    problems += [f"{key}: expected {tuple(current[key].shape)}, got {tuple(state[key].shape)}" for key in shapes[:3]]
    types = [key for key in both if (current[key].dtype in FLOATS) != (state[key].dtype in FLOATS)]
    problems += [f"{key}: expected {current[key].dtype}, got {state[key].dtype}" for key in types[:1]]
    if problems:
        what = "architecture that it was saved from" if missing or extra else "options that it was saved with"
        remedy = f"give the {what}"
        raise ValueError(f"{origin} does not fit {_architecture(model)}: {'; '.join(problems)}; {remedy}")


def some(keys: list[str]) -> str:
    """Return the first few of some names, for a message."""
    return f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load weights that must be a network's by name, shape and type, and finite.

    Raises:
        ValueError: naming the weight that is not.
    """
    require_same_layout(model, state, origin)
    model.load_state_dict(state)
    require_finite(model, origin)


def require_finite(model: nn.Module, origin: str) -> None:
    """Require a network's weights to be finite numbers.

    Raises:
        ValueError: naming the weight that is not, and its file.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        # A buffer may be a mask of infinite values.
        if not (value.isfinite() if name in parameters else ~value.isnan()).all():
            raise ValueError(
                f"{origin}: {name} holds values that are not finite numbers, so the network's output would not be any "
                "either: the file is damaged, or training diverged; use an earlier checkpoint"
            )
