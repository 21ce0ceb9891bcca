"""What is scored: every target that `gmarpp.explain` takes, in every unit."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import vit

import gmarpp
from gmarpp.explainer import Explainer
from gmarpp.perturbation import perturbation_curves, rank_patches, road_scores, score_perturbations

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def model():
    network = vit()
    network.class_names = NAMES
    return network


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps():
    return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def deletion_outputs(model, images, maps, steps=4):
    """The network's outputs (S + 1, B, C) on images of which a growing share is replaced by their mean color."""
    outputs = []
    for step in range(steps + 1):
        keep = (rank_patches(maps) >= 16 * step // steps).view(-1, 1, 4, 4)
        mask = keep.repeat_interleave(8, 2).repeat_interleave(8, 3)
        outputs.append(model(torch.where(mask, images, images.mean((2, 3), keepdim=True))))
    return torch.stack(outputs)


def deletion(model, images, maps, target, **options):
    return perturbation_curves(model, images, maps, target, 4, "mean", **options).deletion


UNITS = {"probability": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "logit": lambda z: z}


@pytest.mark.parametrize("score", UNITS)
def test_every_kind_of_class_target(model, images, maps, score):
    scores = UNITS[score](deletion_outputs(model, images, maps))
    predicted = scores[0].argmax(1)
    for target, classes in (
        (None, predicted),
        (3, torch.tensor([3, 3, 3])),
        ("dog", torch.tensor([3, 3, 3])),
        ("2", torch.tensor([2, 2, 2])),
        (["bee", 4, "ant"], torch.tensor([1, 4, 0])),
        (torch.tensor([4, 0, 1], dtype=torch.int32), torch.tensor([4, 0, 1])),
    ):
        expected = scores[:, torch.arange(3), classes].T
        torch.testing.assert_close(deletion(model, images, maps, target, score=score), expected)
    difference = scores[:, torch.arange(3), predicted] - scores[:, :, 1]
    torch.testing.assert_close(
        deletion(model, images, maps, gmarpp.Contrast(None, "bee"), score=score), difference.T, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("mask", ["topk", "soft"])
def test_a_function_is_scored_by_its_value_and_may_know_its_images(model, images, maps, mask):
    """A text per image, for example: rows must be the images in their order, whatever is perturbed."""
    texts = F.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)), dim=1)

    def similarity(output):
        return (F.normalize(output, dim=1) * texts).sum(1)

    outputs = deletion_outputs(model, images, maps)
    expected = torch.stack([similarity(output) for output in outputs], dim=1)
    scores = score_perturbations(
        model, images, {"a": maps, "b": -maps}, similarity, steps=4, baseline="mean", batch_size=2, mask=mask
    )
    torch.testing.assert_close(scores.deletion["a"], expected)
    torch.testing.assert_close(scores.insertion["b"], expected.flip(1))
    torch.testing.assert_close(scores.full, expected[:, 0])
    chosen = torch.tensor([4, 0, 2])
    by_class, by_function = (
        score_perturbations(model, images, {"a": maps, "b": -maps}, target, score="logit", mask=mask)
        for target in (chosen, lambda output: output[torch.arange(3), chosen])
    )
    torch.testing.assert_close(by_function.kept["b"], by_class.kept["b"])
    roads = [
        road_scores(model, images, {"a": maps}, target, score="logit", fractions=(0.25, 0.5))
        for target in (chosen, lambda output: output[torch.arange(3), chosen])
    ]
    torch.testing.assert_close(roads[0].most_relevant_first, roads[1].most_relevant_first, atol=1e-3, rtol=1e-3)


def test_a_function_scores_dropped_tokens(model, images, maps):
    expected = perturbation_curves(model, images, maps, 1, 4, "drop", score="logit")
    found = perturbation_curves(model, images, maps, lambda output: output[:, 1], 4, "drop")
    torch.testing.assert_close(found.insertion, expected.insertion)


def test_what_explain_says_of_a_function_cannot_be_taken_for_a_class(model, images):
    def margin(output):
        return output[:, 2] - output[:, 4]

    explained = gmarpp.explain(model, images, "gmarpp_l1", margin)
    torch.testing.assert_close(explained.scores, margin(model(images)).detach())
    assert explained.target.tolist() == [-1, -1, -1]
    words = {text.get_text() for text in explained.show().axes[0].texts}
    assert {f"score {float(score):.3g}" for score in explained.scores} <= words
    with pytest.raises(ValueError, match=r"got -1, .* pass the function itself"):
        perturbation_curves(model, images, explained.maps["gmarpp_l1"], explained.target)


def test_scores_are_what_was_explained(model, images):
    logits = model(images).detach()
    pairs = torch.tensor([[0, 3], [4, 1], [2, 2]])
    torch.testing.assert_close(gmarpp.explain(model, images, "rollout", pairs).scores, logits.gather(1, pairs))
    torch.testing.assert_close(gmarpp.explain(model, images, "rollout").scores, logits.amax(1))
    contrast = gmarpp.explain(model, images, "rollout", gmarpp.Contrast("cat", 0))
    torch.testing.assert_close(contrast.scores, logits[:, 2] - logits[:, 0])


def test_several_classes_per_image_are_scored_one_by_one(model, images):
    explained = gmarpp.explain(model, images, "gmarpp_l1", [[0, 3], [4, 1], [2, 2]])
    maps = explained.maps["gmarpp_l1"]
    with pytest.raises(ValueError, match=r"\(3, 2\): for several classes.* target\[:, k\] and maps\[:, k\]"):
        perturbation_curves(model, images, maps[:, 0], explained.target)
    with pytest.raises(ValueError, match=r"several classes per image, score each alone, with maps\[:, k\]"):
        perturbation_curves(model, images, maps, explained.target)
    column = perturbation_curves(model, images, maps[:, 1], explained.target[:, 1], 2)
    assert column.insertion.shape == (3, 3)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("fox", {}, "unknown class 'fox'"),
        (gmarpp.Contrast(0, [[1, 2]] * 3), {}, "several classes per image"),
        (lambda output: output, {}, r"one score per image, shape \(3,\), got \(3, 5\)"),
        (lambda output: 1.0, {}, r"one score per image, shape \(3,\), got float"),
        (lambda output: output[:, 0], {"score": "sigmoid"}, "scored by its own value"),
        (None, {"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_targets_that_cannot_be_scored(model, images, maps, target, options, message):
    with pytest.raises(ValueError, match=message):
        perturbation_curves(model, images, maps, target, **options)


class TestOneOutput:
    """A binary classifier of one logit: its softmax is 1 on every picture."""

    @pytest.fixture
    def binary(self):
        return vit(num_classes=1)

    def test_softmax_is_refused(self, binary, images, maps):
        for score in (perturbation_curves, lambda *given: road_scores(*given[:2], {"a": given[2]}, given[3])):
            with pytest.raises(ValueError, match="always 1 for a network with one output: use score 'sigmoid'"):
                score(binary, images, maps, [0, 0, 0])

    def test_sigmoid(self, binary, images, maps):
        expected = 1 / (1 + torch.exp(-deletion_outputs(binary, images, maps)[..., 0].T))
        torch.testing.assert_close(deletion(binary, images, maps, 0, score="sigmoid"), expected)
        assert len(expected.unique()) == expected.numel()

    def test_explainer(self, binary, images):
        batch = {"image": images, "label": torch.zeros(3).long(), "index": torch.arange(3), "path": list("abc")}
        with pytest.raises(ValueError, match="use score 'sigmoid' or 'logit'"):
            Explainer(["rollout"], metrics=())(binary, batch)
        logits = binary(images).detach()[:, 0]
        found = Explainer(["rollout"], score="sigmoid", steps=2)(binary, batch)
        torch.testing.assert_close(found.target_probability, logits.sigmoid())
        torch.testing.assert_close(found.curves["rollout"].deletion[:, 0], logits.sigmoid())
        unknown = Explainer(["rollout"], score="logit", metrics=())(binary, batch)
        assert unknown.target_probability.isnan().all()
