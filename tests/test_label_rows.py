"""Networks whose labels do not exclude each other, and those with one output, explained label by label."""

import pytest
import timm
import torch

import gmarpp
from gmarpp.explainer import Explainer
from gmarpp.metrics.functional import boxes_to_masks, pointing_game
from gmarpp.perturbation import perturbation_curves


def network(outputs, task):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=outputs
    )
    model.task = task
    model.class_names = ("ant", "bee", "cat")[:outputs]
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def several(images):
    """Three labels; of the images' logits, the first are above 0 for ant and cat, for none, and for bee."""
    model = network(3, "multilabel")
    wanted = torch.tensor([[2.0, -1.0, 1.0], [-3.0, -1.0, -2.0], [-1.0, 2.0, -1.0]])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        solution = torch.linalg.lstsq(torch.cat([features, torch.ones(3, 1)], 1).double(), wanted.double()).solution
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
        torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-2)
    return model


def batch(images, labels, **extra):
    return {"image": images, "label": labels, "index": torch.tensor([7, 8, 9]), "path": list("xyz"), **extra}


TRUTH = torch.tensor([[1, 1, 0], [0, 0, 0], [-1, 1, 1]])


def test_predicted_labels_are_rows_of_their_own(several, images):
    explainer = Explainer(["gmarpp_l1", "rollout"], metrics=["insertion_auc", "average_drop"], steps=4)
    found = explainer(several, batch(images, TRUTH))
    # ant and cat of the first image; the likeliest, bee, of the second, of which none is likely; bee of the third
    assert found.target.tolist() == [0, 2, 1, 1]
    assert found.path == ["x", "x", "y", "z"]
    assert found.index.tolist() == [21, 23, 25, 28], "three rows for each position"
    assert found.positions == [7, 8, 9]
    assert found.label.tolist() == [0, -1, -1, 1], "what the image has"
    assert found.predicted.tolist() == [0, 2, -1, 1]
    torch.testing.assert_close(found.target_probability, torch.tensor([2.0, 1, -1, 2]).sigmoid(), rtol=0, atol=1e-2)
    assert torch.equal(found.predicted_probability, found.target_probability)
    # each row is what gmarpp.explain and the curves say of that image and label
    for row, (image, label) in enumerate([(0, 0), (0, 2), (1, 1), (2, 1)]):
        one = images[image : image + 1]
        alone = gmarpp.explain(several, one, explainer.names, target=label)
        for method in explainer.names:
            torch.testing.assert_close(found.maps[method][row], alone.maps[method][0])
        curves = perturbation_curves(several, one, alone.maps["rollout"], label, steps=4, score="sigmoid")
        torch.testing.assert_close(found.curves["rollout"].insertion[row], curves.insertion[0])
    assert found.inputs["rollout"]["full"].shape == (4,)
    torch.testing.assert_close(found.images[1], found.images[0])


def test_labels_of_the_images_with_their_boxes(several, images):
    boxes = torch.zeros(3, 3, 4)
    boxes[0, 0], boxes[0, 1], boxes[2, 1] = (
        torch.tensor(box) for box in ([0.0, 0, 8, 8], [0.0, 8, 32, 32], [16.0, 0, 32, 16])
    )
    explainer = Explainer(["rollout"], target="label", metrics=["pointing_game"])
    found = explainer(several, batch(images, TRUTH, box=boxes))
    assert found.target.tolist() == found.label.tolist() == [0, 1, 1, 2]
    assert found.path == ["x", "x", "z", "z"], "the second image has no label"
    rows = [(0, 0), (0, 1), (2, 1), (2, 2)]
    expected = torch.stack([boxes[place] for place in rows])
    assert torch.equal(found.boxes, expected)
    maps = torch.cat([gmarpp.explain(several, images[i : i + 1], "rollout", target=k).maps["rollout"] for i, k in rows])
    alone = pointing_game(maps, boxes_to_masks(expected, (32, 32)), reduction="none")
    torch.testing.assert_close(found.values["rollout"]["pointing_game"], alone, equal_nan=True)
    assert alone[3].isnan(), "no box"
    assert explainer(several, batch(images, torch.zeros_like(TRUTH))) is None
    with pytest.raises(ValueError, match=r"explain\.target is label, but y has none"):
        explainer(several, batch(images, TRUTH.where(torch.tensor([[False], [True], [False]]).logical_not(), -1)))


def test_labels_asked_for_by_name(several, images):
    found = Explainer(["rollout"], target=["cat", 0], metrics=[])(several, batch(images, torch.full((3,), -1)))
    assert found.target.tolist() == [2, 0] * 3
    assert found.index.tolist() == [14, 15, 16, 17, 18, 19]
    assert found.label.tolist() == [-1] * 6
    one = Explainer(["rollout"], target="cat", metrics=[])(several, batch(images, TRUTH))
    assert (one.target.tolist(), one.index.tolist(), one.label.tolist()) == ([2] * 3, [7, 8, 9], [-1, -1, 2])
    classes = network(3, "multiclass")
    several_classes = Explainer(["rollout"], target=[0, 1], metrics=[])(classes, batch(images, torch.tensor([2, 0, 1])))
    assert several_classes.label.tolist() == [2, 2, 0, 0, 1, 1]
    assert several_classes.predicted.tolist() == classes(images).argmax(1).repeat_interleave(2).tolist()


def test_one_label_and_one_value(images):
    model = network(1, "binary")
    with torch.no_grad():
        model.head.bias.sub_(model(images)[1, 0])
        model.head.bias.add_(1e-6)
    found = Explainer(["rollout"], metrics=["insertion_auc"], steps=2)(model, batch(images, torch.tensor([1, 0, -1])))
    logits = model(images)[:, 0].detach()
    assert (found.target.tolist(), found.index.tolist()) == ([0] * 3, [7, 8, 9])
    assert found.label.tolist() == [0, -1, -1]
    assert found.predicted.tolist() == [0 if logit >= 0 else -1 for logit in logits]
    torch.testing.assert_close(found.target_probability, logits.sigmoid())
    torch.testing.assert_close(found.curves["rollout"].insertion[:, -1], logits.sigmoid())
    model.task = "regression"
    found = Explainer(["rollout"], metrics=["insertion_auc"], steps=2)(model, batch(images, torch.rand(3, 1)))
    torch.testing.assert_close(found.curves["rollout"].insertion[:, -1], logits)
    assert found.target_probability.isnan().all()
    assert found.label.tolist() == [-1] * 3
