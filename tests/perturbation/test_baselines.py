import pytest
import timm
import torch
import torchvision
from small_networks import CLASS_1, ONES, TRUE_MAP, WEIGHTS, PatchSum, batch, vit
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from gmarpp.attribution import UnsupportedNetworkError
from gmarpp.perturbation import baseline_images, gaussian_blur, perturbation_curves


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

    @pytest.mark.parametrize("change", ["hook", "forward"])
    def test_networks_that_are_changed_from_outside_are_refused(self, change):
        model, images, maps = vit(), torch.randn(2, 3, 32, 32), torch.rand(2, 4, 4)
        looks = model.register_forward_hook(lambda *_: None)
        perturbation_curves(model, images, maps, 1, 2, "drop")
        looks.remove()
        if change == "hook":
            model.register_forward_hook(lambda _, args, output: 3 * output)
        else:
            own = model.forward
            model.forward = lambda batch: 4 * own(batch)
        with pytest.raises(UnsupportedNetworkError, match="its hooks or its replaced forward"):
            perturbation_curves(model, images, maps, torch.tensor([1, 1]), 2, "drop")

    def test_torchvision_is_refused(self):
        model = torchvision.models.VisionTransformer(8, 4, 1, 1, 8, 8)
        with pytest.raises(UnsupportedNetworkError, match="VisionTransformer is not one"):
            perturbation_curves(model, torch.ones(1, 3, 8, 8), TRUE_MAP, CLASS_1, 2, "drop")

    def test_map_on_another_grid_is_refused(self):
        with pytest.raises(ValueError, match=r"patch grid \(4, 4\), got \(2, 2\)"):
            perturbation_curves(vit(), torch.ones(1, 3, 32, 32), TRUE_MAP, CLASS_1, 2, "drop")
