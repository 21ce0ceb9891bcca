"""The part of a state dict that is a network's, under whatever the training that saved it put before its names."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# What wrappers and training scripts put before every name of a network's weights.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "timm_model.")
# What torch.compile, activation checkpointing and FSDP put into names, wherever a module is wrapped.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what wrappers put before all its names, such as `module.` and `_orig_mod.`."""
    bare = {str(key): value for key, value in state.items()}
    while bare and (found := next((each for each in PREFIXES if all(key.startswith(each) for key in bare)), None)):
        bare = {key.removeprefix(found): value for key, value in bare.items()}
    return bare


def part_of_network(state: Mapping[str, Tensor], names: Iterable[str], origin: str) -> dict[str, Tensor]:
    """Return a network's part of a state dict, under the network's own names.

    It is what stands under the prefix under which all of the names are found, or else most of them. Where a few are
    missing or unknown under it, comparing the part with the network says so.

    Args:
        state: of a training, which may hold other networks, losses and metrics.
        names: of the network's weights.
        origin: the file, for messages.

    Raises:
        ValueError: several parts fit, and they are not equal.
    """
    wanted = set(names)
    if state.keys() == wanted:
        return dict(state)
    found = _counted(state, wanted)
    if max(found.values(), default=0) < len(wanted):
        # Wrapped modules inside the network have longer names, unless the network itself holds such wrappers.
        bare = {_unwrapped(key): value for key, value in state.items()}
        if len(bare) == len(state) and all(_unwrapped(name) == name for name in wanted):
            state, found = bare, _counted(bare, wanted)
    most = max(found.values(), default=0)
    if 2 * most < len(wanted):
        return without_prefix(state)
    parts = {
        prefix: {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        for prefix, count in found.items()
        if count == most
    }
    first, *others = parts.values()
    if any(not _equal(first, other) for other in others):
        one = next(iter(parts))
        raise ValueError(
            f"{origin} holds {len(parts)} networks that fit, under {', '.join(map(repr, parts))}: save the one to use "
            f"in a file of its own, as torch.save({{key: value for key, value in state_dict.items() if "
            f"key.startswith({one!r})}}, 'network.pth')"
        )
    return first


def _unwrapped(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _counted(state: Mapping[str, Tensor], wanted: set[str]) -> Counter[str]:
    """Return under which prefixes how many of the wanted names are found."""
    starts = {key: [0, *(place + 1 for place, letter in enumerate(key) if letter == ".")] for key in state}
    return Counter(key[:start] for key, places in starts.items() for start in places if key[start:] in wanted)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
