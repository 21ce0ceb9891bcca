import pickle

import numpy as np
import pytest
import torch
from miniature import PLAIN, picture
from PIL import Image

from gmarpp.data import Augmentation, EvaluationTransform, TrainingTransform
from gmarpp.data.dataset import Files, ImageDataset


@pytest.fixture
def files(tmp_path):
    for k in range(3):
        picture(k).save(tmp_path / f"bild-ä{k}.png")
    boxes = np.array([[0, 0, 63, 63], [10, 20, 10, 20], [0, 32, 44, 62]])
    return Files(tmp_path, [f"bild-ä{k}.png" for k in range(3)], boxes)


def test_sample(files):
    dataset = ImageDataset(files, np.array([4, 5, -1]), EvaluationTransform(PLAIN), rows=np.array([2, 1]))
    assert len(dataset) == 2
    sample = dataset[0]
    assert (sample["label"], sample["index"], sample["path"]) == (-1, 0, "bild-ä2.png")
    # 64 to 16 pixels is a quarter; corners inclusive 0, 32, 44, 62 are edges 0, 32, 45, 63
    assert sample["box"].tolist() == [0, 8, 11.25, 15.75]
    # a box of one pixel keeps an area
    assert dataset[1]["box"].tolist() == [2.5, 5, 2.75, 5.25]


def test_random_numbers_follow_from_seed_epoch_and_index(files):
    transform = TrainingTransform(PLAIN, Augmentation(policy="trivialaugment", erasing=0.5))
    labels = np.zeros(3, dtype=int)
    dataset = ImageDataset(files, labels, transform, seed=1)
    image = dataset[1, 0]["image"]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(dataset[1, 0]["image"], image)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(dataset[1, 1]["image"], image)
    assert not torch.equal(ImageDataset(files, labels, transform, seed=2)[1, 0]["image"], image)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 0]["image"], image)


def test_index_is_compact(tmp_path):
    paths = [f"train/n01443537/images/n01443537_{k}.JPEG" for k in range(100_000)]
    files = Files(tmp_path, paths, np.zeros((100_000, 4), np.int16))
    assert len(pickle.dumps(ImageDataset(files, np.zeros(100_000, int), EvaluationTransform(PLAIN)))) < 8_000_000
    assert files.path(99_999) == paths[-1]


def test_masks_of_another_size_are_fitted(tmp_path):
    picture(0, (40, 20)).save(tmp_path / "image.png")
    values = np.zeros((10, 20), np.uint8)
    values[:5] = 1
    Image.fromarray(values).save(tmp_path / "mask.png")
    Image.fromarray(values.T).save(tmp_path / "upright.png")

    def mask(name):
        files = Files(tmp_path, ["image.png"], masks=[str(tmp_path / name)])
        return ImageDataset(files, np.array([-1]), EvaluationTransform(PLAIN))[0]["mask"]

    assert mask("mask.png").tolist() == [[True] * 16] * 8 + [[False] * 16] * 8
    with pytest.raises(
        ValueError, match=r"upright\.png: expected the aspect ratio of image image\.png, 40x20, got 10x20"
    ):
        mask("upright.png")


@pytest.mark.parametrize("box", [[0, 0, 64, 63], [0, 0, 63, 64], [-1, 0, 5, 5], [0, 9000, 10, 9001]])
def test_boxes_outside_of_their_image_are_named(tmp_path, box):
    picture(0).save(tmp_path / "image.png")
    files = Files(tmp_path, ["image.png"], np.array([box]))
    with pytest.raises(ValueError, match=rf"box of .*image\.png has corners \[{box[0]}, .* in its 64x64 pixels"):
        files.read(0)
