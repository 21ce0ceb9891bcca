import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from squares import ColouredSquares, Squares
from torch.utils.data import DataLoader

from gmarpp.callbacks import PeakLearningRateFinder
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization


class Ordered(Squares):
    def train_dataloader(self):
        return DataLoader(ColouredSquares(24, 3, seed=0), batch_size=8)


class Steps(L.Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(folder, lr, *finder, resume=None, **options):
    torch.manual_seed(0)
    network = ViTClassifier(
        "test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, drop_path=0.2,
        optimizer=Optimization(lr=lr, lr_batch_size=16, layer_decay=0.5, warmup=0.3),
    )  # fmt: skip
    steps = Steps()
    run = quiet_trainer(
        folder,
        enable_checkpointing=False,
        callbacks=[steps, *finder],
        **{"max_epochs": 2, **options},
    )
    torch.manual_seed(5)
    run.fit(network, Ordered(), ckpt_path=resume)
    return network, steps, run


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 6}])
def test_run_with_a_search_is_the_run_at_the_found_rate(tmp_path, limits):
    finder = PeakLearningRateFinder(max_lr=1.0, num_training_steps=30)
    searched, steps, _ = fit(tmp_path, 1e-3, finder, **limits)
    found = searched.optimization.lr
    assert found != 1e-3
    # batches of 8 train at half of a rate that is meant for 16
    assert finder.optimal_lr.suggestion() == pytest.approx(found / 2)
    _, expected, _ = fit(tmp_path, found, **limits)
    assert steps.losses == pytest.approx(expected.losses, rel=1e-6)
    for ours, theirs in zip(steps.rates, expected.rates, strict=True):
        assert ours == pytest.approx(theirs)
    assert len(set(steps.rates[0])) > 2, "layers have rates of their own"
    assert not list(tmp_path.glob(".lr_find*"))


def test_groups_keep_their_shares_during_the_search(tmp_path, monkeypatch):
    seen = []
    step = ViTClassifier.optimizer_step

    def watched(self, epoch, batch_idx, optimizer, closure):
        step(self, epoch, batch_idx, optimizer, closure)
        seen.append([group["lr"] for group in optimizer.param_groups])

    monkeypatch.setattr(ViTClassifier, "optimizer_step", watched)
    fit(tmp_path, 1e-3, PeakLearningRateFinder(min_lr=1e-6, max_lr=1e-2, num_training_steps=15), max_epochs=1)
    search = seen[:15]
    assert max(search[0]) == pytest.approx(1e-6)
    assert max(search[14]) > 3e-3
    for rates in search:
        # embedding, two blocks, head: 0.5 ** 3 to 1, each with and without weight decay
        assert sorted({round(rate / max(rates), 6) for rate in rates}) == [0.125, 0.25, 0.5, 1]


def test_divergence_ends_neither_search_nor_run(tmp_path):
    finder = PeakLearningRateFinder(min_lr=1e-6, max_lr=1e30, num_training_steps=60, early_stop_threshold=None)
    network, steps, _ = fit(tmp_path, 1e-3, finder)
    assert not torch.tensor(finder.optimal_lr.results["loss"]).isfinite().all()
    assert network.stops_at_divergence
    assert len(steps.losses) == 6


def test_too_short_a_search_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"losses of the search: raise its num_training_steps"):
        fit(tmp_path, 1e-3, PeakLearningRateFinder(num_training_steps=13, early_stop_threshold=1.0001))


@pytest.mark.parametrize(
    "option", [{"min_lr": -1}, {"max_lr": 1e-8}, {"num_training_steps": 12}, {"early_stop_threshold": 1}]
)
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=rf"PeakLearningRateFinder\.{next(iter(option))}: expected"):
        PeakLearningRateFinder(**option)


def test_resumed_run_keeps_its_rate(tmp_path):
    _, _, run = fit(tmp_path, 1e-3, max_epochs=1)
    run.save_checkpoint(tmp_path / "run.ckpt")
    finder = PeakLearningRateFinder()
    network, _, _ = fit(tmp_path, 1e-3, finder, resume=tmp_path / "run.ckpt")
    assert network.optimization.lr == 1e-3
    assert finder.optimal_lr is None
