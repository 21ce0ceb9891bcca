"""Which networks are known: what describes a network of a family, whatever wraps it.

A network of no family that is listed here is described by hand with `Architecture`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import nn

from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.families import convolutional, encoders, hiera, levit, mvit, pooled, reduced, sam, stages
from gmarpp.network.families.refused import REFUSED, refusal


def _in_stages(describe: Callable[[Any], stages.Stages]) -> Callable[[Any], Architecture]:
    return lambda model: Architecture(**vars(describe(model)))


_IN_STAGES = (
    *(*stages.FAMILIES, *reduced.FAMILIES, *pooled.FAMILIES, *levit.FAMILIES, *convolutional.FAMILIES),
    *(*hiera.FAMILIES, *sam.FAMILIES, *mvit.FAMILIES),
)
FAMILIES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Architecture]], ...] = (
    *encoders.FAMILIES,
    *((matches, _in_stages(describe)) for matches, describe in _IN_STAGES),
)
"""How a network is told to be of a family, and what describes it, in the order in which they are asked."""


def architecture_of(model: nn.Module) -> Architecture:
    """Describe a network of a known family, or the only one inside another: timm, torchvision, transformers, open_clip.

    What a wrapper adds, such as a head of its own, is no part of the description.

    Raises:
        UnsupportedNetworkError: if there is no such network, or more than one; the message says what to do.
    """
    known = list(_known_networks(model))
    if not known:
        raise _unknown(model)
    if len(known) > 1:
        names = [f"{name} ({type(network).__name__})" for name, network, _ in known]
        raise UnsupportedNetworkError(
            f"{type(model).__name__} holds {len(known)} networks of known families: {', '.join(names)}. Name the one "
            f"to explain: architecture=gmarpp.architecture_of(model.get_submodule({known[0][0]!r}))"
        )
    ((name, network, describe),) = known
    layout = describe(network)
    return layout if name == "" else replace(layout, head=None)


def resolve_architecture(
    given: Architecture | Callable[[nn.Module], Architecture] | str | None, model: nn.Module
) -> Architecture | None:
    """Return the architecture that an option means for a network; `None` where it is left to be found.

    Args:
        given: an architecture; a function from the network to one; the path of such a function, as
            `my_code.describe`; or the dotted name of the network of a known family inside the network.
        model: the network.

    Raises:
        ValueError: nothing has such a name, or what it names returns no architecture.
        UnsupportedNetworkError: the network of that name is of no known family.
    """
    if given is None or isinstance(given, Architecture):
        return given
    if isinstance(given, str):
        if given in (inside := dict(model.named_modules())):
            return architecture_of(inside[given])
        given = _imported(given, model)
    described = given(model)
    if not isinstance(described, Architecture):
        raise ValueError(
            f"architecture: expected a function from {type(model).__name__} to gmarpp.Architecture, got one to "
            f"{type(described).__name__}"
        )
    return described


def _imported(path: str, model: nn.Module) -> Callable[[nn.Module], Any]:
    module, _, name = path.rpartition(".")
    try:
        function: Callable[[nn.Module], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"unknown architecture {path!r}: expected the name of a module inside {type(model).__name__}, or the path "
            f"of a function from it to gmarpp.Architecture, such as my_code.describe ({error})"
        ) from error
    return function


def _unknown(model: nn.Module) -> UnsupportedNetworkError:
    if (named := refusal(model)) is not None:
        return named
    kinds = {type(module).__name__.lower() for module in model.modules()}
    if not any(word in kind for kind in kinds for word in ("attention", "attn", "transformer")):
        return UnsupportedNetworkError(
            f"{type(model).__name__} is not known to attend between places of the image: these methods explain Vision "
            "Transformers. One whose modules have other names is described by architecture=gmarpp.Architecture(...)"
        )
    return UnsupportedNetworkError(
        f"the patch grid of {type(model).__name__} is not known. If it is a ViT with global attention, pass "
        "architecture=gmarpp.Architecture(grid=..., prefix_tokens=..., blocks=...). Other networks with "
        "windowed or pyramid attention cannot be explained by these methods: use a ViT, Swin or MaxViT"
    )


def _known_networks(
    model: nn.Module, name: str = "", met: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, Callable[[Any], Architecture]]]:
    """Find the outermost networks of known families: name inside the model, network, and what describes it."""
    met = set() if met is None else met
    if model in met or type(model).__name__ in REFUSED:
        return
    met.add(model)
    describe = next((describe for matches, describe in FAMILIES if matches(model)), None)
    if describe is not None:
        yield name, model, describe
        return
    for child, network in model.named_children():
        yield from _known_networks(network, f"{name}.{child}" if name else child, met)
