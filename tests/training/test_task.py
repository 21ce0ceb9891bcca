"""Losses, metrics and balance of every task against values worked by hand, and runs that train them."""

import math

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, Dataset

from gmarpp.explainer import Explainer
from gmarpp.network.files.load import load_model
from gmarpp.network.files.save import save_weights
from gmarpp.training.evaluation import known_labels
from gmarpp.training.mixing import Mixing
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import load_classifier
from gmarpp.training.optim import Optimization
from gmarpp.training.task import TASKS

LOG3 = math.log(3)  # a logit of log 3 is a probability of 3/4


class Channels(Dataset):
    """Label c says whether channel c is bright; the last image's first label is unknown."""

    def __init__(self, count=24, kind="labels", seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (count, 3), generator=generator)
        self.images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator) + 1.5 * self.labels[..., None, None]
        if kind == "binary":
            self.labels = self.labels[:, 1]
        if kind == "values":
            self.labels = self.images.mean((2, 3))[:, :1]
        if kind == "labels":
            self.labels[-1, 0] = -1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = self.labels[index]
        return {"image": self.images[index], "label": label, "index": index, "path": f"{index}.png"}


class ChannelData(L.LightningDataModule):
    def __init__(self, kind, classes):
        super().__init__()
        self.kind, self.classes, self.class_names = kind, classes, tuple(name.upper() for name in classes)

    def train_dataloader(self):
        return DataLoader(Channels(kind=self.kind), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Channels(kind=self.kind, seed=1), batch_size=8)

    predict_dataloader = val_dataloader


def classifier(**options):
    torch.manual_seed(0)
    defaults = {"architecture": "test_vit", "image_size": 32, "pretrained": False, "model_args": {"depth": 2}}
    return ViTClassifier(**{**defaults, "optimizer": Optimization(lr=2e-3, layer_decay=1.0), **options})


def test_multilabel_loss_by_hand():
    task = TASKS["multilabel"]
    logits = torch.tensor([[LOG3, 0.0], [-LOG3, LOG3]])
    labels = task.labels(torch.tensor([[1, -1], [1, 0]]), 2)
    # -log 3/4; unknown; -log 1/4 of the missed positive; -log 1/4 of the false alarm
    terms = [-math.log(0.75), -math.log(0.25), -math.log(0.25)]
    assert task.loss(logits, labels).item() == pytest.approx(sum(terms) / 3)
    assert task.losses(logits, labels).tolist() == pytest.approx([terms[0], (terms[1] + terms[2]) / 2])
    weighted = task.loss(logits, labels, weights=torch.tensor([2.0, 5.0]))
    assert weighted.item() == pytest.approx((2 * terms[0] + 2 * terms[1] + terms[2]) / 3), "of positives alone"
    # smoothing of 0.2: targets 0.9 and 0.1
    smoothed = [0.9 * terms[0] + 0.1 * terms[1], 0.9 * terms[1] + 0.1 * terms[0], 0.1 * terms[0] + 0.9 * terms[2]]
    assert task.loss(logits, labels, smoothing=0.2).item() == pytest.approx(sum(smoothed) / 3)


def test_multilabel_metrics_by_hand():
    task = TASKS["multilabel"]
    metrics = task.collection(2, "val/")
    logits = torch.tensor([[3.0, 0.9], [2.0, 0.8], [1.0, 0.1], [-1.0, 0.5]])
    labels = torch.tensor([[1, 0], [0, 1], [1, 0], [-1, 0]])
    for part in (slice(0, 2), slice(2, 4)):  # the second column alone could be taken for probabilities
        metrics.update(task.predictions(logits[part]), labels[part])
    values = metrics.compute()
    # label 0: positives at ranks 1 and 3 of 3; label 1: its one positive at rank 2 of 4
    assert values["val/average_precision"].item() == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # all known logits are above 0: precision 2/3 and 1/4, recall 1 and 1
    assert values["val/f1"].item() == pytest.approx((0.8 + 0.4) / 2)


def test_binary_loss_and_metrics_by_hand():
    task = TASKS["binary"]
    logits, labels = torch.tensor([[LOG3], [LOG3], [-LOG3], [0.1]]), task.labels(torch.tensor([1, 0, 0, -1]), 1)
    assert task.loss(logits, labels).item() == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3)
    metrics = task.collection(1, "")
    metrics.update(task.predictions(logits), labels)
    values = {name: value.item() for name, value in metrics.compute().items()}
    # of the positive and two negatives, one negative ties with the positive, the other lies below it
    assert values == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3, "average_precision": 1 / 2, "auroc": 3 / 4})


def test_regression_loss_and_metrics_by_hand():
    task = TASKS["regression"]
    values, labels = torch.tensor([[1.0], [2.0], [5.0]]), task.labels(torch.tensor([1.0, 4.0, 4.0]), 1)
    assert task.loss(values, labels).item() == pytest.approx(5 / 3)
    assert task.losses(values, labels).tolist() == [0, 4, 1]
    metrics = task.collection(1, "")
    metrics.update(task.predictions(values), labels)
    # mean 3, squares around it 4 + 1 + 1
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx({"mae": 1, "r2": 1 / 6})
    assert known_labels(torch.tensor([[1.0, math.nan], [0.0, 2.0]])).tolist() == [False, True]


def test_multiclass_weights_are_torchs():
    logits, labels = torch.tensor([[LOG3, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    weighted = TASKS["multiclass"].loss(logits, labels, weights=torch.tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx((-math.log(0.75) - 3 * math.log(0.5)) / 4)


def test_balance_by_hand():
    assert TASKS["multiclass"].balance(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2])
    labels = torch.tensor([[1, 1], [0, 1], [0, 0], [0, -1]])
    assert TASKS["multilabel"].balance(labels, 2).tolist() == [3, 0.5]
    with pytest.raises(ValueError, match=r"balanced: no training image for the outputs \[1\]"):
        TASKS["multiclass"].balance(torch.tensor([0, 2]), 3)


@pytest.mark.parametrize(
    ("task", "kind", "classes", "metric"),
    [
        ("binary", "binary", ("dark", "bright"), "val/accuracy"),
        ("multilabel", "labels", ("red", "green", "blue"), "val/average_precision"),
        ("regression", "values", ("redness",), "val/r2"),
    ],
)
def test_learns_and_is_explained_as_what_it_is(tmp_path, task, kind, classes, metric):
    data = ChannelData(kind, classes)
    weights = None if task == "regression" else "balanced"
    network = classifier(task=task, class_weights=weights, num_classes=3 if task == "multilabel" else None)
    run = quiet_trainer(tmp_path, enable_checkpointing=False, max_epochs=20, check_val_every_n_epoch=20)
    run.fit(network, data)
    assert run.callback_metrics[metric] > 0.9
    assert network.classes == {"binary": ("bright",)}.get(task, classes), "an output has the name of its label"
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = load_classifier(tmp_path / "run.ckpt")
    assert loaded.hparams["task"] == loaded.model.task == task
    save_weights(loaded.model, tmp_path / "run.safetensors")
    assert load_model(tmp_path / "run.safetensors").task == task
    assert load_classifier(tmp_path / "run.safetensors").hparams["task"] == task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "--model.task: unknown task 'ranking': choose from multiclass, binary"),
        ({"task": "binary", "num_classes": 2}, "--model.num_classes: expected 1 for --model.task binary, got 2"),
        ({"task": "multilabel"}, "--model.num_classes: expected at least 1 for --model.task multilabel, got None"),
        ({"num_classes": 1}, "--model.num_classes: expected at least 2 for --model.task multiclass, got 1"),
        (
            {"task": "multilabel", "num_classes": 3, "mixing": Mixing(cutmix=1.0)},
            "--model.mixing.cutmix: cannot be used with --model.task multilabel",
        ),
        (
            {"task": "regression", "mixing": Mixing(label_smoothing=0.1)},
            "--model.mixing.label_smoothing: cannot be used with --model.task regression",
        ),
        ({"task": "regression", "class_weights": "balanced"}, "--model.class_weights: --model.task regression has no"),
    ],
)
def test_options_that_exclude_each_other_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"num_classes": 3}, ChannelData("labels", ()), r"task multiclass: expected labels of one class.*\(8, 3\)"),
        ({"task": "multilabel", "num_classes": 2}, ChannelData("labels", ()), r"each of 2 labels.*int64 \(8, 3\)"),
        ({"task": "regression"}, ChannelData("binary", ()), r"task regression: expected.* 1 values.*int64 \(8,\)"),
        ({"num_classes": 2, "class_weights": [1.0]}, ChannelData("binary", ()), "for each of 2 classes, got 1"),
        ({"num_classes": 2, "class_weights": [1.0, 0.0]}, ChannelData("binary", ()), "class_weights: expected a num"),
    ],
)
def test_labels_and_weights_that_do_not_fit_are_named(tmp_path, options, data, message):
    run = quiet_trainer(tmp_path, enable_checkpointing=False, max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=message):
        run.fit(classifier(**options), data)


def test_checkpoints_from_before_there_were_tasks_are_multiclass(tmp_path):
    network = classifier(num_classes=3)
    run = quiet_trainer(tmp_path, enable_checkpointing=False, max_steps=1)
    run.fit(network, ChannelData("binary", ()))
    run.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    for name in ("task", "class_weights"):
        del content["hyper_parameters"][name]
    torch.save(content, tmp_path / "old.ckpt")
    old = load_classifier(tmp_path / "old.ckpt")
    assert old.hparams["task"] == old.model.task == "multiclass"
    images = Channels().images
    assert torch.equal(old(images), network.eval()(images))
    assert Explainer(["rollout"], metrics=[]).score in (None, "probability")
