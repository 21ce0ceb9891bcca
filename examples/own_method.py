"""A method of one's own, occlusion: how much the class's logit falls when a square of the picture turns gray.

    python examples/own_method.py

On command lines and in configurations the class is named with its options:

    --explain.methods '[gmarpp_l1, {class_path: examples.own_method.Occlusion, init_args: {side: 28}}]'

Needs scikit-image (`pip install 'gmarpp[demo]'`) for its photograph.
"""

from itertools import product

import torch
from skimage import data
from torchvision.transforms.v2.functional import to_image

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.explainer import Explainer


class Occlusion(gmarpp.MapMethod):
    """Known by its name once it is registered, or given to `Explainer`."""

    name, label, color, signed = "occlusion", "Occlusion", "#17a2a2", True

    def __init__(self, side: int = 14) -> None:
        self.side = side

    @torch.no_grad()
    def maps(self, model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the logit's fall, (B, H, W), for the square over each pixel."""
        relevance, whole = torch.zeros_like(images[:, 0]), model(images).gather(1, target[:, None])
        for top, left in product(range(0, images.shape[2], self.side), range(0, images.shape[3], self.side)):
            square = (..., slice(top, top + self.side), slice(left, left + self.side))
            gray = images.clone()
            gray[square] = 0
            relevance[square] = (whole - model(gray).gather(1, target[:, None]))[:, :, None]
        return relevance


if __name__ == "__main__":
    model = gmarpp.load_model("checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    images = EvaluationTransform(Preprocessing.of(model))(to_image(data.chelsea()))["image"][None]
    batch = {"image": images, "label": torch.tensor([-1]), "index": torch.tensor([0]), "path": ["cat"]}
    explainer = Explainer([Occlusion(), "gmarpp_l1", "random"], metrics=["insertion_auc", "deletion_auc"], steps=8)
    explained = explainer(model, batch)
    print(explained.values)
