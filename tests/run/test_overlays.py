import csv
import json

import numpy as np
import pytest
from PIL import Image
from stored_run import METHODS, stored_run

from gmarpp.run.folder import write_run
from gmarpp.run.lock import FolderLock
from gmarpp.run.overlays import write_overlays
from gmarpp.run.reader import load_explanations
from gmarpp.visualize import Backdrop, MapStyle

PATHS = [f"{name}.jpg" for name in "abcdefg"]


@pytest.fixture
def folder(tmp_path):
    """A run without overlays, which also says so."""
    run = stored_run(tmp_path / "run", PATHS, signed_methods=["rollout"])
    write_run(run.folder, {**run.run, "writer": {**run.run["writer"], "overlays": False}})
    return run.folder


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_overlays_are_the_maps_on_the_stored_images(folder):
    write_overlays(str(folder), colormap="viridis", opacity=0.25)
    run = load_explanations(folder)
    assert len(list((folder / "overlays").glob("*/*.png"))) == len(PATHS) * len(METHODS)
    style = MapStyle("viridis", 0.25)
    for index in (0, 6):
        backdrop = Backdrop(run.picture(index), style, short_side=112)
        for method in METHODS:
            drawn = pixels(run.overlay_path(index, method))
            assert drawn.shape == (120, 180, 3)
            assert np.array_equal(drawn, backdrop.overlay(run.map(index, method), signed=method == "rollout"))
    assert run.signed_methods == ("rollout",)


def test_the_run_then_says_so(folder):
    write_overlays(str(folder), colormap="viridis")
    run = json.loads((folder / "run.json").read_text())
    assert run["writer"] == {"overlays": True, "colormap": "viridis", "opacity": 0.5, "signed_maps": "diverging"}
    with (folder / "explanations.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(PATHS) * len(METHODS)
    assert all((folder / row["overlay"]).is_file() for row in table)
    assert not list(folder.rglob(".*"))


def test_drawn_again_in_other_colors(folder):
    write_overlays(str(folder))
    path = load_explanations(folder).overlay_path(3, "random")
    first = pixels(path)
    write_overlays(str(folder), opacity=1.0)
    assert not np.array_equal(pixels(path), first)
    write_overlays(str(folder))
    assert np.array_equal(pixels(path), first)


def test_damaged_image_is_named_and_the_run_left_as_it_was(folder):
    path = load_explanations(folder).image_path(5)
    path.write_bytes(path.read_bytes()[:99])
    before = (folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match=path.name):
        write_overlays(str(folder))
    assert (folder / "run.json").read_bytes() == before
    assert not (folder / ".lock").exists()


def test_overlays_on_whole_pictures_are_not_replaced_by_others(folder):
    run = load_explanations(folder).run
    write_run(folder, {**run, "writer": {**run["writer"], "overlays": "original"}})
    with pytest.raises(ValueError, match=r"overlays on whole pictures.*--write\.overlays original"):
        write_overlays(str(folder))
    assert load_explanations(folder).run["writer"]["overlays"] == "original"


def test_a_folder_in_use_is_refused(folder):
    lock = FolderLock(folder)
    with pytest.raises(BlockingIOError):
        write_overlays(str(folder))
    lock.release()
    assert not (folder / "overlays").exists()
