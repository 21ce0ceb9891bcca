from types import SimpleNamespace

import pytest
import torch
from small_networks import CLASS_1, ONES, TRUE_MAP, WEIGHTS, PatchSum, batch, vit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gmarpp.perturbation import perturbation_curves, score_perturbations
from gmarpp.perturbation.jobs import images_per_pass


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


def test_scores_that_are_not_finite_are_not_left_out():
    images, maps, _ = batch()

    class Overflow(nn.Module):
        def forward(self, pictures):
            bright = pictures.flatten(1).std(1) < 0.5
            return torch.stack([bright / ~bright, torch.ones(len(pictures))], 1)

    with pytest.raises(ValueError, match=r"NaN or infinite scores of perturbed images at image positions \[0, 1, 2\]"):
        perturbation_curves(Overflow(), images, maps["method_0"], 0, 4, "mean", score="logit")
    with pytest.raises(ValueError, match="NaN or infinite scores"):
        score_perturbations(Overflow(), 0.1 * images, maps, 0, mask="soft", score="logit", curves=False)


@pytest.mark.parametrize(("side", "images"), [(112, 891), (224, 222), (8192, 1)])
def test_passes_on_a_gpu_are_as_large_as_the_images_allow(side, images):
    with FakeTensorMode():
        on_gpu, on_cpu = (torch.empty(8, 3, side, side, device=device) for device in ("cuda", "cpu"))
    assert images_per_pass(on_gpu, None) == images
    assert images_per_pass(on_gpu, 7) == 7
    assert images_per_pass(on_cpu, None) == 128


def test_without_a_batch_size_a_cpu_scores_128_images_at_a_time():
    model, images = PatchSum(WEIGHTS), torch.rand(33, 3, 4, 4)
    score_perturbations(model, images, {"a": torch.rand(33, 2, 2)}, 1, steps=4, baseline="mean")
    assert max(map(len, model.seen)) == 128
