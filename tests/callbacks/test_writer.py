import csv
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from full_disk import no_file_larger_than
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from signed_method import Downwards
from torch.utils.data import DataLoader, Dataset

from gmarpp.attribution import methods
from gmarpp.callbacks import ExplanationWriter, writer
from gmarpp.explainer import ExplainedBatch, Explainer
from gmarpp.perturbation import Curves
from gmarpp.run.reader import load_explanations
from gmarpp.run.shards import finished_indices

METHODS = ("gmarpp_l1", "rollout")
METRICS = ("insertion_auc", "deletion_auc")


class Squares(Dataset):
    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 3, 16, 24, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path = ["a/same.jpg", "b/same.jpg", '"<b>&.jpg', "x" * 300][index % 4]
        return {"image": self.images[index], "label": index % 3 - 1, "index": index, "path": path}


class SquaresData(L.LightningDataModule):
    def __init__(self, count=11, batch_size=2):
        super().__init__()
        self.dataset = Squares(count)
        self.batch_size = batch_size

    def predict_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)


class FakeExplaining(L.LightningModule):
    """Explains without a network; `stop_at` names the image at which it fails."""

    def __init__(self, methods=METHODS, metrics=METRICS, stop_at=None, pause=0.0):
        super().__init__()
        self.model = torch.nn.Linear(2, 2)
        self.explainer = Explainer(methods=methods, metrics=metrics, steps=4)
        self.classes, self.class_names = ("n1", "n2"), ("cat, moggy", "dog")
        self.stop_at, self.pause, self.seen = stop_at, pause, []

    def predict_step(self, batch, batch_idx):
        time.sleep(self.pause)
        images, index = batch["image"], batch["index"]
        self.seen += index.tolist()
        if self.stop_at in index.tolist():
            raise RuntimeError("the network failed")
        share = images.mean((1, 2, 3)) + 1e-3 * len(images)  # depends on the batch as real arithmetic may
        curves = {
            method: Curves(torch.linspace(0, 1, 5), images[:, number, :5, 0], images[:, number, 0, :5])
            for number, method in enumerate(self.explainer.methods)
        }
        return ExplainedBatch(
            index=index,
            path=list(batch["path"]),
            label=batch["label"],
            target=index % 2,
            predicted=index % 2,
            target_probability=share,
            predicted_probability=share,
            maps={method: images[:, number, ::4, ::4] for number, method in enumerate(self.explainer.methods)},
            values={method: dict.fromkeys(self.explainer.metrics, share) for method in self.explainer.methods},
            inputs={},
            curves=curves if self.explainer.metrics else {},
            images=images,
        )


def predict(folder, data=None, module=None, devices=1, limit=1.0, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExplanationWriter(folder, **options)],
        limit_predict_batches=limit,
    )
    module = module or FakeExplaining()
    trainer.predict(module, datamodule=data or SquaresData(), return_predictions=False)
    return module


def contents(folder, leave_out=("run.json", "report.html")):
    """Bytes of all files by relative path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    predict(folder)
    return contents(folder)


def test_a_run_writes_everything_that_is_promised(tmp_path):
    predict(tmp_path / "run", shard_size=4, figure_formats=["png", "svg"])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    tables = {"explanations.csv", "summary.csv", "run.json", "report.html"}
    figures = {"comparison.png", "comparison.svg", "curves.png", "curves.svg"}
    assert names == tables | figures | {"maps", "images", "overlays"}
    assert len(list((tmp_path / "run" / "maps").glob("*.safetensors"))) == 3
    with (tmp_path / "run" / "explanations.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 11 * 2
    assert [row["index"] for row in table[::2]] == [str(index) for index in range(11)]
    for row in table:
        with (
            Image.open(tmp_path / "run" / row["overlay"]) as overlay,
            Image.open(tmp_path / "run" / row["image"]) as image,
        ):
            assert image.size == (24, 16)
            assert overlay.size == (24 * 7, 16 * 7)
    assert len({row["overlay"] for row in table}) == len(table)
    assert table[0]["label"] == ""
    assert table[6]["target_name"] == "dog"


def test_what_is_read_back_is_what_was_explained(tmp_path):
    data = SquaresData()
    predict(tmp_path / "run", data)
    explanations = load_explanations(tmp_path / "run")
    images = data.dataset.images
    assert torch.equal(explanations.maps("rollout"), images[:, 1, ::4, ::4])
    assert explanations.rows[3]["path"] == "x" * 300
    insertion, deletion = explanations.mean_curves()
    assert insertion["gmarpp_l1"].mean == pytest.approx(images[:, 0, :5, 0].mean(0).numpy(), rel=1e-5)
    assert deletion["rollout"].mean == pytest.approx(images[:, 1, 0, :5].mean(0).numpy(), rel=1e-5)


def test_run_json_describes_the_run(tmp_path):
    module = FakeExplaining()
    module.checkpoint_path, module.checkpoint_sha256 = "checkpoints/x.ckpt", "ab" * 32
    predict(tmp_path / "run", module=module)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["explained"] == run["data"]["images"] == 11
    assert run["checkpoint"] == {"path": "checkpoints/x.ckpt", "sha256": "ab" * 32}
    assert run["explainer"]["methods"] == list(METHODS)
    assert run["class_names"] == ["cat, moggy", "dog"]
    assert set(run["versions"]) >= {"gmarpp", "torch", "lightning", "timm", "python"}


class ForAndAgainst(FakeExplaining):
    """Its second method is signed: for the class on the left, against it on the right."""

    def __init__(self):
        super().__init__(methods=("rollout", "downwards"))

    def predict_step(self, batch, batch_idx):
        explained = super().predict_step(batch, batch_idx)
        signs = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, -1.0]).expand(len(explained.index), 4, 6)
        return replace(explained, maps={**explained.maps, "downwards": signs})


def test_signed_methods_are_drawn_and_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.setitem(methods._REGISTERED, "downwards", Downwards())
    folder = tmp_path / "run"
    predict(folder, SquaresData(count=3), ForAndAgainst())
    run = json.loads((folder / "run.json").read_text())
    assert (run["signed_methods"], run["writer"]["signed_maps"]) == (["downwards"], "diverging")
    stored = load_explanations(folder)
    assert stored.signed_methods == ("downwards",)
    assert '"signed":true' in (folder / "report.html").read_text()
    with Image.open(stored.overlay_path(0, "downwards")) as picture:
        left, middle, right = (
            picture.getpixel((x, picture.height // 2)) for x in (0, picture.width // 2, picture.width - 1)
        )
    assert left[0] > left[2] + 50
    assert middle[0] == middle[1] == middle[2]
    assert right[2] > right[0] + 50
    with pytest.raises(ValueError, match=r"writer\.signed_maps was 'diverging' and is 'positive'"):
        predict(folder, SquaresData(count=3), ForAndAgainst(), resume=True, signed_maps="positive")


def test_runs_without_signed_maps_continue_however_those_are_drawn(tmp_path, reference):
    fail_at(6, tmp_path / "run")
    predict(tmp_path / "run", resume=True, signed_maps="positive")
    assert contents(tmp_path / "run") == reference


def test_maps_alone_need_no_metrics(tmp_path):
    predict(tmp_path / "run", module=FakeExplaining(metrics=()), overlays=False, report=False, figure_images=0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"explanations.csv", "run.json", "maps", "images"}


def test_a_failed_run_resumes_to_the_same_files_and_explains_nothing_twice(tmp_path, reference):
    with pytest.raises(RuntimeError, match="the network failed"):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=6))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    assert predict(tmp_path / "run", resume=True).seen == [6, 7, 8, 9, 10]
    assert contents(tmp_path / "run") == reference


@pytest.mark.parametrize("stop", [SIGTERMException(), KeyboardInterrupt()])
def test_a_run_that_is_told_to_stop_keeps_what_is_finished(tmp_path, stop):
    def signalled():
        raise stop

    with pytest.raises((SIGTERMException, SystemExit)):
        predict(tmp_path / "run", module=Disturbed(6, signalled))
    assert finished_indices(tmp_path / "run") == {0, 1, 2, 3, 4, 5}
    assert not list((tmp_path / "run").rglob(".*"))


def fail_at(stop_at, folder, **options):
    with pytest.raises(RuntimeError, match="the network failed"):
        predict(folder, module=FakeExplaining(stop_at=stop_at), **options)


def test_a_run_that_can_not_start_leaves_no_folder(tmp_path):
    fail_at(0, tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_objects_need_objects(tmp_path):
    with pytest.raises(ValueError, match=r"explain\.metrics: iou compare.*neither boxes nor masks"):
        predict(tmp_path / "run", module=FakeExplaining(metrics=("insertion_auc", "iou")))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before_anything_is_written(tmp_path, monkeypatch, reference):
    written = sum(len(data) for name, data in reference.items() if name.startswith(("images", "overlays", "maps/0")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=written // 2))
    with pytest.raises(OSError, match=r"results need about.*are free.*run"):
        predict(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=written * 2))
    predict(tmp_path / "run", report=False)


def test_a_box_that_no_reader_would_take_is_refused_at_once(tmp_path):
    class Boxed(FakeExplaining):
        def predict_step(self, batch, batch_idx):
            return replace(
                super().predict_step(batch, batch_idx), boxes=torch.full((len(batch["index"]), 4), torch.nan)
            )

    with pytest.raises(ValueError, match=r"rows\[0\]\.box: expected four finite numbers"):
        predict(tmp_path / "run", module=Boxed())
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

    monkeypatch.setattr(writer, "_publish", killed)
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


def test_an_index_that_is_missing_is_made_again(tmp_path, reference):
    predict(tmp_path / "run")
    (tmp_path / "run" / "maps" / "index.json").unlink()
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run") == reference


def test_a_damaged_part_is_named_and_its_images_are_explained_again(tmp_path, reference):
    fail_at(6, tmp_path / "run")
    (part,) = (tmp_path / "run" / "parts").glob("*.safetensors")
    data = bytearray(part.read_bytes())
    data[-3] ^= 8
    part.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{part.name} is damaged \(.*digest.*delete it and run again with resume"):
        predict(tmp_path / "run", resume=True)
    part.unlink()
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


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


def test_the_data_module_is_left_as_it_was(tmp_path):
    data = SquaresData()
    predict(tmp_path / "run", data)
    with pytest.raises(RuntimeError):
        predict(tmp_path / "other", data, FakeExplaining(stop_at=2))
    assert "predict_dataloader" not in vars(data)
    own = data.predict_dataloader = lambda: DataLoader(data.dataset, batch_size=3)
    predict(tmp_path / "third", data)
    assert vars(data)["predict_dataloader"] is own


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


def test_a_limit_is_meant_for_each_rank(tmp_path):
    data = SquaresData()
    trainer = SimpleNamespace(
        datamodule=data,
        world_size=2,
        precision="32-true",
        limit_predict_batches=2,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda error: error),
    )
    batches = ExplanationWriter(tmp_path / "run")._pending(trainer, FakeExplaining(), data.predict_dataloader())
    assert batches == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_share_of_the_batches_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"limit_predict_batches is 0\.5.*number of batches"):
        predict(tmp_path / "run", resume=True, limit=0.5)


def test_another_batch_size_may_resume(tmp_path):
    with pytest.raises(RuntimeError):
        predict(tmp_path / "run", module=FakeExplaining(stop_at=6))
    predict(tmp_path / "run", SquaresData(batch_size=4), resume=True)
    assert load_explanations(tmp_path / "run").indices == tuple(range(11))


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


class Disturbed(FakeExplaining):
    """Has something happen before it explains the image `at`."""

    def __init__(self, at, event):
        super().__init__()
        self.at, self.event = at, event

    def predict_step(self, batch, batch_idx):
        if self.at in batch["index"]:
            self.event()
        return super().predict_step(batch, batch_idx)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="can't limit other processes")
def test_a_full_disk_stops_the_run_and_it_resumes(tmp_path, monkeypatch, caplog, reference):
    def fill():
        for process in multiprocessing.active_children():
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, hard))

    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0)
    with pytest.raises(OSError, match=r"cannot write: File too large.*run/(images|overlays)"):
        predict(tmp_path / "run", module=Disturbed(6, fill))
    assert "continue it with resume" in caplog.text
    assert not list((tmp_path / "run").rglob("*.tmp"))
    predict(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == reference


def test_a_folder_that_can_not_be_made_is_named(tmp_path, caplog):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/run"):
        predict(tmp_path / "file" / "run")
    assert "resume" not in caplog.text


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
    with pytest.raises(ChildProcessError, match=r"was killed.*continue the run with resume"):
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
    found = []

    def look():
        names = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")]
        pictures = sum(name.startswith(("images/", "overlays/")) for name in names)
        parts = sum(name.startswith("parts/") for name in names)
        found.append((pictures, parts, "maps/index.json" in names, "report.html" in names))

    monkeypatch.setattr(writer, "sync_disk", look)
    predict(tmp_path / "run")
    assert found == [(11 * 3, 0, False, False), (11 * 3, 1, True, True)]


def test_an_index_that_is_not_the_position_is_refused(tmp_path):
    class Renumbered(Squares):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "index": index + 5}

    data = SquaresData()
    data.dataset = Renumbered(11)
    with pytest.raises(ValueError, match="must be the position in the data set"):
        predict(tmp_path / "run", data)


def test_data_loaders_alone_can_be_explained_but_not_resumed(tmp_path):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[ExplanationWriter(tmp_path / "run")], **options)
    trainer.predict(FakeExplaining(), DataLoader(Squares(3), batch_size=2), return_predictions=False)
    assert len(load_explanations(tmp_path / "run")) == 3
    trainer = L.Trainer(callbacks=[ExplanationWriter(tmp_path / "run", resume=True)], **options)
    with pytest.raises(ValueError, match="resume needs a data module"):
        trainer.predict(FakeExplaining(), DataLoader(Squares(3), batch_size=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colormap": "rainbow"}, "rainbow.*inferno"),
        ({"figure_formats": ["bmp"]}, "bmp.*png, pdf, svg"),
        ({"opacity": 50}, "opacity: expected 0 to 1, got 50"),
        ({"signed_maps": "both"}, "unknown signed_maps 'both': choose from diverging, positive"),
        ({"shard_size": 0}, "shard_size"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ExplanationWriter("out", **options)


def start(folder, devices, pause=0.0, fatal_file=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder), str(devices), str(pause), fatal_file]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)


def test_two_processes_killed_in_the_middle_resume_to_the_same_files(tmp_path, reference):
    folder = tmp_path / "run"
    process = start(folder, 2, 0.3)
    deadline = time.monotonic() + 150
    while len(list((folder / "parts").glob("*.safetensors"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    twin = shutil.copytree(folder, tmp_path / "twin" / "run")
    predict(folder, resume=True)
    assert contents(folder) == reference
    process = start(twin, 2)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert contents(twin) == reference


@pytest.mark.parametrize("file", ["index.json", "explanations.csv"])
def test_a_process_killed_while_it_merges_resumes_to_the_same_files(tmp_path, reference, file):
    process = start(tmp_path / "run", 1, fatal_file=file)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == -signal.SIGKILL, errors
    assert len(list((tmp_path / "run").rglob(".*.tmp"))) == 1
    assert predict(tmp_path / "run", resume=True).seen == []
    assert contents(tmp_path / "run") == reference


def _die_before(name):
    """Have this process killed when it is about to give a file its name."""
    original = Path.replace

    def replace(path, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    Path.replace = replace


if __name__ == "__main__":
    writer._FLUSH_SECONDS = 0
    _die_before(sys.argv[4])
    predict(sys.argv[1], module=FakeExplaining(pause=float(sys.argv[3])), devices=int(sys.argv[2]), resume=True)
