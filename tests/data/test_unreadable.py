"""Unreadable images are errors, or skipped: replaced in training, not counted in evaluation, left out of predict."""

from collections import Counter

import numpy as np
import pytest
import torch
from miniature import PLAIN, trainer
from noise import write_noise

from gmarpp.data import ImageFolder
from gmarpp.data.loader import EpochSampler, balancing_weights


@pytest.fixture
def folder(tmp_path):
    root = write_noise(tmp_path)
    for path in (root / "train/a/3.png", root / "val/b/0.png"):
        path.write_bytes(b"not an image")
    return root


def opened(root, stage, **options):
    data = ImageFolder(
        str(root), labelled=True, batch_size=4, num_workers=0, preprocessing=PLAIN, on_error="skip", **options
    )
    data.trainer = trainer()
    data.setup(stage)
    return data


def test_training_takes_the_next_image_and_tells_once(folder, caplog):
    data = opened(folder, "fit")
    loader = data.train_dataloader()
    batches = [batch for epoch in (0, 1) for batch in (loader.sampler.set_epoch(epoch), *loader)[1:]]
    assert [len(batch["image"]) for batch in batches] == [4] * 12
    assert (torch.cat([batch["label"] for batch in batches]) >= 0).all()
    assert Counter(path for batch in batches for path in batch["path"])["train/a/4.png"] == 4
    assert caplog.text.count("skipped: image") == 1
    assert "train/a/3.png cannot be read" in caplog.text


def test_evaluation_does_not_count_it(folder):
    data = opened(folder, "validate")
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[0, -1, 2]]


def test_predict_leaves_it_out(folder):
    data = opened(folder, "predict")
    assert [batch["index"].tolist() for batch in data.predict_dataloader()] == [[0, 2]]
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    assert list(data.predict_dataloader()) == [None]


def test_nothing_that_can_be_read(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected an image that can be read, got none among 24"):
        opened(folder, "fit").datasets["train"][0]


def test_without_the_option_it_is_an_error(folder):
    data = ImageFolder(str(folder), labelled=True, num_workers=0, preprocessing=PLAIN)
    data.trainer = trainer()
    data.setup("validate")
    with pytest.raises(ValueError, match=r"val/b/0\.png cannot be read"):
        list(data.val_dataloader())
    with pytest.raises(ValueError, match="on_error: unknown way 'ignore': choose from raise, skip"):
        ImageFolder(str(folder), on_error="ignore")


def test_classes_are_drawn_equally_often_on_every_number_of_ranks():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    drawn = []
    for epoch in range(30):
        samplers = [EpochSampler(labels, 2, rank, seed=0, weights=balancing_weights(labels)) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        drawn += [labels[index] for share in shares for index, _ in share]
        single = EpochSampler(labels, 1, 0, seed=0, weights=balancing_weights(labels))
        single.set_epoch(epoch)
        assert list(single)[::2] == shares[0]
    counts = Counter(drawn)
    assert all(abs(counts[label] - 1000) < 100 for label in range(3)), counts
    with pytest.raises(ValueError, match=r"balanced: expected one class per image"):
        balancing_weights(np.ones((4, 2), dtype=np.int8))


@pytest.mark.parametrize(("train", "val"), [("training", "validation"), ("Train", "dev"), ("train", "valid")])
def test_folders_of_splits_by_their_usual_names(tmp_path, train, val):
    root = write_noise(tmp_path)
    (root / "train").rename(root / train)
    (root / "val").rename(root / val)
    data = opened(root, "fit")
    assert [len(data.datasets[split]) for split in ("train", "val")] == [24, 3]


def test_two_folders_of_one_split(tmp_path):
    root = write_noise(tmp_path)
    (root / "dev").mkdir()
    with pytest.raises(ValueError, match="dev and val are both the val split: rename all but one"):
        opened(root, "fit")


def test_a_share_of_a_flat_folder(tmp_path):
    root = write_noise(tmp_path) / "train"
    (root / "a").rename(root / "valid")  # a class, since nothing is called train
    data = opened(root, "fit", val_share=0.25)
    assert data.classes == ("b", "c", "valid")
    split = {
        name: [data.datasets[name].source.path(row) for row in data.datasets[name].rows] for name in ("train", "val")
    }
    assert len(split["train"]) == 18
    assert Counter(path.split("/")[0] for path in split["val"]) == {"b": 2, "c": 2, "valid": 2}
    assert not set(split["train"]) & set(split["val"])
    reported = opened(root, "validate", val_share=0.25).datasets["val"]
    assert sorted(reported.source.path(row) for row in reported.rows) == sorted(split["val"])
