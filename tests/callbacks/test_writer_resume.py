"""Runs that were interrupted, and go on."""

import json
import shutil
import signal
import time

import pytest
from fake_run import Disturbed, FakeExplaining, SquaresData, contents, fail_at, predict, started
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmarpp.run.reader import load_explanations
from gmarpp.run.shards import finished_indices


def test_a_failed_run_resumes_to_the_same_files_and_explains_nothing_twice(tmp_path, reference):
    with pytest.raises(RuntimeError, match="the network failed"):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=6))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    assert predict(tmp_path / "run", resume=True).seen == [6, 7, 8, 9, 10]
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize("stop", [SIGTERMException(), KeyboardInterrupt()])
def test_a_run_that_is_told_to_stop_keeps_what_is_finished(tmp_path, stop):
    def stopped():
        raise stop

    with pytest.raises((SIGTERMException, SystemExit)):
        predict(tmp_path / "run", module=Disturbed(6, stopped))
    assert finished_indices(tmp_path / "run") == {0, 1, 2, 3, 4, 5}
    assert not list((tmp_path / "run").rglob(".*"))


def test_an_index_that_is_missing_is_made_again(tmp_path, reference):
    predict(tmp_path / "run")
    (tmp_path / "run" / "maps" / "index.json").unlink()
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run") == reference


def test_resuming_a_complete_run_changes_nothing(tmp_path):
    predict(tmp_path / "run")
    before = contents(tmp_path / "run", leave_out=())
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run", leave_out=()) == before
    assert not (tmp_path / "run" / "parts").exists()


def test_images_can_be_added_to_a_complete_run(tmp_path, reference):
    predict(tmp_path / "run", limit=2)
    assert len(load_explanations(tmp_path / "run")) == 4
    assert predict(tmp_path / "run", resume=True).seen == list(range(4, 11))
    assert contents(tmp_path / "run") == reference


def test_a_limit_counts_from_the_beginning_also_after_an_interruption(tmp_path):
    predict(tmp_path / "whole", limit=3)
    with pytest.raises(RuntimeError, match="the network failed"):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=4), limit=3)
    assert predict(tmp_path / "run", resume=True, limit=3).seen == [4, 5]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_share_of_the_batches_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"limit_predict_batches: expected a number of batches.*got 0\.5, a share"):
        predict(tmp_path / "run", resume=True, limit=0.5)


def test_another_batch_size_may_resume(tmp_path):
    with pytest.raises(RuntimeError):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=6))
    predict(tmp_path / "run", SquaresData(batch_size=4), resume=True)
    assert load_explanations(tmp_path / "run").indices == tuple(range(11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": FakeExplaining(methods=("rollout",))}, r"explainer\.methods was \['gmarpp_l1', 'rollout'\]"),
        ({"data": SquaresData(count=5)}, r"data\.images was 11 and is 5"),
        ({"colormap": "jet"}, r"writer\.colormap was 'inferno' and is 'jet'"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, message):
    with pytest.raises(RuntimeError):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=6))
    before = contents(tmp_path / "run", leave_out=())
    with pytest.raises(ValueError, match=message):
        predict(tmp_path / "run", resume=True, **change)
    assert contents(tmp_path / "run", leave_out=()) == before


def test_two_processes_killed_in_the_middle_resume_to_the_same_files(tmp_path, reference):
    folder = tmp_path / "run"
    with started(folder, 2, stalled=True) as process:
        while len(list((folder / "parts").glob("*.safetensors"))) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert finished_indices(folder) == {0, 1, 2, 3}
    twin = shutil.copytree(folder, tmp_path / "twin" / "run")
    predict(folder, resume=True)
    assert contents(folder) == reference
    with started(twin, 2) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert contents(twin) == reference


@pytest.mark.parametrize("file", ["index.json", "explanations.csv"])
def test_a_process_killed_while_it_merges_resumes_to_the_same_files(tmp_path, reference, file):
    with started(tmp_path / "run", 1, fatal_file=file) as process:
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert len(list((tmp_path / "run").rglob(".*.tmp"))) == 1
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run") == reference


def test_runs_without_signed_maps_continue_however_those_are_drawn(tmp_path, reference):
    fail_at(6, tmp_path / "run")
    predict(tmp_path / "run", resume=True, signed_maps="positive")
    assert contents(tmp_path / "run") == reference
