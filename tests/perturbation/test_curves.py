import math

import numpy as np
import pytest
import torch
from small_networks import CLASS_1, ONES, TRUE_MAP, WEIGHTS, PatchSum, batch, vit
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from gmarpp.explainer import metric_inputs
from gmarpp.metrics import METRICS
from gmarpp.metrics.functional import boxes_to_masks
from gmarpp.perturbation import baseline_images, perturbation_curves, rank_patches, road_scores, score_perturbations


class TestExactCurves:
    """A network that adds up its patches, all white on black: every value is known."""

    def test_true_map(self):
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 4, "black", score="logit")
        assert curves.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert curves.deletion.tolist() == [[10, 6, 3, 1, 0]]
        assert curves.insertion.tolist() == [[0, 4, 7, 9, 10]]

    def test_probabilities(self):
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 2, "black")
        torch.testing.assert_close(curves.insertion, torch.tensor([[0.0, 7.0, 10.0]]).sigmoid())
        other = perturbation_curves(PatchSum(WEIGHTS), ONES, TRUE_MAP, torch.tensor([0]), 2, "black")
        torch.testing.assert_close(other.insertion, 1 - torch.tensor([[0.0, 7.0, 10.0]]).sigmoid())

    def test_more_steps_than_patches_go_patch_by_patch(self):
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 28, "black", score="logit")
        assert curves.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert curves.deletion.tolist() == [[10, 6, 3, 1, 0]]

    def test_fractions_are_true_where_steps_do_not_divide_the_patches(self):
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 3, "black", score="logit")
        assert curves.fractions.tolist() == [0, 0.25, 0.75, 1]
        assert curves.deletion.tolist() == [[10, 6, 1, 0]]

    def test_constant_map_goes_in_reading_order(self):
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, torch.zeros(1, 2, 2), CLASS_1, 4, "black", score="logit")
        assert curves.deletion.tolist() == [[10, 6, 5, 2, 0]]

    @pytest.mark.parametrize(
        "change", [lambda maps: maps * 1e-60, lambda maps: maps * 1e60, lambda maps: 1 + maps * 1e-9]
    )
    def test_maps_of_float64_are_ranked_as_they_are(self, change):
        maps = change(TRUE_MAP.double())
        curves = perturbation_curves(PatchSum(WEIGHTS), ONES, maps, CLASS_1, 4, "black", score="logit")
        assert curves.insertion.tolist() == [[0, 4, 7, 9, 10]]

    @pytest.mark.parametrize("baseline", ["blur", "mean", "black", "drop"])
    @pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
    def test_what_wraps_a_network_changes_no_curve(self, wrap, baseline):
        images, maps, _ = batch(methods=1)
        model, maps = vit(), maps["method_0"]
        model.class_names = tuple("abcde")
        with torch.compiler.set_stance("force_eager"):
            expected = perturbation_curves(model, images, maps, "b", 4, baseline)
            found = perturbation_curves(wrap(model), images, maps, "b", 4, baseline)
        torch.testing.assert_close(found.insertion, expected.insertion)

    def test_normalized_curves_run_from_0_to_1(self):
        curves = perturbation_curves(
            PatchSum(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 4, "black", score="logit", normalize=True
        )
        torch.testing.assert_close(curves.insertion, torch.tensor([[0.0, 0.4, 0.7, 0.9, 1.0]]))
        torch.testing.assert_close(curves.deletion, torch.tensor([[1.0, 0.6, 0.3, 0.1, 0.0]]))

    def test_normalizing_is_undefined_where_the_image_scores_no_higher_than_its_baseline(self):
        images, maps = torch.cat([ONES, -ONES, 0 * ONES]), TRUE_MAP.expand(3, 2, 2)
        curves = perturbation_curves(PatchSum(WEIGHTS), images, maps, CLASS_1.expand(3), 4, "black", normalize=True)
        assert curves.insertion.isnan().all(1).tolist() == [False, True, True]
        assert curves.deletion.isnan().all(1).tolist() == [False, True, True]

    def test_topk_keeps_a_quarter_rounded_up(self):
        model = PatchSum([[5.0, 1.0, 3.0], [2.0, 4.0, 0.0]])
        images, maps = torch.ones(1, 3, 4, 6), {"true": model.weights[None], "false": -model.weights[None]}
        scores = score_perturbations(model, images, maps, CLASS_1, baseline="black", score="logit", curves=False)
        assert {name: kept.tolist() for name, kept in scores.kept.items()} == {"true": [9.0], "false": [1.0]}
        assert (scores.full.tolist(), scores.empty) == ([15.0], None)
        assert scores.insertion == scores.deletion == {}
        assert sum(map(len, model.seen)) == 3  # the image and two regions

    def test_soft_multiplies_pixels_by_the_minmax_map(self):
        model = PatchSum(WEIGHTS, {"mean": (0.5,) * 3, "std": (0.25,) * 3})
        pixels, soft = torch.rand(1, 3, 4, 4), torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]])
        product = (pixels * soft.repeat_interleave(2, 0).repeat_interleave(2, 1) - 0.5) / 0.25
        expected = model(product)[:, 1]
        images, maps = (pixels - 0.5) / 0.25, {"true": TRUE_MAP, "constant": torch.full((1, 2, 2), 3.0)}
        scores = score_perturbations(
            model, images, maps, CLASS_1, baseline="black", score="logit", mask="soft", curves=False
        )
        torch.testing.assert_close(scores.kept["true"], expected)
        torch.testing.assert_close(scores.kept["constant"], model(torch.full_like(images, -2.0))[:, 1])

    def test_grid_that_does_not_divide_the_image(self):
        weights = torch.zeros(5, 5)
        weights[0, 0] = 1.0
        curves = perturbation_curves(
            PatchSum(weights), torch.ones(1, 3, 5, 5), TRUE_MAP, CLASS_1, 4, "black", score="logit"
        )
        assert curves.insertion.tolist() == [[0, 1, 1, 1, 1]]
        areas = perturbation_curves(
            PatchSum(torch.ones(5, 5)), torch.ones(1, 3, 5, 5), TRUE_MAP, CLASS_1, 4, "black", score="logit"
        )
        assert areas.insertion.tolist() == [[0, 9, 15, 19, 25]]


def reference(model, images, maps, target, steps, baseline, forward):
    """One image, one step at a time, with masks built by NumPy."""
    insertion, deletion = [], []
    for image, relevance, label in zip(images, maps, target, strict=True):
        order = np.argsort(-relevance.numpy().ravel(), kind="stable")
        counts = [round(step * order.size / steps) for step in range(steps + 1)]
        rows = {"insertion": [], "deletion": []}
        for count in counts:
            inserted = np.isin(np.arange(order.size), order[:count])
            for name, keep in (("insertion", inserted), ("deletion", ~inserted)):
                logits = forward(model, image, baseline, keep.reshape(relevance.shape))
                rows[name].append(logits.softmax(-1)[0, label])
        insertion.append(torch.stack(rows["insertion"]))
        deletion.append(torch.stack(rows["deletion"]))
    return torch.stack(insertion), torch.stack(deletion)


def replace_patches(model, image, baseline, keep):
    side = image.shape[1] // keep.shape[0]
    mask = torch.from_numpy(np.kron(keep, np.ones((side, side)))).bool()
    substitute = {
        "blur": lambda: torchvision_blur(image, [3, 3], [1.0, 1.0]),
        "mean": lambda: image.mean((1, 2), keepdim=True).expand_as(image),
        "black": lambda: (-torch.tensor([0.5] * 3) / 0.5).view(3, 1, 1).expand_as(image),
    }[baseline]()
    return model(torch.where(mask, image, substitute)[None])


def hide_tokens(model, image, baseline, keep):
    """Instead of leaving, dropped tokens stay and are hidden from every attention and from the pooling."""
    prefix = model.num_prefix_tokens
    visible = torch.cat([torch.ones(prefix, dtype=torch.bool), torch.from_numpy(keep.ravel())])
    tokens = model.forward_features(image[None], attn_mask=torch.where(visible, 0.0, -1e9)[None, None, None])
    if model.global_pool == "token":
        return model.forward_head(tokens)
    pooled = tokens[:, prefix:][:, visible[prefix:]]
    pooled = pooled.mean(1) if pooled.shape[1] else torch.zeros(1, tokens.shape[2])
    return model.head(model.fc_norm(pooled))


class TestAgainstReference:
    @pytest.mark.parametrize("baseline", ["blur", "mean", "black", "drop"])
    @torch.no_grad()
    def test_all_baselines(self, baseline):
        model, (images, maps, target) = vit(), batch()
        model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        scores = score_perturbations(model, images, maps, target, steps=6, baseline=baseline, batch_size=7)
        forward = hide_tokens if baseline == "drop" else replace_patches
        for name, relevance in maps.items():
            insertion, deletion = reference(model, images, relevance, target, 6, baseline, forward)
            torch.testing.assert_close(scores.insertion[name], insertion, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(scores.deletion[name], deletion, atol=1e-5, rtol=1e-4)
            quarter = torch.stack(
                [
                    forward(model, image, baseline, (rank_patches(m) < 4).view(4, 4).numpy()).softmax(-1)[0, label]
                    for image, m, label in zip(images, relevance, target, strict=True)
                ]
            )
            torch.testing.assert_close(scores.kept[name], quarter, atol=1e-5, rtol=1e-4)
            assert torch.equal(scores.insertion[name][:, 0], scores.empty)
            assert torch.equal(scores.deletion[name][:, 0], scores.full)

    @pytest.mark.parametrize(
        "options",
        [
            {"reg_tokens": 2},
            {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True, "pre_norm": True},
            {"class_token": False, "global_pool": "avg"},
            {"reg_tokens": 1, "global_pool": "avg"},
        ],
    )
    @torch.no_grad()
    def test_drop_by_kind_of_readout(self, options):
        model, (images, maps, target) = vit(**options), batch(2, methods=1)
        curves = perturbation_curves(model, images, maps["method_0"], target, 5, "drop")
        insertion, deletion = reference(model, images, maps["method_0"], target, 5, "drop", hide_tokens)
        torch.testing.assert_close(curves.insertion, insertion, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(curves.deletion, deletion, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("score", ["probability", "logit"])
    def test_batch_size_does_not_matter(self, score):
        model, (images, maps, target) = vit(), batch()
        for baseline in ("blur", "drop"):
            small, large = (
                score_perturbations(model, images, maps, target, baseline=baseline, score=score, batch_size=size)
                for size in (1, 1000)
            )
            for name in maps:
                torch.testing.assert_close(small.insertion[name], large.insertion[name], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(small.deletion[name], large.deletion[name], atol=1e-5, rtol=1e-4)

    def test_full_score_is_the_networks_own(self):
        model, (images, maps, target) = vit(), batch()
        with torch.no_grad():
            expected = model(images).softmax(-1).gather(1, target[:, None])[:, 0]
        for baseline in ("mean", "drop"):
            full = score_perturbations(model, images, maps, target, baseline=baseline, steps=1).full
            torch.testing.assert_close(full, expected)

    def test_rectangular_images(self):
        model, (images, maps, target) = vit(img_size=(16, 32)), batch(2, (16, 32), (2, 4), 1)
        for baseline in ("mean", "drop"):
            curves = perturbation_curves(model, images, maps["method_0"], target, 8, baseline)
            assert curves.insertion.shape == (2, 9)


class TestBadInput:
    def test_classes_are_given_one_per_image_or_one_for_all(self):
        model, (images, maps, _) = vit(), batch(2, methods=1)
        expected = perturbation_curves(model, images, maps["method_0"], torch.tensor([2, 2]), 2).insertion
        for target in (2, [2, 2], torch.tensor([2, 2], dtype=torch.int32)):
            assert torch.equal(perturbation_curves(model, images, maps["method_0"], target, 2).insertion, expected)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_maps_that_are_not_finite(self, value):
        maps = torch.rand(4, 2, 2)
        maps[1, 0, 0] = maps[3, 1, 1] = value
        for score in (score_perturbations, road_scores):
            with pytest.raises(ValueError, match=r"rollout: NaN or infinite values.*\[1, 3\]"):
                score(
                    PatchSum(WEIGHTS),
                    ONES.expand(4, 3, 4, 4),
                    {"good": TRUE_MAP.expand(4, 2, 2), "rollout": maps},
                    CLASS_1.expand(4),
                )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": 0}, "steps: expected at least 1"),
            ({"batch_size": 0}, "batch_size: expected at least 1"),
            ({"baseline": "gray"}, "unknown baseline 'gray': choose from blur, mean, black, drop"),
            ({"score": "margin"}, "unknown score 'margin': choose from probability, sigmoid, logit"),
            ({"mask": "hard"}, "unknown mask 'hard': choose from topk, soft"),
            ({"mask": "soft", "baseline": "drop"}, "half a token"),
            ({"maps": {}}, "maps: expected maps .* got none"),
            ({"maps": {"a": torch.rand(2, 2)}}, r"a: expected maps of shape \(1, h, w\)"),
            ({"maps": {"a": torch.rand(1, 3, 2, 2)}}, "several classes per image"),
            ({"maps": {"a": torch.rand(1, 2, 2), "b": torch.rand(1, 2, 1)}}, "b: expected the patch grid"),
            ({"maps": {"a": torch.rand(1, 5, 2)}}, "finer than images"),
            ({"images": torch.rand(3, 4, 4)}, "images: expected shape"),
            ({"images": torch.rand(0, 3, 4, 4)}, "images: expected shape"),
            ({"target": torch.tensor([1, 1])}, "target: expected one class index per image"),
            ({"target": torch.tensor([1.0])}, "target: expected one class index per image"),
            ({"target": [True]}, "target: expected one class index per image"),
            ({"target": torch.tensor([-1])}, "target: expected class indices of 0 or more"),
            ({"target": torch.tensor([2])}, "target class 2: expected logits"),
        ],
    )
    def test_wrong_options(self, change, message):
        given = {"images": ONES, "maps": {"a": TRUE_MAP}, "target": CLASS_1} | change
        with pytest.raises(ValueError, match=message):
            score_perturbations(PatchSum(WEIGHTS), **given)


@torch.no_grad()
def test_curves_replace_whole_patches():
    model, image = vit(img_size=30), torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    relevance = torch.arange(9.0).view(1, 3, 3)
    found = perturbation_curves(model, image, relevance, 2, 9, "mean", score="logit").deletion[0]
    kept = image.clone()
    for step, patch in enumerate([8, 7, 6, 5], start=1):
        row, column = divmod(patch, 3)
        area = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        kept[area] = baseline_images(model, image, "mean").expand_as(image)[area]
        torch.testing.assert_close(found[step], model(kept)[0, 2])


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def everything(model, images, maps):
    hard = score_perturbations(model, images, maps, 1, steps=5, baseline="mean", normalize=True)
    soft = score_perturbations(model, images, maps, 1, mask="soft", curves=False)
    dropped = score_perturbations(model, images, maps, 1, steps=5, baseline="drop")
    road = road_scores(model, images, maps, 1, fractions=(0.3, 0.6), noise=0.5)
    boxes = torch.tensor([[3.0, 300.0, 290.0, 301.0]], dtype=torch.float32)
    masks = boxes_to_masks(boxes, (320, 320))
    inputs = {"maps": maps["method_0"][:1].float(), "masks": masks, "full": hard.full, "kept": hard.kept["method_0"]}
    metrics = []
    for name in ("energy_inside", "iou", "pixel_accuracy", "average_precision", "sparseness", "average_drop"):
        metric = METRICS[name]()
        for _ in range(5):
            metric.update(**{key: inputs[key] for key in metric_inputs(name)})
        metrics.append(metric.compute())
    return (hard, soft, dropped, road), masks, torch.stack(metrics)


def test_the_ambient_default_dtype_changes_nothing(request):
    model, (images, maps, _) = vit(), batch()
    expected = everything(model, images, maps)
    request.getfixturevalue("bfloat16_by_default")
    found = everything(model, images, maps)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], equal_nan=True)
    for one, other in zip(found[0], expected[0], strict=True):
        for name, values in vars(other).items():
            torch.testing.assert_close(getattr(one, name), values, atol=1e-3, rtol=1e-3, equal_nan=True)
