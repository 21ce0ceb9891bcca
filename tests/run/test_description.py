import copy

import pytest

from gmarpp.run.description import require_same_run


@pytest.fixture
def previous():
    return {
        "versions": {"gmarpp": "0", "torch": "2"},
        "checkpoint": {"path": "x.ckpt", "sha256": "ab" * 32},
        "model": {"name": "VisionTransformer", "architecture": "vit_tiny", "parameters": 5},
        "explainer": {"methods": ["rollout"], "steps": 4, "batch_size": 128},
        "data": {
            "name": "ImageFolder",
            "images": 3,
            "paths_sha256": "ab" * 32,
            "options": {"root": "photos", "masks": "masks", "batch_size": 8, "num_workers": 2},
        },
        "trainer": {"precision": "32-true"},
        "writer": {"overlays": True, "colormap": "inferno", "opacity": 0.5},
        "classes": ["a", "b"],
        "processes": 1,
    }


def test_a_run_continues_itself_with_another_batch_size_or_number_of_processes(previous):
    run = copy.deepcopy(previous)
    run["explainer"]["batch_size"] = 8
    run["processes"] = 4
    run["data"]["options"] |= {"batch_size": 16, "num_workers": 0, "pin_memory": False}
    run["versions"]["torch"] = "3"
    require_same_run(previous, run, "results")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("explainer", "steps", 5),
        ("explainer", "new", 1),
        ("checkpoint", "sha256", "cd" * 32),
        ("data", "paths_sha256", "cd" * 32),
        ("writer", "overlays", False),
        ("versions", "gmarpp", "1"),
        ("trainer", "precision", "bf16-mixed"),
    ],
)
def test_what_differs_is_named(previous, section, name, value):
    run = copy.deepcopy(previous)
    run[section][name] = value
    with pytest.raises(ValueError, match=rf"run in results: {section}\.{name} was .* and is {value!r}\. Give the same"):
        require_same_run(previous, run, "results")


@pytest.mark.parametrize(("name", "value"), [("masks", "others"), ("root", "elsewhere"), ("split", "train")])
def test_other_data_is_named(previous, name, value):
    run = copy.deepcopy(previous)
    run["data"]["options"][name] = value
    with pytest.raises(ValueError, match=rf"data\.options\.{name} was .* and is {value!r}\. Give the same"):
        require_same_run(previous, run, "results")


def test_other_classes_are_another_run(previous):
    with pytest.raises(ValueError, match="the classes differ"):
        require_same_run(previous, {**previous, "classes": ["z"]}, "results")
