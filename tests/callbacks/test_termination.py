"""Signals arrive in the test's own process, at a chosen batch; what is lost shows against an uninterrupted run."""

import csv
import multiprocessing
import os
import signal
import sys
import time

import lightning as L
import pytest
from noise import write_noise

from gmarpp.cli.explain import explain_main
from gmarpp.cli.train import train_main
from gmarpp.run.shards import finished_indices

PLACES = {
    "in an epoch": ("on_train_batch_end", 3),
    "at the end of an epoch, before validation": ("on_train_batch_end", 11),
    "in a validation": ("on_validation_batch_end", 0),
    "at the end of a validation": ("on_validation_batch_end", 1),
}


class Recorder(L.Callback):
    """Keeps losses and validation metrics, and sends this process a signal at one place."""

    losses, validations, place, number = {}, {}, None, signal.SIGTERM

    @classmethod
    def reset(cls, place=None, number=signal.SIGTERM):
        cls.losses, cls.validations, cls.place, cls.number = {}, {}, place, number

    def _strike(self, hook, batch):
        if type(self).place == (hook, batch):
            type(self).place = None
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = outputs["loss"].item()
        self._strike("on_train_batch_end", batch_idx)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self._strike("on_validation_batch_end", batch_idx)
        else:
            self._strike("on_sanity_check", batch_idx)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validations[trainer.global_step] = trainer.callback_metrics["val/loss"].item()

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._strike("on_predict_batch_end", batch_idx)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("data") / "noise")


@pytest.fixture
def fit(noise, tmp_path, monkeypatch):
    """Trains 2 epochs of 12 steps, each followed by a validation of 2 batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [
        "fit", "--model.architecture=test_vit", "--model.num_classes=3", "--model.image_size=32",
        "--model.pretrained=false", "--model.model_args={depth: 1}", "--model.drop_path=0.2", "--data=ImageFolder",
        f"--data.root={noise}", "--data.labelled=true", "--data.batch_size=2", "--data.num_workers=0",
        "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_model_summary=false",
        "--trainer.max_epochs=2", "--trainer.callbacks=test_termination.Recorder",
    ]  # fmt: skip

    def run(*more, place=None, number=signal.SIGTERM, keep=False):
        if not keep:
            Recorder.reset()
        Recorder.place, Recorder.number = place, number
        return train_main([*arguments, *more])

    return run


def stopped(function, *arguments, **options):
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **options)
    return stop.value.code


@pytest.fixture(scope="module")
def whole():
    return {}


@pytest.mark.parametrize("place", PLACES)
def test_stopped_run_resumes_to_the_same_losses_and_validations(fit, whole, place, capsys):
    if not whole:
        fit()
        whole.update(losses=Recorder.losses, validations=Recorder.validations)
        assert len(whole["losses"]) == 24
        assert len(whole["validations"]) == 2
    assert stopped(fit, "--trainer.default_root_dir=cut", place=PLACES[place]) == 143
    assert len(Recorder.losses) in (4, 12, 13)
    assert capsys.readouterr().err.count("stopped by SIGTERM\n") == 1
    fit("--trainer.default_root_dir=cut", "--ckpt_path=last", keep=True)
    assert Recorder.losses == whole["losses"]
    assert Recorder.validations == whole["validations"]


def test_stop_after_the_last_batch_of_an_epoch_that_no_validation_follows(fit):
    limits = ("--trainer.max_epochs=-1", "--trainer.max_steps=36")
    options = (*limits, "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=8")
    fit(*options)
    losses, validations = Recorder.losses, Recorder.validations
    assert len(losses) == 36
    assert stopped(fit, *options, "--trainer.default_root_dir=cut", place=("on_train_batch_end", 11)) == 143
    fit(*options, "--trainer.default_root_dir=cut", "--ckpt_path=last", keep=True)
    assert Recorder.losses == losses
    assert Recorder.validations == validations


def test_interrupt_from_the_keyboard_has_its_own_status_and_handlers_are_restored(fit):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert stopped(fit, place=("on_train_batch_end", 0), number=signal.SIGINT) == 130
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_run_that_has_learned_nothing_leaves_no_checkpoint(fit, tmp_path):
    assert stopped(fit, place=("on_sanity_check", 0)) == 143
    assert not list(tmp_path.rglob("*.ckpt"))


def test_signal_to_the_loaders_does_not_reach_them(fit, monkeypatch, capfd):
    def strike_all(self, hook, batch):
        if (hook, batch) == ("on_train_batch_end", 1):
            children = multiprocessing.active_children()
            assert children
            for process in (*(child.pid for child in children), os.getpid()):
                # From a process that is not the loaders' parent, as a scheduler is.
                os.spawnlp(os.P_WAIT, "kill", "kill", "-TERM", str(process))
            # The operating system may deliver another process's signal late.
            while "SIGTERM received" not in capfd.readouterr().err:
                time.sleep(0.001)

    monkeypatch.setattr(Recorder, "_strike", strike_all)
    assert stopped(fit, "--data.num_workers=1") == 143
    assert len(Recorder.losses) == 2


def test_killed_loader_ends_with_one_line_and_the_last_state(fit, monkeypatch, tmp_path, capsys):
    def kill(self, hook, batch):
        if (hook, batch) == ("on_train_batch_end", 1):
            multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(Recorder, "_strike", kill)
    assert stopped(fit, "--data.num_workers=1") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a process that loads data was ended from outside" in line
    assert "--data.num_workers" in line
    assert list(tmp_path.rglob("last.ckpt"))


def test_prediction_stops_within_a_batch_and_resumes(fit, noise, tmp_path):
    fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0")
    predict = [
        "predict", f"--ckpt_path={next(tmp_path.rglob('last.ckpt'))}", "--data=ImageFolder",
        f"--data.root={noise}/train", "--data.batch_size=4", "--data.num_workers=0", "--trainer.accelerator=cpu",
        "--explain.methods=[rollout]",
        "--explain.metrics=[]", "--write.report=false", "--write.figure_images=0", "--output=out",
        "--trainer.callbacks=test_termination.Recorder",
    ]  # fmt: skip
    Recorder.reset(("on_predict_batch_end", 1))
    assert stopped(explain_main, predict) == 143
    assert finished_indices(tmp_path / "out") == set(range(8))
    explain_main([*predict, "--resume"])
    with (tmp_path / "out/explanations.csv").open() as table:
        assert len(list(csv.DictReader(table))) == 24
