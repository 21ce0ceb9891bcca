"""A network's weights are found under whatever a training put before their names."""

import pytest
import torch

from gmarpp.network.files.prefix import part_of_network

NAMES = ("embed.weight", "head.weight", "head.bias")
WEIGHTS = {name: torch.full((2,), float(place)) for place, name in enumerate(NAMES)}


def prefixed(prefix, weights=WEIGHTS):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "model.", "backbone.", "net.", "x.y.0."),
        *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.backbone."),
    ],
)
@pytest.mark.parametrize("other", [{}, {"loss.weight": torch.ones(3), "teacher.fc.weight": torch.ones(1)}])
def test_any_prefix_is_taken_off_and_other_parts_are_left(prefix, other):
    found = part_of_network({**prefixed(prefix), **(other if prefix else {})}, NAMES, "x.pth")
    assert {name: value.tolist() for name, value in found.items()} == {
        "embed.weight": [0, 0],
        "head.weight": [1, 1],
        "head.bias": [2, 2],
    }


def test_wrappers_inside_names_are_taken_out():
    state = {
        "net._orig_mod.embed.weight": torch.zeros(1),
        "net.head._checkpoint_wrapped_module.weight": torch.ones(1),
        "net.head._checkpoint_wrapped_module.bias": torch.ones(1),
    }
    assert part_of_network(state, NAMES, "x.pth").keys() == set(NAMES)
    # A network that was compiled itself has such names.
    compiled = {f"_orig_mod.{name}": value for name, value in WEIGHTS.items()}
    assert part_of_network(compiled, compiled, "x.pth") == compiled


def test_what_is_missing_or_unknown_under_the_prefix_is_left_to_the_comparison():
    state = prefixed("net.", {"embed.weight": torch.ones(1), "head.weight": torch.ones(1), "extra": torch.ones(1)})
    assert part_of_network(state, NAMES, "x.pth").keys() == {"embed.weight", "head.weight", "extra"}


def test_equal_parts_are_one_and_different_ones_are_refused():
    """A network that a module holds twice is saved twice."""
    assert part_of_network(prefixed("a.") | prefixed("b."), NAMES, "x.pth").keys() == set(NAMES)
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    with pytest.raises(
        ValueError, match=r"x\.pth holds 2 networks that fit, under 'a\.', 'b\.': save the one"
    ) as error:
        part_of_network(prefixed("a.") | prefixed("b.", other), NAMES, "x.pth")
    # The advice can be followed.
    line = str(error.value).rpartition("torch.save(")[2].rpartition(", 'network.pth')")[0]
    kept = eval(line, {"state_dict": prefixed("a.") | prefixed("b.", other)})
    assert kept.keys() == prefixed("a.").keys()
