"""Full disks, damaged files and killed processes."""

import multiprocessing
import resource

import pytest
from fake_run import Disturbed, contents, fail_at, predict
from full_disk import no_file_larger_than

from gmarpp.callbacks import writer
from gmarpp.run import shards
from gmarpp.run.shards import finished_indices


def test_a_damaged_part_is_named_and_its_images_are_explained_again(tmp_path, monkeypatch, reference):
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 3600)
    fail_at(6, tmp_path / "run")
    (part,) = (tmp_path / "run" / "parts").glob("*.safetensors")
    data = bytearray(part.read_bytes())
    data[-3] ^= 8
    part.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{part.name} is damaged \(.*digest.*delete it and run again with --resume"):
        predict(tmp_path / "run", resume=True)
    part.unlink()
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="can't limit other processes")
def test_a_full_disk_stops_the_run_and_it_resumes(tmp_path, monkeypatch, caplog, reference):
    def fill():
        for process in multiprocessing.active_children():
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, hard))

    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0)
    with pytest.raises(OSError, match=r"cannot write: File too large.*run/(images|overlays)"):
        predict(tmp_path / "run", module=Disturbed(6, fill))
    assert "continue it with --resume" in caplog.text
    assert not list((tmp_path / "run").rglob("*.tmp"))
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize("flush_seconds", [0, 30])
def test_no_part_vouches_for_a_picture_that_could_not_be_written(tmp_path, monkeypatch, reference, flush_seconds):
    obstacle = tmp_path / "run" / "images" / "000004-same.jpg"
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", flush_seconds)
    with pytest.raises(OSError, match=r"cannot write: Is a directory.*run/images/000004-same\.jpg"):
        predict(tmp_path / "run", module=Disturbed(2, obstacle.mkdir))
    assert finished_indices(tmp_path / "run") <= {0, 1, 2, 3}
    obstacle.rmdir()
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


def test_a_killed_drawing_process_stops_the_run_and_it_resumes(tmp_path, monkeypatch, reference):
    def kill():
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0)
    with pytest.raises(ChildProcessError, match=r"was killed.*continue the run with --resume"):
        predict(tmp_path / "run", module=Disturbed(6, kill))
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize(("step", "file"), [("merge_parts", "maps/00000"), ("write_results", "explanations")])
def test_a_disk_that_is_full_at_the_end_stops_the_run_and_it_resumes(tmp_path, monkeypatch, reference, step, file):
    original = getattr(writer, step)

    def on_a_full_disk(*arguments):
        with no_file_larger_than(1000):
            return original(*arguments)

    monkeypatch.setattr(writer, step, on_a_full_disk)
    with pytest.raises(OSError, match=rf"cannot write: File too large: .*run/{file}"):
        predict(tmp_path / "run")
    monkeypatch.undo()
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run") == reference


def test_the_disk_has_what_a_file_vouches_for_before_that_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 3600)
    found = []

    def look():
        names = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")]
        pictures = sum(name.startswith(("images/", "overlays/")) for name in names)
        parts = sum(name.startswith("parts/") for name in names)
        found.append((pictures, parts, "maps/index.json" in names, "report.html" in names))

    monkeypatch.setattr(writer, "sync_disk", look)
    monkeypatch.setattr(shards, "sync_disk", look)
    predict(tmp_path / "run")
    assert found == [(11 * 3, 0, False, False), (11 * 3, 1, True, True)]
