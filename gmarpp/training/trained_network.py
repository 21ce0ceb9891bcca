"""The network in anyone's LightningModule: what makes logits of images."""

import inspect
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from gmarpp.network.modes import evaluation_mode


def trained_network(module: L.LightningModule, images: Tensor, name: str | None = None) -> nn.Module:
    """Return the network that a module trains, which is left as it was.

    It is what the module's `forward` makes of images, or its only module with parameters, where it has no `forward`
    that takes images alone. Where that does no more than hand the images to another module inside and its output back,
    it is the innermost such one.

    Args:
        module: anyone's.
        images: (B, C, H, W), on the module's device, to run it with.
        name: the network's dotted name in the module, if it is not to be searched.

    Raises:
        ValueError: there is no module of that name, or none that makes logits of images; with what to write.
    """
    if name is not None:
        return named_network(module, name)
    outer = network_in(module)
    handed: list[tuple[nn.Module, Any]] = []

    def note(inner: nn.Module, given: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        values = [each for each in (*given, *options.values()) if each is not None]
        if len(values) == 1 and _same(values[0], images):
            handed.append((inner, output))

    hooks = [inner.register_forward_hook(note, with_kwargs=True) for inner in outer.modules()]
    try:
        with torch.compiler.set_stance("force_eager"), evaluation_mode(outer), torch.no_grad():
            logits = _logits(outer(images))
    except Exception as error:
        raise ValueError(
            f"{type(outer).__name__} got images alone from the monitor and failed ({type(error).__name__}: {error}): "
            f"{_remedy(module)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(outer).__name__}: expected logits (images, classes) of images, got {given}: {_remedy(module)}"
        )
    # Inner modules return before outer ones.
    return next((inner for inner, output in handed if _logits(output) is logits), outer)


def network_in(module: L.LightningModule) -> nn.Module:
    """Return a module itself where its `forward` takes images alone, else its only module with parameters.

    Raises:
        ValueError: it has several or none; with what to write.
    """
    return module if _takes_images(module) else _only_network(module)


def named_network(module: L.LightningModule, name: str) -> nn.Module:
    """Return the network of a dotted name.

    Raises:
        ValueError: there is none.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(child for child, _ in module.named_children())
        raise ValueError(
            f"AttributionMonitor.network: unknown module {name!r} of {type(module).__name__}: choose from {known}, or "
            "from the modules inside them"
        ) from error


def _takes_images(module: L.LightningModule) -> bool:
    if type(module).forward is L.LightningModule.forward:
        return False
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    return True


def _only_network(module: L.LightningModule) -> nn.Module:
    names = _parts_with_parameters(module)
    if len(names) != 1:
        raise ValueError(
            f"{type(module).__name__} has no forward that takes images alone, and {len(names)} modules with parameters "
            f"({', '.join(names)}): {_remedy(module)}"
        )
    return module.get_submodule(names[0])


def _parts_with_parameters(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if next(child.parameters(), None) is not None]


def _remedy(module: nn.Module) -> str:
    example = next(iter(_parts_with_parameters(module)), "net")
    return (
        "write a forward from images to logits, or name the module that has one: "
        f"AttributionMonitor(network={example!r})"
    )


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _same(given: object, images: Tensor) -> bool:
    return given is images or (
        isinstance(given, Tensor)
        and given.shape == images.shape
        and given.dtype == images.dtype
        and torch.equal(given, images)
    )
