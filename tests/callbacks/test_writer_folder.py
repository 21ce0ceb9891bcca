"""Which folders a predict run takes, and what it leaves in them."""

import os
import shutil

import pytest
from fake_run import Disturbed, FakeExplaining, SquaresData, contents, fail_at, predict

from gmarpp.callbacks import ExplanationWriter, writer
from gmarpp.run.reader import load_explanations


def test_a_run_that_can_not_start_leaves_no_folder(tmp_path):
    fail_at(0, tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_a_run_when_the_new_one_can_start_and_nothing_else(tmp_path, reference):
    folder = tmp_path / "run"
    predict(folder, SquaresData(count=5), FakeExplaining(methods=("legrad",)), figure_formats=["svg"], shard_size=2)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder, leave_out=())
    fail_at(0, folder, overwrite=True)
    assert contents(folder, leave_out=()) == before
    predict(folder, overwrite=True)
    assert contents(folder) == {**reference, "notes.txt": b"mine"}
    with pytest.raises(ValueError, match=r"resume continues .* overwrite removes .*: choose one"):
        ExplanationWriter(folder, resume=True, overwrite=True)


def test_overwriting_spares_what_is_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "maps").mkdir()
    (tmp_path / "photos" / "maps" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="holds no run"):
        predict(tmp_path / "photos", overwrite=True)
    assert contents(tmp_path / "photos") == {"maps/cat.jpg": b""}


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_run_without_an_image_does_not_block_another(tmp_path, monkeypatch, reference, resume):
    def killed(*_):
        raise OSError("killed before the first part")

    monkeypatch.setattr(writer, "publish", killed)
    with pytest.raises(OSError, match="killed before"):
        predict(tmp_path / "run", module=FakeExplaining(methods=("legrad",)))
    monkeypatch.undo()
    assert (tmp_path / "run" / "run.json").exists()
    predict(tmp_path / "run", resume=resume)
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_into_a_folder_in_use_ends_at_once(tmp_path, options):
    folder = tmp_path / "run"
    seen = []

    def second():
        with pytest.raises(
            BlockingIOError, match=rf"run is in use by process {os.getpid()} on .*: wait.*another folder"
        ):
            predict(folder, **options)
        seen.append(contents(folder, leave_out=()).keys())

    predict(folder, module=Disturbed(6, second), report=False)
    assert len(seen) == 1
    assert len(load_explanations(folder)) == 11
    assert not (folder / ".lock").exists()


def test_paths_name_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RESULTS", str(tmp_path / "results"))
    assert ExplanationWriter("~/run").folder == tmp_path / "home" / "run"
    assert ExplanationWriter("${RESULTS}/run").folder == tmp_path / "results" / "run"
    with pytest.raises(ValueError, match=r"\$UNKNOWN_NAME, which is not set"):
        ExplanationWriter("$UNKNOWN_NAME/run")
    with pytest.raises(ValueError, match="no such user"):
        ExplanationWriter("~nobody-of-this-name/run")


def test_a_folder_in_use_is_refused(tmp_path):
    predict(tmp_path / "run", report=False)
    with pytest.raises(FileExistsError, match=r"complete run.*resume"):
        predict(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"photos is not empty.*another"):
            predict(tmp_path / "photos", resume=resume)
    with pytest.raises(NotADirectoryError, match=r"cat\.jpg is a file"):
        predict(tmp_path / "photos" / "cat.jpg")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_folder_that_can_not_be_made_is_named(tmp_path, caplog):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/run"):
        predict(tmp_path / "file" / "run")
    assert "resume" not in caplog.text


def test_nothing_is_written_or_deleted_beyond_a_link(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    fail_at(6, folder)
    elsewhere.mkdir()
    for name in ("parts", "images", "overlays/rollout", "maps"):
        (folder / name).rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", elsewhere, dirs_exist_ok=True)
        (folder / name).symlink_to(elsewhere)
        before = contents(elsewhere)
        for option in ("resume", "overwrite") if name == "parts" else ("resume",):
            with pytest.raises((OSError, ValueError), match=r"(?s)link.*run/|run/.*link"):
                predict(folder, **{option: True})
        assert contents(elsewhere) == before
        (folder / name).unlink()
        (tmp_path / "moved").rename(folder / name)


def test_too_little_space_is_known_before_anything_is_written(tmp_path, monkeypatch, reference):
    written = sum(len(data) for name, data in reference.items() if name.startswith(("images", "overlays", "maps/0")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=written // 2))
    with pytest.raises(OSError, match=r"results need about.*are free.*run"):
        predict(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=written * 2))
    predict(tmp_path / "run", report=False)
