"""The predict loop driven from Python: a network of one's own, and targets that no command line can name."""

import csv

import pytest
import torch
from PIL import Image
from quiet_trainer import quiet_trainer
from small_networks import vit

import gmarpp
from gmarpp.callbacks import ExplanationWriter
from gmarpp.data import ImageFolder
from gmarpp.explainer import Explainer
from gmarpp.run.reader import load_explanations
from gmarpp.training.pretrained_classifier import PretrainedClassifier

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def top_two(output):
    return output.topk(2, dim=1).values.sum(dim=1)


@pytest.fixture
def folder(tmp_path):
    numbers = torch.Generator().manual_seed(0)
    for position in range(5):
        folder = tmp_path / "photos" / CLASSES[position]
        folder.mkdir(parents=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=numbers, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{position}.png")
    return tmp_path


def predict(folder, target, **options):
    network = vit()
    network.classes = network.class_names = CLASSES
    module = PretrainedClassifier(network)
    module.explainer = Explainer(["gmarpp_l1"], target, ["insertion_auc", "deletion_auc"], steps=4, score="logit")
    data = ImageFolder(str(folder / "photos"), labelled=True, num_workers=0, batch_size=1, **options)
    batches = quiet_trainer(folder, callbacks=[ExplanationWriter(str(folder / "out"))]).predict(module, data)
    with (folder / "out/explanations.csv").open(newline="") as file:
        return batches, list(csv.DictReader(file)), network


@pytest.mark.parametrize(
    ("target", "described", "named"),
    [
        (top_two, "test_predict_from_python.top_two", [""] * 5),
        (gmarpp.Contrast("dog", 0), "dog against 0", ["dog"] * 5),
    ],
)
def test_a_target_of_python_is_explained_described_and_written(folder, target, described, named):
    batches, rows, network = predict(folder, target)
    assert [row["target_name"] for row in rows] == named
    run = load_explanations(folder / "out")
    assert run.run["explainer"]["target"] == described
    images = torch.cat([batch.images for batch in batches])
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = gmarpp.explain(network, (images - mean) / std, ["gmarpp_l1"], target)
    torch.testing.assert_close(run.maps("gmarpp_l1"), expected.maps["gmarpp_l1"], rtol=1e-3, atol=1e-6)


def test_batches_of_which_nothing_can_be_read_are_skipped_with_any_network(folder):
    (folder / "photos/cat/2.png").write_bytes(b"")
    batches, rows, _ = predict(folder, "predicted", on_error="skip")
    assert [row["path"] for row in rows] == ["ant/0.png", "bee/1.png", "dog/3.png", "eel/4.png"]
    assert len([batch for batch in batches if batch is not None]) == 4
