"""Explain a torchvision ViT in ten lines; works the same with timm and Hugging Face networks.

    python examples/torchvision_vit.py PHOTOGRAPH [WEIGHTS]

Needs torchvision's ViT-B/16 weights, which torchvision downloads, or a file of them.
"""

import sys

import torch
import torchvision
from PIL import Image

import gmarpp

weights = torchvision.models.ViT_B_16_Weights.DEFAULT
if len(sys.argv) < 2:
    sys.exit(__doc__)
model = torchvision.models.vit_b_16(weights=weights if len(sys.argv) < 3 else None)
if len(sys.argv) > 2:
    model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
model.class_names = weights.meta["categories"]
image = weights.transforms()(Image.open(sys.argv[1]).convert("RGB"))[None]
explanation = gmarpp.explain(model, image, methods=["token_relevance", "gmarpp_l1", "rollout"])
explanation.overlay(0).save("overlay.png")
explanation.show().savefig("methods.png")
print("predicted", weights.meta["categories"][explanation.target[0]], "- see overlay.png and methods.png")
