"""Streamed training data is resumed within an epoch."""

import os
import signal
import sys

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from miniature import PLAIN, picture
from quiet_trainer import quiet_trainer

from gmarpp.cli.train import train_main
from gmarpp.data import HubDataset
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization

# Files of which processes have unequal shares.
ROWS = (11, 3, 8)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    datasets.disable_progress_bars()


@pytest.fixture
def files(tmp_path):
    """Colored pictures in two files."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    for number, rows in enumerate(ROWS):
        images = [picture(100 * number + row, (16, 16)) for row in range(rows)]
        data = datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in range(rows)]}, features)
        data.to_parquet(str(tmp_path / f"train{number}.parquet"))
    data.to_parquet(str(tmp_path / "valid.parquet"))
    return {"train": str(tmp_path / "train*.parquet"), "valid": str(tmp_path / "valid.parquet")}


def stream(files, **options):
    chosen = {"num_workers": 0, "shuffle_buffer": 6, "batch_size": 4, "seed": 3} | options
    return HubDataset("parquet", data_files=files, streaming=True, preprocessing=PLAIN, **chosen)


class Recorder(L.LightningModule):
    """Keeps step, epoch and pixels of every batch; these are augmented by random numbers of seed, epoch and row."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        pixels = batch["image"].sum((1, 2, 3)).tolist()
        self.seen.append((self.trainer.global_step, self.trainer.current_epoch, pixels))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.log("mean", batch["image"].mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, data, resume=None, max_steps=14, module=None, **options):
    torch.manual_seed(11)
    module = Recorder() if module is None else module
    checkpoint = {"every_n_train_steps": 1} | options.pop("checkpoint", {})
    callbacks = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)]
    trainer = quiet_trainer(folder, max_steps=max_steps, num_sanity_val_steps=0, callbacks=callbacks, **options)
    trainer.fit(module, data, ckpt_path=resume)
    return module.seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_run_sees_what_an_uninterrupted_one_would(tmp_path, files):
    expected = fit(tmp_path / "whole", stream(files))
    assert [epoch for _, epoch, _ in expected] == [0] * 5 + [1] * 5 + [2] * 4
    assert len({tuple(pixels) for *_, pixels in expected}) == 14
    for step in (1, 3, 4, 5, 6, 9, 10, 12):
        resumed = fit(tmp_path / f"{step}", stream(files), tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed == expected[step:], step


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}),
        ({"monitor": "mean", "save_on_train_epoch_end": False}, {"val_check_interval": 2}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"limit_train_batches": 3}),
    ],
)
def test_wherever_the_checkpoint_is_made(tmp_path, files, checkpoint, options):
    options = {"checkpoint": {"every_n_train_steps": None} | checkpoint, **options}
    expected = fit(tmp_path / "whole", stream(files), **options)
    made = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(made) >= 2
    for path in made:
        step = int(path.stem.removeprefix("step="))
        assert fit(tmp_path / path.stem, stream(files), path, **options) == expected[step:], step


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_go_on_where_each_of_them_was(tmp_path, files, workers):
    options = {"num_workers": workers, "batch_size": 2}
    expected = fit(tmp_path / "whole", stream(files, **options))
    assert [epoch for _, epoch, _ in expected].count(0) in (9, 10, 11)
    for step in (1, 2, 5, 9, 12):
        data, path = stream(files, **options), tmp_path / "whole" / f"step={step}.ckpt"
        assert fit(tmp_path / f"{step}", data, path) == expected[step:], step


def test_a_batch_that_was_interrupted_is_repeated(tmp_path, files, monkeypatch):
    def interrupt(module, *arguments):
        if module.trainer.global_step == 7:
            raise KeyError("interrupted")

    expected = fit(tmp_path / "whole", stream(files))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_before_optimizer_step", interrupt)
        with pytest.raises(KeyError, match="interrupted"):
            fit(tmp_path / "broken", stream(files), checkpoint={"every_n_train_steps": 99, "save_on_exception": True})
    assert fit(tmp_path / "resumed", stream(files), tmp_path / "broken/step=7.ckpt") == expected[7:]


class RecordedClassifier(ViTClassifier):
    seen = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = [*self.seen, (self.global_step, batch["image"].sum((1, 2, 3)).tolist(), loss.item())]
        return loss


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_classifier_has_the_losses_of_an_uninterrupted_run(tmp_path, files, workers):
    """Its schedule has Lightning set up the data, and fetch a first batch, before the checkpoint is read."""

    def classifier():
        torch.manual_seed(5)
        options = {"pretrained": False, "model_args": {"depth": 2}, "drop_path": 0.2}
        return RecordedClassifier("test_vit", 2, 16, optimizer=Optimization(lr=1e-3), **options)

    def data():
        return stream(files, num_workers=workers)

    expected = fit(tmp_path / "whole", data(), max_steps=8, module=classifier())
    for step in (2, 5, 7):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        assert fit(tmp_path / f"{step}", data(), path, max_steps=8, module=classifier()) == expected[step:], step


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_unreadable_and_left_out_rows_are_left_behind_as_well(tmp_path, files):
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"text", "path": None}] * 3, "label": [0, 1, 1]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}),
    )
    broken.to_parquet(str(tmp_path / "train9.parquet"))
    options = {"on_error": "skip", "only_classes": ["bee"], "batch_size": 2}
    expected = fit(tmp_path / "whole", stream(files, **options), max_steps=9)
    assert [epoch for _, epoch, _ in expected] == [0] * 5 + [1] * 4
    for step in (2, 4, 7):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        assert fit(tmp_path / f"{step}", stream(files, **options), path, max_steps=9) == expected[step:], step


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 1}, "data.num_workers was 0 and is 1"),
        ({"shuffle_buffer": 7, "seed": 4}, "data.shuffle_buffer was 6 and is 7, data.seed was 3 and is 4"),
    ],
)
def test_another_order_starts_the_epoch_again_and_says_so(tmp_path, files, options, message):
    fit(tmp_path / "whole", stream(files), max_steps=7)
    fresh = fit(tmp_path / "fresh", stream(files, **options), max_steps=10)
    with pytest.warns(UserWarning, match=rf"epoch 1 of the streamed data starts again, .*: {message}; a stream is"):
        resumed = fit(tmp_path / "resumed", stream(files, **options), tmp_path / "whole/step=7.ckpt", max_steps=10)
    assert [pixels for *_, pixels in resumed] == [pixels for _, epoch, pixels in fresh if epoch == 1][:3]


def test_several_ranks_start_the_epoch_again_and_say_so(tmp_path, files):
    data = stream(files)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.stream.world_size = 2
    loader.load_state_dict({"epoch": 0, "rows": [4], "turn": 0, "order": loader._order})
    with pytest.warns(UserWarning, match="epoch 0 of the streamed data starts again, .*: 2 ranks share it; a stream"):
        assert next(iter(loader))["index"][0] == 0


class Losses(L.Callback):
    """Keeps losses, and sends this process SIGTERM behind one step."""

    losses, last = {}, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = outputs["loss"].item()
        if trainer.global_step == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("last", [3, 5, 8])
def test_a_stopped_command_goes_on_from_its_last_checkpoint(tmp_path, files, monkeypatch, last):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    command = [
        "fit", "--model.architecture=test_vit", "--model.image_size=16", "--model.pretrained=false",
        "--model.num_classes=2", "--model.model_args={depth: 1}", "--model.drop_path=0.2", "--data=HubDataset",
        "--data.path=parquet", f"--data.data_files={files}", "--data.streaming=true", "--data.batch_size=4",
        "--data.num_workers=0", "--data.shuffle_buffer=6", "--trainer.accelerator=cpu", "--trainer.logger=false",
        "--trainer.enable_model_summary=false", "--trainer.max_steps=10",
        "--trainer.callbacks=test_stream_loader.Losses",
    ]  # fmt: skip
    monkeypatch.setattr(Losses, "losses", {})
    train_main([*command, "--trainer.default_root_dir=whole"])
    expected = dict(Losses.losses)
    assert list(expected) == list(range(1, 11))
    Losses.losses.clear()
    monkeypatch.setattr(Losses, "last", last)
    with pytest.raises(SystemExit, match="143"):
        train_main([*command, "--trainer.default_root_dir=cut"])
    monkeypatch.setattr(Losses, "last", 0)
    assert list(Losses.losses) == list(range(1, last + 1))
    train_main([*command, "--trainer.default_root_dir=cut", "--ckpt_path=last"])
    assert Losses.losses == expected
