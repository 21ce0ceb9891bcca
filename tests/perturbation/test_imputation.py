import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import spsolve

from gmarpp.perturbation import noisy_linear_imputation
from gmarpp.perturbation.masks import pixel_to_patch


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
