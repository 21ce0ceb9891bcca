import math
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from signed_method import Downwards
from small_networks import vit
from torch import nn

import gmarpp
from gmarpp.explainer import FAITHFULNESS_METRICS, Explainer
from gmarpp.metrics import METRICS, Sparseness, functional, register_metric
from gmarpp.perturbation import score_perturbations


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    network.class_names = ("ant", "bee", "cat", "dog", "eel")
    return network.eval()


def batch(**extra):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {
        "image": images,
        "label": torch.tensor([4, 0, 2]),
        "index": torch.tensor([7, 8, 9]),
        "path": list("xyz"),
        **extra,
    }


def test_signed_methods_are_known(model):
    gmarpp.register_method(Downwards())
    assert Explainer(["rollout", "downwards"]).signed_methods == ("downwards",)
    assert Explainer(["rollout"]).signed_methods == ()
    found = gmarpp.explain(model, batch()["image"], ["rollout", Downwards()])
    assert found.signed_methods == ("downwards",)
    assert (found.maps["downwards"][0, 0] < 0).all()


@dataclass
class Changeable(gmarpp.MapMethod):
    name: str = "changeable"
    label: str = "Changeable"

    def maps(self, model, images, target):
        return images.detach()


def test_objects_are_taken_once_and_known_by_their_names(model):
    explainer = Explainer(["rollout", Changeable(), "gmar++", Changeable(), "changeable"], metrics=[])
    assert explainer.names == ("rollout", "changeable", "gmarpp_l1")
    explained = explainer(model, batch())
    patches = batch()["image"].mean(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4))
    torch.testing.assert_close(explained.maps["changeable"], patches)
    assert replace(explainer, metrics=["sparseness"]).names == explainer.names
    with pytest.raises(ValueError, match="'changeable' is the name of another method"):
        Explainer([Changeable(label="Other")])


@pytest.mark.parametrize(("value", "got"), [(torch.ones(()), r"\(\)"), (1.0, "float")])
def test_a_metric_without_a_value_per_image_is_named(model, value, got):
    register_metric("whole", Sparseness, lambda maps, reduction: value)
    with pytest.raises(ValueError, match=rf"whole: expected a value per image, shape \(3,\).*, got {got}"):
        Explainer(["rollout"], metrics=["whole"])(model, batch())


def test_gives_maps_and_metrics_per_image(model):
    boxes = torch.tensor([[0.0, 0, 16, 16], [8, 8, 32, 32], [5, 5, 5, 5]])
    explainer = Explainer(["gmar++", "rollout"], metrics=(*FAITHFULNESS_METRICS, "energy_inside", "road"), steps=4)
    explained = explainer(model, batch(box=boxes))
    assert explainer.methods == ("gmarpp_l1", "rollout")
    alone = gmarpp.explain(model, batch()["image"], explainer.methods)
    scores = score_perturbations(model, batch()["image"], alone.maps, alone.target, steps=4)
    probabilities = model(batch()["image"]).softmax(1).detach()
    torch.testing.assert_close(explained.predicted_probability, probabilities.amax(1))
    assert torch.equal(explained.target, explained.predicted)
    assert torch.equal(explained.predicted, probabilities.argmax(1))
    for method in explainer.methods:
        assert torch.equal(explained.maps[method], alone.maps[method])
        values = explained.values[method]
        drop = 100 * (scores.full - scores.kept[method]).clamp(min=0) / scores.full
        torch.testing.assert_close(values["average_drop"], drop)
        curve = scores.insertion[method]
        torch.testing.assert_close(values["insertion_auc"], ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1))
        assert values["energy_inside"][:2].isfinite().all()
        assert values["energy_inside"][2].isnan(), "an empty box defines no value"
        assert set(values) == set(explainer.metrics)
        torch.testing.assert_close(explained.curves[method].deletion, scores.deletion[method])
    assert explained.images.min() >= 0
    torch.testing.assert_close(explained.images[0, 0, 0, 0], (batch()["image"][0, 0, 0, 0] / 4 + 0.5).clamp(0, 1))


def test_inputs_feed_every_metric(model):
    explainer = Explainer(["gmarpp_l1"], metrics=tuple(METRICS), steps=4)
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 4:20] = True
    explained = explainer(model, batch(mask=masks))
    for name, metric in METRICS.items():
        accumulated = metric()
        arguments = {key: explained.inputs["gmarpp_l1"][key] for key in gmarpp.explainer.metric_inputs(name)}
        accumulated.update(**arguments)
        values = explained.values["gmarpp_l1"][name]
        assert accumulated.compute().item() == pytest.approx(values.nanmean().item(), rel=1e-5), name
        assert callable(getattr(functional, name))


class Pair(nn.Module):
    """Two networks of known families, of which one makes the logits."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images):
        return self.first(images)


def of_first(network):
    return gmarpp.architecture_of(network.first)


@pytest.mark.parametrize("given", ["first", f"{__name__}.of_first", of_first, gmarpp.architecture_of])
def test_an_architecture_is_named_described_or_given(model, given):
    pair = Pair(model, vit())
    architecture = given(model) if given is gmarpp.architecture_of else given
    explained = Explainer(["gmarpp_l1"], metrics=[], architecture=architecture)(pair, batch())
    expected = gmarpp.explain(model, batch()["image"], "gmarpp_l1").maps["gmarpp_l1"]
    torch.testing.assert_close(explained.maps["gmarpp_l1"], expected)


def test_scores_nothing_when_no_metric_asks_for_it(model, monkeypatch):
    monkeypatch.setattr("gmarpp.explainer.score_perturbations", None)
    explained = Explainer(["rollout"], metrics=["sparseness", "pointing_game"])(model, batch())
    assert explained.curves == {}
    assert explained.values["rollout"]["sparseness"].isfinite().all()
    assert explained.values["rollout"]["pointing_game"].isnan().all(), "the data has neither boxes nor masks"


@pytest.mark.parametrize(
    ("target", "expected"), [("label", [4, 0, 2]), ("dog", [3, 3, 3]), (1, [1] * 3), ("2", [2] * 3)]
)
def test_targets(model, target, expected):
    assert Explainer(["rollout"], target, metrics=())(model, batch()).target.tolist() == expected


def test_bad_options_are_named(model):
    with pytest.raises(ValueError, match="unknown method 'gradcam'"):
        Explainer(["gradcam"])
    with pytest.raises(ValueError, match=r"unknown metric 'auc': choose from average_drop"):
        Explainer(metrics=["auc"])
    with pytest.raises(ValueError, match=r"explain.baseline: unknown baseline 'white': choose from blur, mean"):
        Explainer(baseline="white")
    with pytest.raises(ValueError, match=r"explain.mask: unknown mask 'hard': choose from topk, soft"):
        Explainer(mask="hard")
    with pytest.raises(ValueError, match=r"explain.mask soft fades patches, but explain.baseline drop can only"):
        Explainer(mask="soft", baseline="drop")
    assert Explainer(mask="soft", baseline="drop", metrics=["insertion_auc"]).mask == "soft"
    with pytest.raises(ValueError, match=r"explain.methods: expected at least one"):
        Explainer([])
    with pytest.raises(ValueError, match=r"explain\.steps: expected a number of at least 1, got 0"):
        Explainer(steps=0)
    with pytest.raises(ValueError, match=r"explain\.target: expected at least one class, got none"):
        Explainer(target=[])
    with pytest.raises(ValueError, match="target is label, but y has none"):
        Explainer(target="label")(model, batch(label=torch.tensor([1, -1, 2])))
    with pytest.raises(ValueError, match="unknown class 'do': did you mean dog"):
        Explainer(target="do")(model, batch())
    assert math.isfinite(Explainer().steps)


def test_pictures_boxes_and_masks_are_cut_to_what_the_network_sees():
    model, images = vit(img_size=30), torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    explained = gmarpp.explain(model, images, "rollout")
    torch.testing.assert_close(explained.images, (images[..., :24, :24] / 4 + 0.5).clamp(0, 1))
    assert explained.overlay().size == (24, 24)
    batch = {"image": images, "label": torch.zeros(2).long(), "index": torch.arange(2), "path": list("ab")}
    explainer = Explainer(["rollout"], metrics=["energy_inside"])
    found = explainer(model, {**batch, "box": torch.tensor([[8.0, 0, 30, 16], [0, 0, 24, 24]])})
    assert found.images.shape == (2, 3, 24, 24)
    assert found.boxes.tolist() == [[8, 0, 24, 16], [0, 0, 24, 24]]
    assert found.values["rollout"]["energy_inside"][1] == 1
    masks = torch.zeros(2, 30, 30, dtype=torch.bool)
    masks[:, :16, 8:] = True
    masked = explainer(model, {**batch, "mask": masks})
    assert torch.equal(masked.masks, masks[:, :24, :24])
    assert masked.values["rollout"]["energy_inside"][0] == found.values["rollout"]["energy_inside"][0]
