"""Another library's methods beside those of gmarpp: captum's Integrated Gradients and its Gradient SHAP.

    python examples/outside_method.py PHOTOGRAPH

Needs captum (`pip install captum`). The same function is a method on the command line:

    --explain.methods '[gmarpp_l1, {class_path: gmarpp.FunctionMethod, init_args:
        {name: integrated_gradients, function: examples.outside_method.integrated_gradients, signed: true}}]'
"""

import sys

import torch
from captum.attr import GradientShap, IntegratedGradients
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.metrics.functional import deletion_auc, insertion_auc


def integrated_gradients(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return values of pixels, (B, C, H, W), which are averaged over each patch."""
    return IntegratedGradients(model).attribute(images, target=target, n_steps=16)


def gradient_shap(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # noqa: D103
    return GradientShap(model).attribute(images, torch.zeros_like(images), target=target)


if __name__ == "__main__":
    for function in (integrated_gradients, gradient_shap):
        gmarpp.register_method(gmarpp.FunctionMethod(function.__name__, function, signed=True))
    model = gmarpp.load_model("checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    photo = pil_to_tensor(Image.open(sys.argv[1]).convert("RGB"))
    images = EvaluationTransform(Preprocessing.of(model))(photo)["image"][None]
    explanation = gmarpp.explain(model, images, ["integrated_gradients", "gradient_shap", "gmarpp_l1"])
    explanation.save("outside_method.png")
    for method, maps in explanation.maps.items():
        curves = gmarpp.perturbation_curves(model, images, maps, explanation.target, steps=8, baseline="mean")
        insertion = insertion_auc(curves.fractions, curves.insertion).item()
        deletion = deletion_auc(curves.fractions, curves.deletion).item()
        print(f"{method:22} insertion {insertion:.3f} deletion {deletion:.3f}")
