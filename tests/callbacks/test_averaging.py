import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from squares import OrderedSquares

from gmarpp.callbacks import AveragedWeights
from gmarpp.callbacks.latest_checkpoint import LatestCheckpoint
from gmarpp.training.module import ViTClassifier
from gmarpp.training.optim import Optimization


class Watch(L.Callback):
    """Keeps the trained weights of the last step, and may interrupt the validation after it."""

    def __init__(self, interrupt_after=None):
        self.interrupt_after = interrupt_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == self.interrupt_after:
            raise KeyError("interrupted")


def fit(folder, watch, resume=None, **checkpoint):
    torch.manual_seed(0)
    network = ViTClassifier(
        "test_vit", 3, 32, pretrained=False, model_args={"depth": 2}, drop_path=0.2, optimizer=Optimization(1e-2)
    )
    run = quiet_trainer(
        folder,
        max_epochs=3,
        callbacks=[
            AveragedWeights(decay=0.5),
            watch,
            LatestCheckpoint(folder, "last", save_on_exception=True, enable_version_counter=False, **checkpoint),
        ],
    )
    try:
        run.fit(network, OrderedSquares(), ckpt_path=resume)
    except KeyError:
        assert watch.interrupt_after
    return network


def saved(folder):
    content = torch.load(folder / "last.ckpt", weights_only=True)
    return content["state_dict"], content["current_model_state"]


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("interrupt_after", [6, None])
def test_last_checkpoint_holds_average_and_trained_weights(tmp_path, interrupt_after):
    """9 steps; the last checkpoint is made in the middle of a validation, or when training ends between two."""
    watch = Watch(interrupt_after)
    network = fit(tmp_path, watch, every_n_train_steps=5)
    average, trained = saved(tmp_path)
    assert equal(trained, watch.trained)
    assert equal(average, network.state_dict())
    assert not equal(average, trained)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = fit(tmp_path / "whole", Watch())
    fit(tmp_path / "broken", Watch(interrupt_after=6))
    resumed = fit(tmp_path / "resumed", Watch(), resume=tmp_path / "broken/last.ckpt")
    assert equal(whole.state_dict(), resumed.state_dict())
    for one, other in zip(saved(tmp_path / "whole"), saved(tmp_path / "resumed"), strict=True):
        assert equal(one, other)


def test_weights_alone_are_the_average(tmp_path):
    watch = Watch()
    fit(tmp_path, watch, every_n_train_steps=5)
    alone = fit(tmp_path / "alone", watch, every_n_train_steps=5, save_weights_only=True)
    average, _ = saved(tmp_path)
    content = torch.load(tmp_path / "alone/last.ckpt", weights_only=True)
    assert not {"optimizer_states", "callbacks", "current_model_state", "averaging_state"} & content.keys()
    assert equal(average, content["state_dict"])
    assert equal(alone.state_dict(), content["state_dict"])
