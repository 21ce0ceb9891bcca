"""What max-sensitivity and infidelity are made of, against loops over samples."""

import pytest
import torch
from small_networks import CLASS_1, ONES, PatchSum, batch, vit

import gmarpp
from gmarpp.explainer import Explainer
from gmarpp.metrics.functional import infidelity, max_sensitivity
from gmarpp.perturbation import map_changes, square_removals
from gmarpp.targets import Region

METHODS = ["gmarpp_l1", "rollout"]


def test_changes_of_maps_under_noise():
    model, (images, _, _) = vit(), batch()
    found = map_changes(model, images, METHODS, samples=3, noise=0.5, seed=4)
    generator, target = torch.Generator().manual_seed(4), model(images).argmax(1)
    maps = gmarpp.explain(model, images, METHODS, target).maps
    for sample in range(3):
        noise = torch.rand(3, 32, 32, generator=generator) - 0.5
        assert noise.abs().max() < 0.5
        noisy = gmarpp.explain(model, images + noise, METHODS, target).maps
        for method in METHODS:
            expected = [(a - b).norm() / b.norm() for a, b in zip(noisy[method], maps[method], strict=True)]
            torch.testing.assert_close(found[method][:, sample], torch.stack(expected), rtol=1e-4, atol=1e-6)
    alone = map_changes(model, images[1:2], "rollout", samples=3, noise=0.5, seed=4)
    torch.testing.assert_close(alone["rollout"], found["rollout"][1:2], rtol=1e-3, atol=1e-5)


def test_a_predicted_class_stays_that_of_the_image():
    """Noise so large that the prediction changes."""
    model, (images, _, _) = vit(), batch()
    model.head.bias.data -= model(images).mean(0).detach()
    predicted = model(images).argmax(1)
    noise = 20 * (2 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1)
    assert (model(images + noise).argmax(1) != predicted).any()
    following = (predicted + 1) % 5
    against = gmarpp.Contrast(following, None), gmarpp.Contrast(following, predicted)
    for target, fixed in ((None, predicted), against):
        found, expected = (map_changes(model, images, "chefer", each, samples=1, noise=20) for each in (target, fixed))
        assert torch.equal(found["chefer"], expected["chefer"])


def test_a_map_of_zeros_has_no_relative_change():
    blank = gmarpp.FunctionMethod("blank", lambda model, images, target: images * 0)
    assert map_changes(vit(), batch()[0], blank, samples=1)["blank"].isnan().all()


def test_squares_of_a_sum_are_forecast_without_error():
    """The score is a weighted sum of patches, so that its terms are the true map, in any unit."""
    weights = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    true = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), 8) * weights
    maps = {"true": 7 * true, "even": torch.ones(2, 8, 8)}
    found = square_removals(PatchSum(weights), images, maps, [1, 1], baseline="black", score="logit", samples=12)
    torch.testing.assert_close(7 * found.score_drops, found.removed_relevance["true"], rtol=1e-4, atol=1e-4)
    # Squares of one patch to half the grid; the even map's sums are their sizes.
    sizes = found.removed_relevance["even"]
    assert torch.equal(sizes[0], sizes[1])
    assert set(sizes[0].tolist()) == {1, 4, 9, 16}
    errors = {method: infidelity(removed, found.score_drops) for method, removed in found.removed_relevance.items()}
    assert errors["true"] < 1e-8 < 1e-4 < errors["even"]
    few = square_removals(
        PatchSum(weights), images, maps, [1, 1], baseline="black", score="logit", samples=12, batch_size=5
    )
    torch.testing.assert_close(few.score_drops, found.score_drops)


def test_dropped_squares_equal_those_of_the_network_without_the_tokens():
    model, (images, maps, _) = vit(), batch()
    found = square_removals(model, images, {"a": maps["method_0"]}, 2, baseline="drop", samples=6)
    every = found.removed_relevance["a"]
    single = [(index, value) for index, value in enumerate(every[0].tolist()) if value in maps["method_0"][0].flatten()]
    (sample, value), *_ = single
    patch = (maps["method_0"][0].flatten() == value).nonzero().item()
    keep = [0, *(token + 1 for token in range(16) if token != patch)]
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))[:, keep]
        without = model.forward_head(model.norm(model.blocks(tokens))).softmax(1)[:, 2]
        drops = model(images).softmax(1)[:, 2] - without
    torch.testing.assert_close(found.score_drops[:, sample], drops, rtol=1e-4, atol=1e-6)


def test_options_that_cannot_be_used():
    model, (images, maps, _) = vit(), batch()
    for call, message in (
        (
            lambda: map_changes(model, images, "rollout", samples=0),
            "at least 1 sample and noise above 0, got 0 and 0.02",
        ),
        (lambda: map_changes(model, images, "rollout", noise=0.0), "noise above 0, got 10 and 0.0"),
        (lambda: map_changes(model, images, "rollout", [[1, 2]] * 3), r"one class or score per image, got \(3, 2\)"),
        (lambda: square_removals(model, images, maps, 0, samples=0), "samples: expected at least 1, got 0"),
        (lambda: square_removals(model, images, maps, 0, baseline="white"), "unknown baseline 'white'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    one = square_removals(PatchSum([[1.0]]), ONES, {"a": torch.ones(1, 1, 1)}, CLASS_1, baseline="black", score="logit")
    assert one.score_drops.unique().tolist() == [1.0]


def test_the_explainer_measures_them_and_explains_what_explain_does():
    model, (images, _, _) = vit(), batch()
    data = {"image": images, "label": torch.zeros(3).long(), "index": torch.arange(3), "path": list("abc")}
    metrics = ("max_sensitivity", "infidelity", "insertion_auc", "road")
    contrast = gmarpp.Contrast(None, 1)
    for target, classes in ((contrast, model(images).argmax(1)), (lambda output: output[:, 1], torch.tensor([-1] * 3))):
        explained = Explainer(METHODS, target, metrics, steps=2)(model, data)
        assert torch.equal(explained.target, classes)
        maps = gmarpp.explain(model, images, METHODS, target).maps
        removals = square_removals(model, images, maps, target)
        changes = map_changes(model, images, METHODS, target)
        for method, values in explained.values.items():
            assert torch.equal(explained.maps[method], maps[method])
            error = infidelity(removals.removed_relevance[method], removals.score_drops, "none")
            torch.testing.assert_close(values["infidelity"], error)
            torch.testing.assert_close(values["max_sensitivity"], max_sensitivity(changes[method], "none"))
            curve = gmarpp.perturbation_curves(model, images, maps[method], target, 2).insertion
            torch.testing.assert_close(explained.curves[method].insertion, curve)
    assert explained.predicted.tolist() == [-1] * 3
    assert explained.target_probability.isnan().all()
    with pytest.raises(ValueError, match=r"explain.target: expected one score per image, shape \(3,\), got \(3, 5\)"):
        Explainer(METHODS, lambda output: output)(model, data)
    with pytest.raises(ValueError, match="Region: expected an output of shape"):
        Explainer(METHODS, Region([0, 0, 9, 9], 1, (32, 32)))(model, data)
