import os

import pytest
from miniature import picture

from gmarpp.data.walk import MAX_WAYS, files_below

PNG = (".png",)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_relative_folders_and_names(tmp_path, monkeypatch):
    touch(tmp_path, "b.PNG", "a/c.png", "a/d.txt", ".hidden/e.png")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "..", tmp_path.relative_to(tmp_path)):
        assert files_below(folder, PNG) == ["a/c.png", "b.PNG"]
    assert files_below(tmp_path, None, besides=tmp_path / "a") == ["b.PNG"]


@pytest.mark.parametrize("name", ["dog", "v1.2", "1.png"])
def test_links_to_nothing_are_named_whatever_they_were(tmp_path, name):
    """A class folder on a disk that is not mounted would be left out otherwise."""
    touch(tmp_path, "train/cat/1.png")
    (tmp_path / "train" / name).symlink_to("/unmounted/disk")
    with pytest.raises(FileNotFoundError, match=rf"train/{name} is a link to /unmounted/disk, which does not exist"):
        files_below(tmp_path, PNG)
    (tmp_path / "train" / name).unlink()
    (tmp_path / "train" / name).symlink_to(name)
    with pytest.raises(OSError, match=rf"train/{name} is a link to {name}, which cannot be reached \(Too many levels"):
        files_below(tmp_path, PNG)


def test_one_folder_may_be_linked_twice_but_not_in_circles_without_end(tmp_path):
    touch(tmp_path, "store/1.png", "data/2.png")
    for name in ("a", "b"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    assert files_below(tmp_path / "data", PNG) == ["2.png", "a/1.png", "b/1.png"]
    # every folder links to all others: 9! ways through them, though none leads back to where it comes from
    for name in "ijklmnopq":
        (tmp_path / "web" / name).mkdir(parents=True)
    for name in "ijklmnopq":
        for other in "ijklmnopq":
            (tmp_path / "web" / name / other).symlink_to(tmp_path / "web" / other)
    with pytest.raises(ValueError, match=rf"web/.* is way {MAX_WAYS + 1} to the same folder: remove links"):
        files_below(tmp_path / "web", PNG)


@pytest.mark.parametrize("marks", [("run.json", "maps/a"), ("run.json", "parts/a"), ("sanity.csv", "sanity.png")])
def test_results_of_any_kind(tmp_path, marks, caplog):
    touch(tmp_path, "1.png", *(f"results/{mark}" for mark in marks), "results/comparison.png")
    assert files_below(tmp_path, PNG) == ["1.png"]
    assert files_below(tmp_path, PNG) == ["1.png"]
    assert caplog.text.count("results holds the results of a") == 1
    for folder, strict in ((tmp_path / "results", False), (tmp_path, True)):
        with pytest.raises(ValueError, match=r"results holds the results of a .*, not images to explain"):
            files_below(folder, PNG, strict=strict)


def test_a_user_may_name_a_file_like_one_of_ours(tmp_path):
    touch(tmp_path, "run.json", "images/1.png", "sanity.csv")
    assert files_below(tmp_path, PNG) == ["images/1.png"]


def test_pipes_matter_where_they_would_be_read(tmp_path):
    picture(0).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "control")
    assert files_below(tmp_path, PNG) == ["1.png"]
    with pytest.raises(ValueError, match="control is a named pipe, expected a file"):
        files_below(tmp_path, None)
