import pytest
import torch
from small_networks import CLASS_1, ONES, TRUE_MAP, WEIGHTS, PatchSum, batch, vit

from gmarpp.perturbation import noisy_linear_imputation, rank_patches, road_scores


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
