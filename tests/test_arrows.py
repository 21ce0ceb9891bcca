"""The rooms of the package and the arrows between them; `python tests/test_arrows.py` prints those there are."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gmarpp"

# What a room may import, from the ground up. Nothing runs back, and there are no other arrows between siblings.
GROUND = {"colormaps", "entry_points", "files", "labels", "maps", "options", "postponed", "processes"}
ARROWS = {
    "entry_points": set(),
    "files": set(),
    "labels": set(),
    "maps": set(),
    "options": set(),
    "postponed": set(),
    "processes": set(),
    "colormaps": {"maps"},
    "visualize": {"colormaps", "maps"},
    "figures": {"colormaps", "labels", "maps", "visualize"},
    "network": {"files"},
    "attribution": {"network", "entry_points", "files", "labels", "figures", "visualize"},
    "perturbation": {"attribution", "network", "maps"},
    "metrics": {"entry_points", "labels", "maps"},
    "targets": {"attribution", "network", "metrics"},
    "data": {"network", "files", "options", "processes"},
    "explained": {"perturbation"},
    "label_rows": {"attribution", "network"},
    "explainer": {"attribution", "explained", "label_rows", "perturbation", "metrics", "network", "options"},
    "run": {
        "explained",
        "network",
        "metrics",
        "colormaps",
        "files",
        "labels",
        "processes",
        "maps",
        "visualize",
        "figures",
    },
    "training": {"network", "data", "files", "options"},
    "callbacks": {
        "explained",
        "explainer",
        "run",
        "training",
        "data",
        "metrics",
        "network",
        *GROUND,
        "visualize",
        "figures",
    },
    "configuration": set(),
    "command": {"configuration", "processes", "callbacks", "training", "data"},
    "sanity": {"command", "training", "data", "attribution", "network", "metrics", *GROUND, "visualize", "figures"},
    "export": {"command", "network", "files"},
    "push": {"command", "network", "files"},
    "cli": {
        "command",
        "configuration",
        "callbacks",
        "run",
        "explainer",
        "training",
        "network",
        "sanity",
        "export",
        "push",
        *GROUND,
    },
}
LIGHTNING_FREE = ("network", "attribution", "perturbation", "metrics", "targets", *GROUND, "visualize", "figures")


def imported(path):
    """Every module that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from [f"gmarpp.{name.name}" for name in node.names] if node.module == "gmarpp" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def rooms():
    """Each room's files; `__init__.py` of the package hands out names of all rooms and is none."""
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not room.startswith("__"):
            found[room].append(path)
    return found


def arrows():
    """Pairs of rooms, with the files that draw the arrow."""
    found = defaultdict(set)
    for room, paths in rooms().items():
        for path in paths:
            for module in imported(path):
                if module.startswith("gmarpp.") and module.split(".")[1] != room:
                    found[room, module.split(".")[1]].add(path.relative_to(PACKAGE).as_posix())
    return found


def test_rooms_import_only_what_lies_below_them():
    undrawn = {arrow: files for arrow, files in arrows().items() if arrow[1] not in ARROWS.get(arrow[0], set())}
    assert not undrawn
    assert set(rooms()) == set(ARROWS)


def test_allowed_arrows_lead_down():
    floors = list(ARROWS)
    assert all(floors.index(below) < floors.index(room) for room, allowed in ARROWS.items() for below in allowed)


def test_networks_are_explained_and_measured_without_lightning():
    for room, paths in rooms().items():
        if room in LIGHTNING_FREE:
            assert not [path for path in paths for module in imported(path) if module.split(".")[0] == "lightning"]


def test_families_and_files_of_networks_know_nothing_of_each_other():
    for path in (PACKAGE / "network").rglob("*.py"):
        for other in {"families", "files"} - {path.parent.name}:
            assert not [module for module in imported(path) if module.startswith(f"gmarpp.network.{other}")], path


if __name__ == "__main__":
    for (source, destination), files in sorted(arrows().items()):
        print(f"{source} -> {destination}: {', '.join(sorted(files))}")
