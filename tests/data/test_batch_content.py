from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from gmarpp.data.batch_content import batch_content

IMAGES, LABELS = torch.rand(2, 3, 4, 4), torch.tensor([3, 1])
INDEX, SCORES = torch.tensor([7, 8]), torch.rand(2)


@dataclass
class Batch:
    picture: torch.Tensor
    category: torch.Tensor


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS.int(), SCORES, ["a", "b"]],
        Pair(LABELS, IMAGES),
        {"anything": IMAGES, "number": LABELS},
        {"image": IMAGES, "label": LABELS, "index": INDEX, "mask": torch.rand(2, 1, 4, 4)},
        UserDict(pixel_values=IMAGES, labels=LABELS, index=INDEX),
        Batch(IMAGES, LABELS),
        (IMAGES, {"target": LABELS, "id": INDEX}),
        {"data": {"image": IMAGES, "depth": torch.rand(2, 1, 4, 4)}, "y": LABELS, "fold": INDEX},
    ],
)
def test_images_and_labels_are_found_wherever_they_are(batch):
    content = batch_content(batch, [4, 9])
    assert content["image"] is IMAGES
    assert content["label"].dtype == torch.int64
    assert content["label"].tolist() == [3, 1]
    assert content["index"].tolist() == [4, 9]
    assert content["path"] == ["image 4", "image 9"]
    assert not {"box", "mask"} & content.keys()


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), (IMAGES, SCORES), (IMAGES, LABELS, INDEX), (IMAGES, LABELS[:1])])
def test_labels_that_are_not_told_are_unknown(batch):
    assert batch_content(batch)["label"].tolist() == [-1, -1]


def test_paths_boxes_and_masks_of_dictionaries_are_kept():
    box, mask = torch.tensor([[0.0, 0, 2, 2]] * 2), torch.ones(2, 4, 4, dtype=torch.bool)
    content = batch_content({"image": IMAGES, "path": ["a.png", "b.png"], "box": box, "mask": mask})
    assert content["path"] == ["a.png", "b.png"]
    assert content["box"] is box
    assert content["mask"] is mask
    assert "mask" not in batch_content({"image": IMAGES, "mask": mask.long()})


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        ((IMAGES.mul(255).byte(), LABELS), r"0: torch.uint8 \(2, 3, 4, 4\), 1: torch.int64 \(2,\)"),
        ((IMAGES, IMAGES), r"0: torch.float32 \(2, 3, 4, 4\), 1: torch.float32"),
        ({"view": [IMAGES], "other": [IMAGES]}, r"view.0: torch.float32"),
        ("words", "got str"),
    ],
)
def test_no_image_or_several_is_an_error_that_tells_what_there_is(batch, given):
    with pytest.raises(ValueError, match=rf"expected one floating-point tensor of images .*{given}.*the key image"):
        batch_content(batch)
