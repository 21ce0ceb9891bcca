import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from squares import ColouredSquares, Squares
from torch.utils.data import DataLoader

from gmarpp.callbacks import LargestBatchFinder
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization

HOLDS = 13


class Ordered(Squares):
    def train_dataloader(self):
        return DataLoader(ColouredSquares(64, 3, seed=0), batch_size=self.batch_size, drop_last=True)


class Steps(L.Callback):
    def __init__(self):
        self.losses, self.rates, self.sizes = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sizes.append(len(batch["image"]))
        self.losses.append(outputs["loss"].item())
        self.rates.append(max(group["lr"] for group in trainer.optimizers[0].param_groups))


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    step = ViTClassifier.training_step

    def limited(self, batch, batch_idx):
        if len(batch["image"]) > HOLDS:
            raise RuntimeError("CUDA out of memory.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ViTClassifier, "training_step", limited)


def fit(folder, batch_size, *finder, resume=None, **limits):
    torch.manual_seed(0)
    network = ViTClassifier(
        "test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, drop_path=0.2,
        optimizer=Optimization(lr=1e-3, lr_batch_size=16, warmup=0.3),
    )  # fmt: skip
    steps = Steps()
    run = quiet_trainer(folder, enable_checkpointing=False, callbacks=[steps, *finder], **{"max_epochs": 2, **limits})
    run.fit(network, Ordered(batch_size), ckpt_path=resume)
    return steps, run


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 7}])
def test_run_with_a_search_is_the_run_at_the_found_size(tmp_path, limits):
    finder = LargestBatchFinder(init_val=4, steps_per_trial=1, margin=0)
    searched, _ = fit(tmp_path, 8, finder, **limits)
    assert set(searched.sizes) == {HOLDS}
    assert finder.optimal_batch_size == HOLDS
    expected, _ = fit(tmp_path, HOLDS, **limits)
    assert searched.losses == pytest.approx(expected.losses, rel=1e-6)
    assert searched.rates == pytest.approx(expected.rates)
    assert len(set(searched.rates)) > 3, "the schedule moves"
    assert not list(tmp_path.glob(".scale_batch_size*"))


def test_resumed_run_keeps_the_size_that_was_found(tmp_path):
    _, run = fit(tmp_path, 8, LargestBatchFinder(init_val=4, steps_per_trial=1, margin=0.25), max_epochs=1)
    run.save_checkpoint(tmp_path / "run.ckpt")
    steps, _ = fit(tmp_path, 8, LargestBatchFinder(), resume=tmp_path / "run.ckpt")
    assert steps.sizes == [9] * 7, "three quarters of 13 images, and the second epoch of 64"


def test_evaluation_does_not_search(tmp_path):
    network = ViTClassifier("test_vit", 3, 32, pretrained=False, model_args={"depth": 2})
    finder = LargestBatchFinder()
    data = Ordered(8)
    run = quiet_trainer(tmp_path, callbacks=[finder])
    run.validate(network, data, verbose=False)
    run.test(network, data, verbose=False)
    assert data.batch_size == 8


@pytest.mark.parametrize("option", [{"init_val": 0}, {"max_val": 16}, {"steps_per_trial": 0}, {"margin": 1.0}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=rf"LargestBatchFinder\.{next(iter(option))}: expected"):
        LargestBatchFinder(**option)
