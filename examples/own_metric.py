"""A metric of one's own: over how many patches a map spreads its relevance, as the exponential of its entropy.

    python examples/own_metric.py

Registered, it is known by its name to `Explainer`, the monitor and `--explain.metrics`. Needs scikit-image
(`pip install 'gmarpp[demo]'`) for its photographs.
"""

import torch
from skimage import data
from torchvision.transforms.v2.functional import to_image

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.explainer import Explainer
from gmarpp.metrics import MeanOverImages, register_metric


def patches_used(maps: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the number of patches for each map (B, h, w), between 1 and h * w; relevance below zero is left out."""
    shares = torch.distributions.Categorical(maps.flatten(1).clamp_min(0))
    return shares.entropy().exp().mean() if reduction == "mean" else shares.entropy().exp()


class PatchesUsed(MeanOverImages):
    """Mean over images; the argument's name says that maps are wanted."""

    higher_is_better = False

    def update(self, maps: torch.Tensor) -> None:  # noqa: D102
        self.accumulate(patches_used(maps, reduction="none"))


register_metric("patches_used", PatchesUsed, patches_used, label="Patches used")

if __name__ == "__main__":
    model = gmarpp.load_model("checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    transform = EvaluationTransform(Preprocessing.of(model))
    images = torch.stack([transform(to_image(photo))["image"] for photo in (data.chelsea(), data.coffee())])
    batch = {"image": images, "label": torch.tensor([-1, -1]), "index": torch.arange(2), "path": ["cat", "coffee"]}
    explained = Explainer(["gmarpp_l1", "legrad", "rollout"], metrics=["patches_used"])(model, batch)
    for method, metrics in explained.values.items():
        print(method, dict(zip(explained.path, metrics["patches_used"].tolist(), strict=True)))
