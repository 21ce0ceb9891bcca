"""Ask what speaks for one class against another, and measure the answer by that same question.

    python examples/one_against_another.py

Needs scikit-image (`pip install 'gmarpp[demo]'`) for its photographs: the left half is a cat, the right one coffee.
"""

import torch
from skimage import data
from torchvision.transforms.v2.functional import resize, to_image

import gmarpp
from gmarpp.data import EvaluationTransform, Preprocessing
from gmarpp.metrics.functional import infidelity, insertion_auc, max_sensitivity
from gmarpp.perturbation import map_changes, square_removals

model = gmarpp.load_model("checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors")
halves = [resize(to_image(photo), [448, 224]) for photo in (data.chelsea()[:, 80:380], data.coffee()[:, 100:500])]
image = EvaluationTransform(Preprocessing.of(model))(torch.cat(halves, dim=2))["image"][None]
question = gmarpp.Contrast("espresso", "Egyptian cat")
explanation = gmarpp.explain(model, image, ["token_relevance", "gmarpp_l1", "rollout"], question)
explanation.save("one_against_another.png")
removals = square_removals(model, image, explanation.maps, question, samples=8)
changes = map_changes(model, image, list(explanation.maps), question, samples=2)
for method, maps in explanation.maps.items():
    positive = maps.clamp_min(0)
    curves = gmarpp.perturbation_curves(model, image, maps, question, steps=14)
    values = {
        "relevance on the coffee": positive[:, :, 4:].sum() / positive.sum(),
        "insertion": insertion_auc(curves.fractions, curves.insertion),
        "infidelity": infidelity(removals.removed_relevance[method], removals.score_drops),
        "max-sensitivity": max_sensitivity(changes[method]),
    }
    print(method, {name: round(value.item(), 3) for name, value in values.items()})
