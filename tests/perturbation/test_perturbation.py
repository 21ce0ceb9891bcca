import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import spsolve
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from gmarpp.attribution import UnsupportedNetworkError
from gmarpp.maps import minmax
from gmarpp.perturbation import (
    baseline_images,
    gaussian_blur,
    noisy_linear_imputation,
    perturbation_curves,
    rank_patches,
    road_scores,
    score_perturbations,
    step_counts,
)
from gmarpp.perturbation.masks import pixel_to_patch


class PatchSum(nn.Module):
    """Logit of class 1 is the weighted sum of the patches' means, logit of class 0 is 0; records its batches."""

    def __init__(self, weights, pretrained_cfg=None):
        super().__init__()
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        self.pretrained_cfg = pretrained_cfg or {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        means = F.adaptive_avg_pool2d(images.mean(1), self.weights.shape)
        logit = (means * self.weights).sum((1, 2))
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


WEIGHTS = [[4.0, 1.0], [3.0, 2.0]]
ONES = torch.ones(1, 3, 4, 4)
TRUE_MAP = torch.tensor([WEIGHTS])
CLASS_1 = torch.tensor([1])


def vit(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **(defaults | options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(count=3, size=(32, 32), grid=(4, 4), methods=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *size, generator=generator)
    maps = {f"method_{i}": torch.rand(count, *grid, generator=generator) for i in range(methods)}
    return images, maps, torch.arange(count) % 5


class TestOrder:
    def test_most_relevant_first_and_ties_by_index(self):
        maps = torch.tensor([[[0.0, 5.0, 5.0], [-1.0, 5.0, 7.0]], [[2.0] * 3] * 2])
        assert rank_patches(maps).tolist() == [[4, 1, 2, 5, 3, 0], [0, 1, 2, 3, 4, 5]]

    def test_ties_stay_stable_on_large_constant_maps(self):
        assert rank_patches(torch.zeros(1, 40, 40)).tolist() == [list(range(1600))]

    def test_counts_reach_both_ends_and_are_capped_at_a_patch_per_step(self):
        assert step_counts(196, 28) == list(range(0, 197, 7))
        assert step_counts(64, 28)[0] == 0
        assert step_counts(64, 28)[-1] == 64
        assert len(set(step_counts(64, 28))) == 29
        assert step_counts(4, 28) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(("grid", "size"), [((4, 4), (32, 32)), ((3, 5), (8, 7)), ((2, 3), (10, 11))])
    def test_pixels_follow_nearest_upsampling(self, grid, size):
        patches = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, 1, *grid)
        expected = F.interpolate(patches, size=size, mode="nearest").flatten().long()
        found = pixel_to_patch(grid, size, torch.device("cpu"))
        assert torch.equal(found, expected)
        assert set(found.tolist()) == set(range(grid[0] * grid[1]))


class TestBaselines:
    @pytest.mark.parametrize(("side", "kernel", "sigma"), [(224, 21, 7.0), (112, 11, 3.5), (448, 41, 14.0)])
    def test_blur_grows_with_the_image(self, side, kernel, sigma):
        images = torch.randn(2, 3, side, side + 16)
        expected = torchvision_blur(images, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(gaussian_blur(images), expected, atol=1e-5, rtol=1e-5)

    def test_blur_commutes_with_normalization_and_ignores_autocast(self):
        images, mean, std = torch.rand(1, 3, 20, 20), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
        normalized = torchvision.transforms.v2.functional.normalize(images, mean.tolist(), std.tolist())
        expected = (gaussian_blur(images) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(gaussian_blur(normalized), expected, atol=1e-5, rtol=1e-5)

    def test_blur_keeps_half_precision(self):
        assert gaussian_blur(torch.rand(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_mean_is_each_images_own_color(self):
        images = torch.stack([torch.zeros(3, 2, 2), torch.arange(12.0).view(3, 2, 2)])
        assert baseline_images(nn.Identity(), images, "mean")[..., 0, 0].tolist() == [[0, 0, 0], [1.5, 5.5, 9.5]]

    def test_black_is_zero_before_normalization(self):
        model = PatchSum(WEIGHTS, {"mean": (0.5, 0.4, 0.2), "std": (0.5, 0.2, 0.1)})
        black = baseline_images(model, torch.zeros(2, 3, 4, 4), "black")
        torch.testing.assert_close(black[1, :, 0, 0], torch.tensor([-1.0, -2.0, -2.0]))

    def test_black_needs_the_normalization(self):
        with pytest.raises(ValueError, match="pretrained_cfg"):
            baseline_images(nn.Identity(), ONES, "black")


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

    def test_minmax_of_constant_is_zero(self):
        assert minmax(torch.tensor([[[2.0, 2.0]], [[1.0, 3.0]]])).tolist() == [[[0, 0]], [[0, 1]]]

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


class TestDropEndPoint:
    def test_class_token_alone(self):
        model, (images, maps, target) = vit(), batch(1, methods=1)
        curves = perturbation_curves(model, images, maps["method_0"], target, 2, "drop", score="logit")
        with torch.no_grad():
            class_token = (model.cls_token + model.pos_embed[:, :1]).expand(1, -1, -1)
            expected = model.forward_head(model.norm(model.blocks(class_token)))[0, target]
        torch.testing.assert_close(curves.deletion[:, -1], expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        "options",
        [
            {"class_token": False, "global_pool": "avg"},
            {"class_token": False, "global_pool": "max"},
            {"class_token": False, "global_pool": "map"},
            {"reg_tokens": 1, "global_pool": "avg"},
        ],
    )
    def test_nothing_to_pool_is_the_zero_vector(self, options):
        model, (images, maps, target) = vit(**options), batch(1, methods=1)
        curves = perturbation_curves(model, images, maps["method_0"], target, 2, "drop", score="logit")
        with torch.no_grad():
            expected = model.head(model.fc_norm(torch.zeros(1, 32)))[0, target]
        torch.testing.assert_close(curves.deletion[:, -1], expected)
        assert curves.deletion.isfinite().all()

    def test_distilled(self):
        torch.manual_seed(0)
        model = timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2
        ).eval()
        images, maps, target = batch(2, methods=1)
        curves = perturbation_curves(model, images, maps["method_0"], target, 2, "drop", score="logit")
        with torch.no_grad():
            torch.testing.assert_close(curves.deletion[:, 0], model(images).gather(1, target[:, None])[:, 0])

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}),
            ("vit_relpos_small_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}),
            (
                "swin_tiny_patch4_window7_224",
                {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
            ),
        ],
    )
    def test_other_networks_are_refused(self, name, options):
        with pytest.raises(UnsupportedNetworkError, match=r"'drop'.*'blur', 'mean' or 'black'"):
            perturbation_curves(timm.create_model(name, **options), ONES, TRUE_MAP, CLASS_1, 2, "drop")

    def test_torchvision_is_refused(self):
        model = torchvision.models.VisionTransformer(8, 4, 1, 1, 8, 8)
        with pytest.raises(UnsupportedNetworkError, match="VisionTransformer is not one"):
            perturbation_curves(model, torch.ones(1, 3, 8, 8), TRUE_MAP, CLASS_1, 2, "drop")

    def test_map_on_another_grid_is_refused(self):
        with pytest.raises(ValueError, match=r"patch grid \(4, 4\), got \(2, 2\)"):
            perturbation_curves(vit(), torch.ones(1, 3, 32, 32), TRUE_MAP, CLASS_1, 2, "drop")


class TestJobs:
    def test_shared_end_points_and_repeated_masks_are_scored_once(self):
        model, images = PatchSum(WEIGHTS), torch.rand(3, 3, 4, 4)
        maps = {"a": TRUE_MAP.expand(3, 2, 2), "same": 2 * TRUE_MAP.expand(3, 2, 2)}
        score_perturbations(model, images, maps, CLASS_1.expand(3), steps=4, baseline="mean")
        scored = torch.cat(model.seen)
        # Kept sets of one image: 5 of insertion, 5 of deletion, both end points shared, topk = first insertion step.
        assert len(scored) == 3 * 8
        assert len(scored.unique(dim=0)) == len(scored)

    def test_opposite_maps_share_their_kept_sets(self):
        model, maps = PatchSum(WEIGHTS), {"a": TRUE_MAP, "opposite": -TRUE_MAP}
        scores = score_perturbations(model, ONES, maps, CLASS_1, steps=4, baseline="black", kept=False)
        assert len(torch.cat(model.seen)) == 8
        assert torch.equal(scores.insertion["a"], scores.deletion["opposite"].flip(1))

    def test_sharing_compares_every_patch_of_large_grids(self):
        # 256 patches take several words; these maps differ in the last patches only.
        ascending = torch.arange(256.0).view(1, 16, 16)
        swapped = ascending.clone()
        swapped.view(-1)[[0, 1]] = swapped.view(-1)[[1, 0]]
        model = PatchSum(ascending[0])
        images = torch.ones(1, 3, 16, 16)
        together = score_perturbations(
            model, images, {"a": ascending, "b": swapped}, CLASS_1, steps=256, baseline="black", score="logit"
        )
        assert len(torch.cat(model.seen)) == 2 + 2 * 255 + 2
        for name, relevance in {"a": ascending, "b": swapped}.items():
            alone = perturbation_curves(model, images, relevance, CLASS_1, 256, "black", score="logit")
            torch.testing.assert_close(together.insertion[name], alone.insertion)

    @pytest.mark.parametrize("mask", ["topk", "soft"])
    def test_batches_are_full_and_never_larger_than_asked(self, mask):
        model, (images, maps, target) = PatchSum(WEIGHTS), batch(3, (4, 4), (2, 2), 3)
        score_perturbations(model, images, maps, target % 2, baseline="mean", mask=mask, batch_size=5)
        sizes = [len(images) for images in model.seen]
        assert max(sizes) == 5
        assert sum(size < 5 for size in sizes) <= (1 if mask == "topk" else 2)

    def test_dropped_tokens_shorten_the_sequence(self):
        model, (images, maps, target) = vit(), batch(2)
        shapes = []
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
        score_perturbations(model, images, maps, target, steps=4, baseline="drop", batch_size=6)
        assert {length for _, length in shapes} == {1, 5, 9, 13, 17}
        assert max(count for count, _ in shapes) <= 6

    def test_soft_only(self):
        model, maps = PatchSum(WEIGHTS), {"a": TRUE_MAP}
        scores = score_perturbations(model, ONES, maps, CLASS_1, baseline="mean", mask="soft", curves=False)
        assert len(torch.cat(model.seen)) == 2
        assert scores.kept["a"].shape == (1,)

    def test_modes_are_restored_and_nothing_is_recorded(self):
        model, (images, maps, target) = vit(proj_drop_rate=0.5).train(), batch()
        model.blocks[0].eval()
        before = {name: module.training for name, module in model.named_modules()}
        first, second = (score_perturbations(model, images, maps, target, steps=2) for _ in range(2))
        assert torch.equal(first.full, second.full)
        assert not first.insertion["method_0"].requires_grad
        assert {name: module.training for name, module in model.named_modules()} == before
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_modes_are_restored_after_an_error(self):
        model, (images, maps, target) = vit().train(), batch()
        model.blocks[0].eval()
        model.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score_perturbations(model, images, maps, target)
        assert model.training
        assert not model.blocks[0].training

    def test_output_with_logits(self):
        class Wrapped(PatchSum):
            def forward(self, images):
                return SimpleNamespace(logits=super().forward(images))

        curves = perturbation_curves(Wrapped(WEIGHTS), ONES, TRUE_MAP, CLASS_1, 4, "black", score="logit")
        assert curves.deletion.tolist() == [[10, 6, 3, 1, 0]]

    def test_ambient_autocast_reaches_the_network_and_scores_are_float32(self):
        model, (images, maps, target) = vit(), batch()
        types = set()
        model.head.register_forward_hook(lambda _, __, output: types.add(output.dtype))
        exact = score_perturbations(model, images, maps, target, steps=4)
        with torch.autocast("cpu", torch.bfloat16):
            half = score_perturbations(model, images, maps, target, steps=4)
        assert types == {torch.float32, torch.bfloat16}
        assert half.insertion["method_0"].dtype == torch.float32
        torch.testing.assert_close(half.insertion["method_0"], exact.insertion["method_0"], atol=0.1, rtol=0.1)

    def test_half_precision_images_and_inference_mode(self):
        model = PatchSum(WEIGHTS)
        with torch.inference_mode():
            curves = perturbation_curves(
                model, ONES.half(), TRUE_MAP.half(), CLASS_1, 4, "black", score="logit", batch_size=3
            )
        assert curves.deletion.tolist() == [[10, 6, 3, 1, 0]]
        assert curves.deletion.dtype == torch.float32


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


def solve_by_hand(image, known):
    """The linear system of the paper, pixel by pixel, solved directly."""
    height, width = known.shape
    number = {tuple(pixel): n for n, pixel in enumerate(np.argwhere(~known))}
    matrix, right = np.zeros((len(number), len(number))), np.zeros((len(number), len(image)))
    for (y, x), n in number.items():
        for dy, dx in [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]:
            if 0 <= y + dy < height and 0 <= x + dx < width:
                weight = 1 / 12 if dy and dx else 1 / 6
                matrix[n, n] += weight
                if known[y + dy, x + dx]:
                    right[n] += weight * image[:, y + dy, x + dx]
                else:
                    matrix[n, number[y + dy, x + dx]] -= weight
    filled = image.copy()
    filled[:, ~known] = spsolve(csc_matrix(matrix), right).T
    return filled


class TestImputation:
    @pytest.mark.parametrize("share", [0.15, 0.5, 0.95])
    def test_solves_the_linear_system(self, share):
        torch.manual_seed(0)
        images = torch.randn(3, 2, 37, 28)
        keep = torch.rand(3, 20).argsort(1) >= round(share * 20)
        known = keep[:, pixel_to_patch((5, 4), (37, 28), images.device)].view(3, 37, 28)
        filled = noisy_linear_imputation(images, known, noise=0.0)
        for found, image, mask in zip(filled, images.double().numpy(), known.numpy(), strict=True):
            np.testing.assert_allclose(found.numpy(), solve_by_hand(image, mask), atol=5e-3)

    def test_noise_touches_unknown_pixels_only(self):
        torch.manual_seed(0)
        images, known = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
        known[:, :8] = True
        filled = noisy_linear_imputation(images, known, noise=0.01)
        assert (filled[:, :, :8] == 0).all()
        assert filled[:, :, 8:].std().item() == pytest.approx(0.01, rel=0.05)

    def test_autocast_does_not_reach_the_solver(self):
        torch.manual_seed(0)
        images, known = torch.randn(1, 3, 16, 16), torch.arange(256).view(1, 16, 16) % 64 < 32
        with torch.autocast("cpu", torch.bfloat16):
            inside = noisy_linear_imputation(images, known, noise=0.0)
        assert torch.equal(inside, noisy_linear_imputation(images, known, noise=0.0))

    def test_nothing_known(self):
        with pytest.raises(ValueError, match="at least one known pixel"):
            noisy_linear_imputation(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))


class TestRoad:
    def test_against_single_images(self):
        model, (images, maps, target) = vit(), batch(2)
        scores = road_scores(model, images, maps, target, fractions=(0.25, 0.5), noise=0.0, batch_size=3)
        assert scores.fractions.tolist() == [0.25, 0.5]
        for name, relevance in maps.items():
            for position, count in enumerate((4, 8)):
                for order, signed in (("most_relevant_first", relevance), ("least_relevant_first", -relevance)):
                    removed = (rank_patches(signed) < count).view(2, 4, 4)
                    known = ~removed.repeat_interleave(8, 1).repeat_interleave(8, 2)
                    with torch.no_grad():
                        logits = model(noisy_linear_imputation(images, known, noise=0.0))
                    expected = logits.softmax(-1).gather(1, target[:, None])[:, 0]
                    torch.testing.assert_close(getattr(scores, order)[name][:, position], expected, atol=1e-3, rtol=0)

    def test_order_of_the_true_map_is_told(self):
        model = PatchSum([[4.0, -1.0], [-3.0, 2.0]])
        images = torch.zeros(1, 3, 8, 8)
        images[:, :, :4, :4] = 1.0
        maps = {"true": torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])}
        scores = road_scores(model, images, maps, CLASS_1, fractions=(0.25, 0.5))
        assert (scores.most_relevant_first["true"] < scores.least_relevant_first["true"]).all()

    def test_noise_does_not_depend_on_the_batch(self):
        model, (images, maps, target) = vit(), batch(3, methods=1)
        together = road_scores(model, images, maps, target, noise=0.5, fractions=(0.5,))
        alone = road_scores(model, images[2:], {"m": maps["method_0"][2:]}, target[2:], noise=0.5, fractions=(0.5,))
        torch.testing.assert_close(
            together.most_relevant_first["method_0"][2:], alone.most_relevant_first["m"], atol=1e-3, rtol=0
        )
        other = road_scores(model, images, maps, target, noise=0.5, fractions=(0.5,), seed=1)
        assert not torch.equal(together.most_relevant_first["method_0"], other.most_relevant_first["method_0"])

    def test_always_removes_a_patch_and_leaves_one(self):
        scores = road_scores(PatchSum(WEIGHTS), ONES, {"a": TRUE_MAP}, CLASS_1)
        assert scores.fractions.min() == 0.25
        assert scores.fractions.max() == 0.75

    @pytest.mark.parametrize("fractions", [(), (0.0, 0.5), (0.5, 1.0)])
    def test_fractions_outside(self, fractions):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            road_scores(PatchSum(WEIGHTS), ONES, {"a": TRUE_MAP}, CLASS_1, fractions=fractions)

    def test_one_patch(self):
        with pytest.raises(ValueError, match="at least 2 patches"):
            road_scores(PatchSum(WEIGHTS), ONES, {"a": torch.ones(1, 1, 1)}, CLASS_1)
