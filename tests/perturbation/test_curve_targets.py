"""What curves score: every target that `gmarpp.explain` takes, in every unit, under any ambient settings."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import gmarpp
from gmarpp.explainer import Explainer, metric_inputs
from gmarpp.metrics import METRICS
from gmarpp.metrics.functional import boxes_to_masks
from gmarpp.network.extent import grid_extent
from gmarpp.perturbation import baseline_images, perturbation_curves, rank_patches, road_scores, score_perturbations
from gmarpp.perturbation.masks import patch_extent, pixel_to_patch

NAMES = ("ant", "bee", "cat", "dog", "eel")


def vit(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    network = timm.create_model("vit_tiny_patch16_224", **(defaults | options)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


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


def test_scores_that_are_not_finite_are_not_left_out(images, maps):
    class Overflow(nn.Module):
        def forward(self, pictures):
            bright = pictures.flatten(1).std(1) < 0.5
            return torch.stack([bright / ~bright, torch.ones(len(pictures))], 1)

    with pytest.raises(ValueError, match=r"NaN or infinite scores of perturbed images at image positions \[0, 1, 2\]"):
        perturbation_curves(Overflow(), images, maps, 0, 4, "mean", score="logit")
    with pytest.raises(ValueError, match="NaN or infinite scores"):
        score_perturbations(Overflow(), 0.1 * images, {"a": maps}, 0, mask="soft", score="logit", curves=False)


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def everything(model, images, maps):
    maps = {"a": maps, "b": maps.flip(2)}
    hard = score_perturbations(model, images, maps, 1, steps=5, baseline="mean", normalize=True)
    soft = score_perturbations(model, images, maps, 1, mask="soft", curves=False)
    dropped = score_perturbations(model, images, maps, 1, steps=5, baseline="drop")
    road = road_scores(model, images, maps, 1, fractions=(0.3, 0.6), noise=0.5)
    boxes = torch.tensor([[3.0, 300.0, 290.0, 301.0]], dtype=torch.float32)
    masks = boxes_to_masks(boxes, (320, 320))
    inputs = {"maps": maps["a"][:1].float(), "masks": masks, "full": hard.full, "kept": hard.kept["a"]}
    metrics = []
    for name in ("energy_inside", "iou", "pixel_accuracy", "average_precision", "sparseness", "average_drop"):
        metric = METRICS[name]()
        for _ in range(5):
            metric.update(**{key: inputs[key] for key in metric_inputs(name)})
        metrics.append(metric.compute())
    return (hard, soft, dropped, road), masks, torch.stack(metrics)


def test_the_ambient_default_dtype_changes_nothing(model, images, maps, request):
    expected = everything(model, images, maps)
    request.getfixturevalue("bfloat16_by_default")
    found = everything(model, images, maps)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], equal_nan=True)
    for one, other in zip(found[0], expected[0], strict=True):
        for name, values in vars(other).items():
            torch.testing.assert_close(getattr(one, name), values, atol=1e-3, rtol=1e-3, equal_nan=True)


class TestPatchesThatDoNotDivideTheImage:
    """Of 30 pixels, patches of 8 leave six out, or are padded by two."""

    @pytest.mark.parametrize("side", [30, 31])
    def test_pixels_belong_to_the_patches_that_the_network_cuts(self, side):
        model = vit(img_size=side)
        assert patch_extent(model, (side, side), (3, 3)) == (24, 24)
        found = pixel_to_patch((3, 3), (side, side), torch.device("cpu"), (24, 24)).view(side, side)
        seen = torch.arange(9).view(3, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(found[:24, :24], seen)

    def test_padded_patches(self):
        model = vit(dynamic_img_size=True, dynamic_img_pad=True)
        assert patch_extent(model, (30, 30), (4, 4)) == (32, 32)
        assert patch_extent(model, (9, 30), (2, 4)) == (16, 32)
        found = pixel_to_patch((4, 4), (30, 30), torch.device("cpu"), (32, 32)).view(30, 30)
        seen = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)[:30, :30]
        assert torch.equal(found, seen)
        explained = gmarpp.explain(model, torch.rand(1, 3, 30, 30), "rollout")
        assert explained.images.shape == (1, 3, 32, 32)

    def test_maps_of_other_networks_and_grids_span_the_image(self):
        assert patch_extent(vit(), (32, 32), (3, 3)) == (32, 32)
        assert patch_extent(nn.Identity(), (30, 30), (3, 3)) == (30, 30)
        layout = gmarpp.Architecture(grid=lambda height, width: (3, 3), prefix_tokens=1)
        assert grid_extent(layout, 30, 30) == (30, 30)

    @torch.no_grad()
    def test_curves_replace_whole_patches(self):
        model, image = vit(img_size=30), torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
        relevance = torch.arange(9.0).view(1, 3, 3)
        found = perturbation_curves(model, image, relevance, 2, 9, "mean", score="logit").deletion[0]
        kept = image.clone()
        for step, patch in enumerate([8, 7, 6, 5], start=1):
            row, column = divmod(patch, 3)
            area = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            kept[area] = baseline_images(model, image, "mean").expand_as(image)[area]
            torch.testing.assert_close(found[step], model(kept)[0, 2])

    def test_pictures_boxes_and_masks_are_cut_to_what_the_network_sees(self):
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
